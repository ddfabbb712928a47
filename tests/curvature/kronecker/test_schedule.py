"""Eigendecompositions take turns: after the first step none pays for all layers, and no basis grows old."""

from __future__ import annotations

import itertools
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
    last = {b.root: 0 for b in layout.blocks}  # all are built in step 0
    full = 4 * interval + interval  # a round is a quarter of the run before it, until it has its full length
    for step in range(1, 12 * interval + 10):
        due = [b.root for b in learning.due_blocks(layout, step, interval, set())]
        length = learning.round_of(step, interval)[1]
        assert length == interval or step < full
        assert len(due) <= -(-layers // length)
        for root in due:
            # once a round, and one that lasts no longer than a quarter of the run before it
            assert step - last[root] <= 2 * interval - 1
            assert step - last[root] <= max(step / 2, 1)
            last[root] = step
        if step > full:
            assert all(step - at < 2 * interval for at in last.values())
    for step in range(full + interval, full + 3 * interval):  # with rounds alike, the interval is exact
        assert [b.root for b in learning.due_blocks(layout, step, interval, set())] == [
            b.root for b in learning.due_blocks(layout, step + interval, interval, set())
        ]


def test_early_rounds_are_short_and_grow_by_a_quarter() -> None:
    starts = [step for step in range(200) if learning.round_of(step, 20)[0] == step]
    assert starts[:14] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22]
    assert all(b - a == 20 for a, b in itertools.pairwise(starts) if a >= 80)
    assert [step for step in range(40) if learning.round_of(step, 1)[0] == step] == list(range(40))


def test_a_round_visits_every_slot_once() -> None:
    for slots, length in ((1, 7), (3, 7), (7, 7), (5, 12), (1, 1)):
        found = [learning.slot_of(place, slots, length) for place in range(length)]
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
    """Eight layers, interval 4, 16 matrices: all of them a step at first, four a step from step 20 on."""
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
    for step in range(33):
        counted.append(0)
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        outputs = model(x)
        loss = functional.mse_loss(outputs, x)
        optimizer.backward(loss, outputs)
        optimizer.step()
    assert counted[:8] == [16] * 8
    assert counted[8:12] == [8] * 4  # rounds of two steps
    assert counted[20:] == [4] * 13


def test_a_layer_that_trains_later_has_its_basis_at_once() -> None:
    """A basis must be there when it is first used: a layer that gets its first gradient later adds its own."""
    layout = layout_of(6)
    turn = [b.root for b in learning.due_blocks(layout, 17, 6, set())]
    late = next(b.root for b in layout.blocks if b.root not in turn)
    assert {b.root for b in learning.due_blocks(layout, 17, 6, {late})} == {*turn, late}
