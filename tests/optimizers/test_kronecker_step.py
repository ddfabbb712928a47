"""K-FAC's in-place step equals the general path, which writes every vector."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from optimizers import KFAC, SecondOrder, kronecker_step
from optimizers.momentum import RunningMean
from trust_region import FixedRadius, KLBall, TrustRegion

FIELDS = ("predicted_reduction", "step_norm", "damping", "radius")


class Model(nn.Module):
    """Layers of every kind: with few rows, with more, without bias, over positions, a convolution, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.mixed = nn.Conv1d(6, 8, 3, groups=2)
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(24, 30)
        self.narrow = nn.Linear(30, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.mixed(self.embedding(x).mT).mT)
        out: Tensor = self.narrow(self.wide(hidden.flatten(1)).tanh())
        return out


def trained(make: Any, monkeypatch: pytest.MonkeyPatch, *, in_place: bool) -> tuple[list[Tensor], list[Any]]:
    torch.manual_seed(0)
    model, told, taken = Model().double(), [], []
    step_ = kronecker_step.step_
    with monkeypatch.context() as patch:
        patch.setattr(kronecker_step, "step_", lambda *a: taken.append(1) or step_(*a))
        if not in_place:
            patch.setattr(kronecker_step, "suits", lambda *a: False)
        optimizer = make(model)
        for step in range(30):
            g = torch.Generator().manual_seed(step)
            x, y = torch.randint(0, 7, (4, 5), generator=g), torch.randint(0, 5, (4,), generator=g)
            optimizer.zero_grad()
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, y)
            optimizer.backward(loss, outputs)
            optimizer.step()
            told.append([float(optimizer.step_info[name]) for name in FIELDS])
    assert len(taken) == (30 if in_place else 0)
    state = [
        x
        for s in optimizer.state.values()
        for k, x in sorted(s.items())
        if isinstance(x, Tensor) and x.numel()
    ]
    return [*(p.detach() for p in model.parameters()), *state], told


def grouped(model: nn.Module) -> SecondOrder:
    """Two groups with their own β and decay, and one η, a tensor."""
    wide = set(model.wide.parameters())  # type: ignore[union-attr]
    rest = [p for p in model.parameters() if p not in wide]
    eta = torch.tensor(0.3, dtype=torch.float64)
    groups = [{"params": list(wide), "momentum": 0.5, "weight_decay": 0.1}, {"params": rest}]
    return KFAC(model, lr=eta, damping="fixed", params=groups)


CASES: dict[str, Any] = {
    "inside": lambda m: KFAC(m, lr=0.05, damping="fixed", radius=1e6),
    "clipped": lambda m: KFAC(m, lr=1.0, damping="fixed", radius=1e-3, weight_decay=0.1),
    "groups": grouped,
    "forward-only": lambda m: KFAC(m, lr=0.3, damping="fixed", fisher="forward-only"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_general_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, fast_told = trained(CASES[name], monkeypatch, in_place=True)
    general, told = trained(CASES[name], monkeypatch, in_place=False)
    for a, b in zip(fast, general, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.tensor(fast_told), torch.tensor(told), rtol=1e-9, atol=1e-12)


def test_clipped_steps_have_the_length_of_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction of a step on the boundary is √Δ √E - ½ Δ with E its length before: more than ½ Δ."""
    _, told = trained(CASES["clipped"], monkeypatch, in_place=True)
    assert all(prediction > 0.5e-3 for prediction, *_ in told)
    _, told = trained(CASES["inside"], monkeypatch, in_place=True)
    assert all(prediction < 0.5e6 for prediction, *_ in told)


def region(**options: Any) -> TrustRegion:
    """A KL ellipsoid of fixed size."""
    ball = KLBall(**{"includes_lr": True, "includes_damping": True, **options})
    return TrustRegion(region=ball, radius=FixedRadius(0.03, damping=0.03))


def composed(model: nn.Module, **options: Any) -> SecondOrder:
    """K-FAC put together by hand."""
    parts: dict[str, Any] = {
        "curvature": curvature.KFAC(model, fisher="mc", damping_kind="factored", inverse_interval=5),
        "trust_region": region(),
        "momentum": RunningMean(0.9),
        "lr": 0.3,
    }
    return SecondOrder(model.parameters(), **{**parts, **options})


OTHERS: dict[str, Any] = {
    "no damping in the measure": lambda m: composed(m, trust_region=region(includes_damping=False)),
    "no η in the measure": lambda m: composed(m, trust_region=region(includes_lr=False)),
    "damping that adapts": lambda m: KFAC(m, damping="lagged"),
    "no momentum": lambda m: KFAC(m, damping="fixed", momentum=0.0),
    "exact damping": lambda m: KFAC(m, damping="fixed", damping_kind="exact"),
    "different η": lambda m: KFAC(
        m,
        damping="fixed",
        params=[{"params": [p], "lr": 0.1 if p.dim() == 2 else 0.2} for p in m.parameters()],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_compositions_take_the_general_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_step, "step_", lambda *a: pytest.fail("taken in place"))
    model = Model().double()
    optimizer = OTHERS[name](model)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(torch.randint(0, 7, (4, 5)))
        optimizer.backward(outputs.square().mean(), outputs)
        optimizer.step()


def test_composed_by_hand_it_is_taken_too(monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = trained(composed, monkeypatch, in_place=True)
    other, _ = trained(composed, monkeypatch, in_place=False)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_parameter_without_a_gradient_takes_the_general_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_step, "step_", lambda *a: pytest.fail("taken in place"))
    model = Model().double()
    optimizer = KFAC(model, damping="fixed")
    outputs = model(torch.randint(0, 7, (4, 5)))
    optimizer.backward(nn.functional.cross_entropy(outputs, torch.zeros(4, dtype=torch.long)), outputs)
    model.norm.bias.grad = None
    before = copy.deepcopy(model.norm.bias)
    optimizer.step()
    assert torch.equal(before, model.norm.bias)
