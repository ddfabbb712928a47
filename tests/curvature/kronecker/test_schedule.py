"""Eigendecompositions take turns: after the first step none pays for all layers, and no basis grows old."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import optimizers
from curvature.kronecker import learning
from curvature.kronecker.layout import Layout, build_layout
from tests.curvature import dense


def layout_of(layers: int) -> Layout:
    model = nn.Sequential(*[nn.Linear(2 + k % 3, 2 + (k + 1) % 3) for k in range(layers)])
    return build_layout(model, dense.trainable(model))


CASES = [(1, 1), (1, 5), (4, 1), (4, 20), (6, 4), (8, 8), (7, 3), (30, 20), (41, 20)]


@pytest.mark.parametrize(("layers", "interval"), CASES)
def test_no_step_refreshes_more_than_its_share_and_every_basis_has_its_turn(
    layers: int, interval: int
) -> None:
    layout = layout_of(layers)
    share = -(-layers // interval)
    last = {b.root: 0 for b in layout.blocks}  # all are built in step 0
    for step in range(1, 12 * interval + 10):
        due = [b.root for b in learning.due_blocks(layout, step, interval, set())]
        assert len(due) <= share
        for root in due:
            # once a round; rounds last at most the interval, and half of the run so far
            assert step - last[root] <= interval
            assert step - last[root] <= max(step / 2, -(-layers // share)) + 1
            last[root] = step
        assert all(step - at < interval for at in last.values())


def test_a_round_visits_every_slot_once() -> None:
    for slots, interval in ((1, 7), (3, 7), (7, 7), (5, 12)):
        start = 1 + 400 * interval
        first = next(
            s for s in range(start, start + interval + 1) if learning.slot_of(s, slots, interval) == 0
        )
        found = [learning.slot_of(s, slots, interval) for s in range(first, first + interval)]
        assert [k for k in found if k is not None] == list(range(slots))


def test_turns_share_the_work_as_well_as_the_number() -> None:
    costs = [8.0, 1.0, 1.0, 6.0, 1.0, 1.0]
    turn = learning.turns(costs, 3)
    assert sorted(turn.count(s) for s in range(3)) == [2, 2, 2]
    load = [sum(c for c, t in zip(costs, turn, strict=True) if t == s) for s in range(3)]
    assert max(load) == 9.0  # the largest layer and one small one: no split in pairs has less


@pytest.mark.parametrize(
    ("name", "call", "options"),
    [
        ("kfac", "eigh", {"damping_kind": "exact"}),
        ("kfac", "cholesky_ex", {"damping_kind": "factored"}),
        ("ekfac", "eigh", {}),
    ],
)
def test_decompositions_counted_in_training(
    name: str, call: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight layers, interval 4, 16 matrices: the first step builds all of them, every other four."""
    counted: list[int] = []
    real = getattr(torch.linalg, call)

    def counting(x: torch.Tensor, *args: Any) -> Any:
        counted[-1] += x.shape[0] if x.dim() == 3 else 1
        return real(x, *args)

    monkeypatch.setattr(torch.linalg, call, counting)
    model = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(4, 4), nn.Tanh())])
    optimizer = optimizers.build(
        model, name, damping="fixed", fisher="type-2", inverse_interval=4, factor_interval=1, **options
    )
    for step in range(25):
        counted.append(0)
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        outputs = model(x)
        loss = functional.mse_loss(outputs, x)
        optimizer.backward(loss, outputs)
        optimizer.step()
    assert counted[0] == 16
    assert max(counted[1:]) == 4
    assert all(sum(counted[s : s + 4]) == 16 for s in range(1, 21, 4))


def test_a_layer_that_trains_later_has_its_basis_at_once() -> None:
    """A basis must be there when it is first used: a layer that gets its first gradient later adds its own."""
    layout = layout_of(6)
    turn = [b.root for b in learning.due_blocks(layout, 17, 6, set())]
    late = next(b.root for b in layout.blocks if b.root not in turn)
    assert {b.root for b in learning.due_blocks(layout, 17, 6, {late})} == {*turn, late}
