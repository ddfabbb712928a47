"""A step taken tensor by tensor equals the general one over all tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import EmpiricalFisherDiagonal
from optimizers import LAMB, LARS, Muon, SecondOrder, separate_step
from trust_region import FixedRadius, RelativeBall, TrustRegion

CASES: dict[str, Callable[[list[Tensor]], SecondOrder]] = {
    "lamb": lambda p: LAMB(p, lr=0.05, weight_decay=0.1),
    "lamb, two groups": lambda p: LAMB(
        [{"params": p[:1], "lr": 0.02, "momentum": 0.5}, {"params": p[1:], "maximize": True}], lr=0.1, cap=2.0
    ),
    "lars": lambda p: LARS(p, lr=torch.tensor(0.05), nesterov=True),
    "muon": lambda p: Muon(p[::2], lr=0.05, ns_dtype=None),
    "no root, no momentum": lambda p: SecondOrder(
        p,
        lr=0.1,
        curvature=EmpiricalFisherDiagonal(beta=0.9),
        trust_region=TrustRegion(region=RelativeBall(fill=True), radius=FixedRadius(0.2, damping=1e-3)),
    ),
}


def trained(
    make: Callable[[list[Tensor]], SecondOrder],
) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    x, y = torch.randn(8, 5).double(), torch.randint(0, 3, (8,))
    optimizer = make(list(model.parameters()))
    told = []
    for t in range(7):
        model.zero_grad()
        optimizer.zero_grad()
        optimizer.backward(nn.functional.cross_entropy(model(x), y))
        if t == 3:
            next(model.parameters()).grad = None  # the general path's step, between the others
        optimizer.step()
        told.append(torch.tensor(list(optimizer.step_info.as_floats().values())))
    state = [m for entries in optimizer.state.values() for m in entries.values() if isinstance(m, Tensor)]
    return [*(p.detach() for p in model.parameters()), *state], told


@pytest.mark.parametrize("name", CASES)
def test_tensors_alone_take_the_general_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    step_ = separate_step.step_
    monkeypatch.setattr(separate_step, "step_", lambda *a: taken.append(1) or step_(*a))
    fast, fast_told = trained(CASES[name])
    assert len(taken) == 6
    monkeypatch.setattr(separate_step, "suits", lambda *a: False)
    general, told = trained(CASES[name])
    assert len(taken) == 6
    for a, b in zip(fast, general, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for a, b in zip(fast_told, told, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12, equal_nan=True)


def test_what_may_join_tensors_goes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separate_step, "step_", lambda *a: pytest.fail("not one tensor after another"))
    region = TrustRegion(region=RelativeBall(fill=False), radius=FixedRadius(0.2, damping=1e-3))
    trained(lambda p: SecondOrder(p, lr=0.1, curvature=EmpiricalFisherDiagonal(), trust_region=region))
