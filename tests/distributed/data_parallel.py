"""DDP beside one process."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from optimizers import SecondOrder, available, build
from tests.distributed.problem import (
    adamw,
    alone,
    ball,
    batch,
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

#: A factor of low rank has no one eigenbasis; square layers leave at most one dimension without curvature.
SQUARE = (6, 6)
#: Drawn labels of later steps too, and a box wide enough that the diagonal decides some steps.
OPTIONS: dict[str, dict[str, Any]] = {"sophia-g": {"interval": 2, "samples": 2, "rho": 100.0}}


def compositions_equal_one_process(folder: Path) -> None:
    """The radius of every step, and the parameters."""
    for make in (soaa, soaa_by_tensor, adamw, tadam, hutchinson, ball):
        expected, radii, _ = alone(make, 8)
        model = network()
        parallel = DistributedDataParallel(model)
        optimizer = make(parallel.parameters())
        found = train(parallel, optimizer, part, range(8))
        assert found == pytest.approx(radii, rel=1e-7, nan_ok=True), (make.__name__, found, radii)
        same(whole(expected), whole(model))


def presets_equal_one_process(folder: Path) -> None:
    """Every preset; those with drawn labels draw for a sample what one process draws for it.

    No number of ranks divides the batch, and each rank takes its part in micro-batches of its own sizes.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    cases = [(name, OPTIONS.get(name, {})) for name in sorted(available()["optimizers"])]
    cases += [(name, {"fisher": "mc"}) for name in ("kfac", "ekfac")]
    for name, options in cases:
        sizes = SQUARE if name == "soap" else (5, 3)
        expected, model = network(*sizes), network(*sizes)
        reference = build(expected, name, process_group=None, **options)
        parallel = DistributedDataParallel(model)
        optimizer = build(model, name, **options)
        try:
            for t in range(3):
                x, y = (z[:11] for z in batch(t))
                mine = x[rank::world], y[rank::world]
                cut = [1 + rank, len(mine[0]) - 1 - rank]
                own = [tuple(z.split(cut)[i] for z in mine) for i in range(2)]
                step_of_parts(reference, expected, [(x, y)], 1 / len(x))
                # DDP averages over ranks, so that each one's loss is R times its share of the whole mean
                step_of_parts(optimizer, parallel, own, world / len(x))
                for entry in ("loss", "radius"):
                    found, wanted = (float(getattr(o.step_info, entry)) for o in (optimizer, reference))
                    assert found == pytest.approx(wanted, rel=1e-6, nan_ok=True), (entry, found, wanted)
            assert not torch.equal(next(model.parameters()), next(network(*sizes).parameters()))
            same(whole(expected), whole(model), 1e-6)
        except AssertionError as error:
            raise AssertionError(f"{name} {options}: {error}") from error


def step_of_parts(optimizer: SecondOrder, model: nn.Module, parts: list[Any], scale: float) -> None:
    """One step over micro-batches, of which only the last synchronises."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for i, (x, y) in enumerate(parts):
            apart = i < len(parts) - 1
            with model.no_sync() if apart else contextlib.nullcontext():  # type: ignore[operator]
                outputs = model(x)
                loss = scale * nn.functional.cross_entropy(outputs, y, reduction="sum")
                optimizer.backward(loss, outputs)
            total += loss.detach()
        return total

    optimizer.step(closure)


def bad_gradient_on_one_rank_skips_all(folder: Path) -> None:
    for wrap in (DistributedDataParallel, lambda m: sharded()):
        parallel = wrap(network())
        optimizer = soaa(parallel.parameters())
        train(parallel, optimizer, part, range(2))
        before, state = whole(parallel), copy.deepcopy(float(optimizer.step_info.radius))
        x, y = part(2)
        optimizer.zero_grad()
        optimizer.backward(nn.functional.cross_entropy(parallel(x), y))
        if dist.get_rank() == 1:
            grad: Any = next(parallel.parameters()).grad
            getattr(grad, "_local_tensor", grad).fill_(float("nan"))
        optimizer.step()
        same(whole(parallel), before, 0.0)
        assert float(optimizer.step_info.radius) == state
        assert float(optimizer.step_info.skipped_steps) == 1.0


def bad_outputs_on_one_rank_skip_all(folder: Path) -> None:
    """What looks at outputs measures on no rank then: one that did would wait for the others for ever."""
    for name in ("kfac", "ekfac"):
        model = network()
        parallel = DistributedDataParallel(model)
        optimizer = build(model, name, lr=0.1, damping="fixed")
        for step, bad in enumerate((True, False, True, False)):
            x, y = part(step)
            before = whole(parallel)
            optimizer.zero_grad()
            outputs = parallel(x * float("nan") if bad and dist.get_rank() == 1 else x)
            loss = nn.functional.cross_entropy(outputs, y)
            optimizer.backward(loss, outputs)
            optimizer.step()
            assert bool(optimizer.step_info.skipped_steps) or not bad
            moved = [not torch.equal(a, b) for a, b in zip(before, whole(parallel), strict=True)]
            assert not any(moved) if bad else all(moved)


def loss_must_be_given_on_every_rank(folder: Path) -> None:
    model = network()
    optimizer = soaa(DistributedDataParallel(model).parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    loss = 1.0 if dist.get_rank() == 0 else None
    try:
        optimizer.step(loss=loss)
        assert dist.get_rank() == 0, "a missing loss was not noticed"
    except RuntimeError as error:
        assert "every rank" in str(error)  # noqa: PT017
    dist.barrier()
