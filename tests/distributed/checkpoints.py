"""``torch.distributed.checkpoint`` of sharded state, and of state that every rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from optimizers import SecondOrder, build
from tests.distributed.problem import (
    DIFFERENCES,
    adahessian_by_differences,
    ball,
    batch,
    network,
    part,
    same,
    sharded,
    soaa,
    train,
    whole,
)

SAVED, END = 5, 8
Build = Callable[[nn.Module], SecondOrder]


def kronecker(name: str, **options: Any) -> Build:
    """Factors that belong to no parameter's shape, counters that are Python's numbers, drawn labels."""
    return lambda model: build(model, name, inverse_interval=1, radius=1.0, **options)


#: (name, how the model is spread, what trains it, to what precision the ranks agree with one process)
CASES: list[tuple[str, str, Build, float]] = [
    ("soaa", "fsdp", lambda model: soaa(model.parameters()), 1e-9),
    ("ball", "fsdp", lambda model: ball(model.parameters()), 1e-9),
    ("adahessian", "fsdp", lambda model: adahessian_by_differences(model.parameters()), DIFFERENCES),
    ("kfac", "ddp", kronecker("kfac"), 1e-6),
    ("kfac-owner", "ddp", kronecker("kfac", inverses="owner"), 1e-6),
    ("soap", "ddp", lambda model: build(model, "soap", interval=1), 1e-6),
]


def spread(kind: str, sizes: tuple[int, int]) -> nn.Module:
    if kind == "fsdp":
        return sharded()
    return DistributedDataParallel(network(*sizes)) if dist.get_world_size() > 1 else network(*sizes)


def cases() -> Iterator[tuple[str, nn.Module, SecondOrder, tuple[int, int], Build, float]]:
    for name, kind, make, tolerance in CASES:
        sizes = (6, 6) if name == "soap" else (5, 3)  # a factor of low rank has no one eigenbasis
        model = spread(kind, sizes)
        yield f"{name}-{kind}", model, make(getattr(model, "module", model)), sizes, make, tolerance


def save(folder: Path) -> None:
    """Saved here, by 2 ranks; loaded by 1 and by 4."""
    for name, model, optimizer, *_ in cases():
        train(model, optimizer, part, range(SAVED))
        for flat in (False, True):
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            state = get_optimizer_state_dict(model, optimizer, options=options)
            dcp.save(
                {"model": get_model_state_dict(model), "optim": state},
                checkpoint_id=folder / f"{name}-flat-{flat}",
            )


def load(folder: Path) -> None:
    """The run goes on as one that one process made without a stop."""
    for flat in (False, True):
        for name, model, optimizer, sizes, make, tolerance in cases():
            expected = network(*sizes)
            reference = make(expected)
            reference.process_group = None
            radii = train(expected, reference, batch, range(END))
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            state: dict[str, Any] = {
                "model": get_model_state_dict(model),
                "optim": get_optimizer_state_dict(model, optimizer, options=options),
            }
            dcp.load(state, checkpoint_id=folder / f"{name}-flat-{flat}")
            set_model_state_dict(model, state["model"])
            optimizer = make(getattr(model, "module", model))  # dcp.load wrote into the state of the other
            set_optimizer_state_dict(model, optimizer, state["optim"], options=options)
            found = train(model, optimizer, part, range(SAVED, END))
            try:
                assert found == pytest.approx(radii[SAVED:], rel=max(tolerance, 1e-7), nan_ok=True), (
                    found,
                    radii,
                )
                same(whole(expected), whole(model), tolerance)
            except AssertionError as error:
                raise AssertionError(f"{name}, flat={flat}: {error}") from error
