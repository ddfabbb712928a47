"""FSDP2 beside one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from optimizers import build
from tests.distributed.problem import (
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
    model = sharded()
    try:
        hutchinson(model.parameters())
    except ValueError as error:
        assert 'hvp="finite-difference"' in str(error)  # noqa: PT017
    else:
        raise AssertionError("Hessian products of sharded parameters were not refused")
    for name in ("muon", "kfac", "shampoo", "soap", "hessian-free", "lamb"):
        try:
            build(model, name)
        except ValueError as error:
            assert "shard" in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"{name} on shards was not refused")
    build(network(), "muon")
