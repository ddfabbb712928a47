"""``torch.distributed.checkpoint`` of sharded state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.distributed.problem import alone, part, same, sharded, soaa, train, whole


def save(folder: Path) -> None:
    """Saved here, by 2 ranks; loaded by 1 and by 4."""
    model = sharded()
    optimizer = soaa(model.parameters())
    train(model, optimizer, part, range(5))
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        dcp.save({"model": model.state_dict(), "optim": state}, checkpoint_id=folder / f"flat-{flat}")


def load(folder: Path) -> None:
    expected, radii, _ = alone(soaa, 8)
    for flat in (False, True):
        model = sharded()
        optimizer = soaa(model.parameters())
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = {
            "model": model.state_dict(),
            "optim": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.load(state, checkpoint_id=folder / f"flat-{flat}")
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optim"], options=options)
        found = train(model, optimizer, part, range(5, 8))
        assert found == pytest.approx(radii[5:], rel=1e-7), (flat, found, radii)
        same(whole(expected), whole(model))
