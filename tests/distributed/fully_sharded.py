"""FSDP2 beside one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from curvature import Hessian
from optimizers import AdaHessian, SecondOrder, SophiaH, TrustRegionNewton, build
from tests.distributed.problem import (
    BY_DIFFERENCES,
    adamw,
    alone,
    ball,
    hutchinson,
    network,
    part,
    same,
    sharded,
    soaa,
    soaa_by_tensor,
    tadam,
    train,
    whole,
)
from trust_region import Box, L2Ball, RmsBox, SteihaugCG, TrustRegion, Unbounded


def compositions_equal_one_process(folder: Path) -> None:
    for make in (soaa, soaa_by_tensor, adamw, tadam, ball):
        expected, radii, _ = alone(make, 8)
        model = sharded()
        optimizer = make(model.parameters())
        found = train(model, optimizer, part, range(8))
        assert found == pytest.approx(radii, rel=1e-7, nan_ok=True), (make.__name__, found, radii)
        same(whole(expected), whole(model))
    assert min(radii) < 100.0, "no trial was rejected"
    # One group, the root's, whose parameters stay gathered after a trial's forward pass unless they are put back.
    model = sharded(layers=False)
    found = train(model, ball(model.parameters()), part, range(8))
    assert found == pytest.approx(radii, rel=1e-7), (found, radii)
    same(whole(expected), whole(model))


def shards_are_uneven_and_empty(folder: Path) -> None:
    sizes = [p.to_local().numel() for p in sharded().parameters()]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, sizes)
    if dist.get_world_size() == 4:
        assert any(0 in rank for rank in every), every
    assert any(len({rank[i] for rank in every}) > 1 for i in range(len(sizes))), every


def refusals_when_built(folder: Path) -> None:
    """What cannot work on shards says so before the first step, and the finite differences that it offers are taken."""
    params = list(sharded().parameters())
    products = (
        hutchinson,
        TrustRegionNewton,
        AdaHessian,
        SophiaH,
        lambda p: SecondOrder(p, curvature=Hessian(), trust_region=TrustRegion(L2Ball(), SteihaugCG())),
    )
    for make in products:
        try:
            make(params)
        except ValueError as error:
            assert 'hvp="finite-difference"' in str(error)  # noqa: PT017
        else:
            raise AssertionError("Hessian products of sharded parameters were not refused")
    for offered in BY_DIFFERENCES:
        offered(params)
    for region in (Box(), RmsBox(), Unbounded()):
        try:
            SecondOrder(params, curvature=Hessian(hvp="finite-difference"), trust_region=TrustRegion(region))
        except ValueError as error:
            assert "asks more of Hessian than products" in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"{type(region).__name__} with products of shards was not refused")
    model = sharded()
    for name in (
        "muon",
        "kfac",
        "ekfac",
        "shampoo",
        "soap",
        "hessian-free",
        "lamb",
        "sophia-g",
        "natural-gradient",
    ):
        try:
            build(model, name)
        except ValueError as error:
            assert "shard" in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"{name} on shards was not refused")
    build(network(), "muon")
