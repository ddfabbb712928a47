"""The in-place step in a rotated basis equals the general path, which writes every vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature import tensor_blocks
from optimizers import SOAP, SecondOrder, rotated_step
from optimizers.momentum import PlainMean
from trust_region import FixedRadius, TrustRegion, Unbounded

FIELDS = ("predicted_reduction", "step_norm", "damping", "radius")

CASES: dict[str, Callable[[list[Tensor]], SecondOrder]] = {
    "soap": lambda p: SOAP(p, lr=torch.tensor(0.03, dtype=torch.float64), weight_decay=0.1, interval=3),
    "one side": lambda p: SOAP(p, lr=0.03, interval=2, max_dim=6, rotate_vectors=True),
    "damping and a plain mean": lambda p: SecondOrder(
        p,
        lr=0.05,
        curvature=curvature.SOAP(interval=2),
        trust_region=TrustRegion(region=Unbounded(), radius=FixedRadius(damping=0.2)),
        momentum=PlainMean(0.5),
    ),
}


def trained(make: Callable[[list[Tensor]], SecondOrder]) -> tuple[list[Tensor], list[list[float]]]:
    """Under given gradients: those of a loss would carry rounding into the null space of a factor, where any basis is
    as good as another."""
    torch.manual_seed(0)
    params: list[Tensor] = [nn.Parameter(torch.randn(s).double()) for s in ((5, 2, 3), (5,), (3, 15), ())]
    optimizer, told = make(params), []
    for _ in range(7):
        for p in params:
            p.grad = torch.randn(p.shape).double()
        optimizer.step()
        told.append([float(optimizer.step_info[name]) for name in FIELDS])
    state = [m for p in params for m in optimizer.state[p].values() if isinstance(m, Tensor)]
    return [*(p.detach() for p in params), *state], told


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_general_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    step_ = rotated_step.step_
    monkeypatch.setattr(rotated_step, "step_", lambda *a: taken.append(1) or step_(*a))
    fast, fast_told = trained(CASES[name])
    assert len(taken) == 7
    monkeypatch.setattr(rotated_step, "suits", lambda *a: False)
    general, told = trained(CASES[name])
    for a, b in zip(fast, general, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.tensor(fast_told), torch.tensor(told), rtol=1e-6, atol=1e-10)


def test_a_gram_matrix_in_strips_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(11, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(tensor_blocks, "STRIPED", 4)  # strips of 3, 3, 3 and 2 rows
    for dim in range(3):
        found = tensor_blocks.gram(x, dim)
        flat = x.movedim(dim, 0).flatten(1)
        torch.testing.assert_close(found, flat @ flat.mT, rtol=1e-13, atol=1e-13)
