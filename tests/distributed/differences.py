"""Hessian products by differences of gradients, which work where a graph has no double backward."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.problem import (
    BY_DIFFERENCES,
    DIFFERENCES,
    alone,
    network,
    part,
    same,
    sharded,
    train,
    whole,
)


def wrapped(kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(network())
    return sharded(layers=kind == "layers")


def equal_one_process(folder: Path) -> None:
    """The same radii, decisions and steps as one process takes, under DDP and FSDP2."""
    start = [p.detach() for p in whole(network())]
    for make in BY_DIFFERENCES:
        expected, radii, _ = alone(make, 6)
        for kind in ("ddp", "layers", "root"):
            model = wrapped(kind)
            found = train(model, make(model.parameters()), part, range(6))
            try:
                assert found == pytest.approx(radii, rel=DIFFERENCES, nan_ok=True), (found, radii)
                same(whole(expected), whole(model), DIFFERENCES)
            except AssertionError as error:
                raise AssertionError(f"{make.__name__}, {kind}: {error}") from error
            moved = max(float((p.detach() - q).abs().max()) for p, q in zip(whole(model), start, strict=True))
            assert moved > 1e-2, (make.__name__, moved)
