"""The diagonal step in blocks equals the general path, which writes every vector."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import AdaHessianDiagonal, FisherDiagonal, FlooredDiagonal, HutchinsonDiagonal, RootDiagonal
from optimizers import AdaHessian, SecondOrder, SophiaH, blocked, diagonal_step
from optimizers.compiled import native_diagonal
from optimizers.compiled.native_diagonal import NativeDiagonal
from optimizers.momentum import PlainMean, RunningMean
from optimizers.step_paths import Compile
from trust_region import Box, FixedRadius, TrustRegion, Unbounded

FIELDS = ("predicted_reduction", "step_norm", "damping", "radius")

CASES: dict[str, Callable[[list[Tensor]], SecondOrder]] = {
    "sophia": lambda p: SophiaH(p, lr=0.01, gamma=0.5, rho=0.5, weight_decay=0.1, interval=3),
    "adahessian": lambda p: AdaHessian(p, lr=0.1, weight_decay=0.05),
    "box with damping": lambda p: SecondOrder(
        p,
        lr=0.05,
        curvature=FlooredDiagonal(HutchinsonDiagonal(interval=2), scale=2.0, floor=0.1),
        trust_region=TrustRegion(region=Box(), radius=FixedRadius(0.3, damping=0.2)),
        momentum=PlainMean(0.5),
    ),
    "half power": lambda p: SecondOrder(
        p,
        lr=torch.tensor(0.05),
        curvature=AdaHessianDiagonal(power=0.5),
        trust_region=TrustRegion(region=Unbounded(), radius=FixedRadius(damping=0.1)),
        momentum=RunningMean(0.9),
    ),
}


def trained(
    make: Callable[[list[Tensor]], SecondOrder], dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[list[float]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    x, y = torch.randn(8, 5).to(dtype), torch.randint(0, 3, (8,))
    params: list[Tensor] = list(model.parameters())
    optimizer = make(params)
    told = []
    for _ in range(7):
        optimizer.zero_grad()
        z = model(x)
        optimizer.backward(nn.functional.cross_entropy(z, y), z)
        optimizer.step()
        told.append([float(optimizer.step_info[name]) for name in FIELDS])
    state = [m for p in params for m in optimizer.state[p].values() if isinstance(m, Tensor)]
    return [*(p.detach() for p in params), *state], told


@pytest.mark.parametrize("name", CASES)
def test_blocks_take_the_general_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", 7)  # more than one block a tensor, the last one shorter
    taken: list[Any] = []
    step_ = diagonal_step.step_
    monkeypatch.setattr(diagonal_step, "step_", lambda *a: taken.append(1) or step_(*a))
    fast, fast_told = trained(CASES[name])
    assert len(taken) == 7
    monkeypatch.setattr(diagonal_step, "suits", lambda *a: False)
    general, told = trained(CASES[name])
    for a, b in zip(fast, general, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(torch.tensor(fast_told), torch.tensor(told), rtol=1e-6, atol=1e-10)


NATIVE: dict[str, Callable[[list[Tensor], Compile], SecondOrder]] = {
    "sophia": lambda p, c: SophiaH(p, lr=0.01, gamma=0.5, rho=0.5, weight_decay=0.1, interval=3, compile=c),
    "adahessian": lambda p, c: AdaHessian(
        p, lr=torch.tensor(0.1, dtype=torch.float64), weight_decay=0.05, compile=c
    ),
    "two groups": lambda p, c: SophiaH(
        [{"params": p[:1], "lr": 0.02, "momentum": 0.5, "weight_decay": 0.3}, {"params": p[1:]}],
        lr=0.01,
        compile=c,
    ),
    "root with damping": lambda p, c: SecondOrder(
        p,
        lr=0.05,
        curvature=RootDiagonal(FisherDiagonal("categorical", interval=2)),
        trust_region=TrustRegion(region=Box(), radius=FixedRadius(0.3, damping=0.2)),
        momentum=RunningMean(0.8),
        compile=c,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NATIVE)
def test_a_native_pass_takes_the_general_step(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_diagonal, "CHUNK", 7)  # more than one chunk a tensor, the last one shorter
    taken: list[int] = []
    step_ = NativeDiagonal.step_
    monkeypatch.setattr(NativeDiagonal, "step_", lambda *a: taken.append(1) or step_(*a))
    native, native_told = trained(lambda p: NATIVE[name](p, True), dtype)
    assert len(taken) == 7
    monkeypatch.setattr(diagonal_step, "suits", lambda *a: False)
    general, told = trained(lambda p: NATIVE[name](p, False), dtype)
    assert len(taken) == 7
    close = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(native, general, strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)
    torch.testing.assert_close(
        torch.tensor(native_told), torch.tensor(told), rtol=max(10 * close, 1e-6), atol=close
    )


def test_a_native_pass_leaves_a_step_that_is_not_finite_alone_and_is_seen_by_autograd() -> None:
    w = nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = SophiaH([w], lr=0.1, compile=True)
    optimizer.backward(w.square().sum())
    optimizer.step()
    before, version = w.detach().clone(), w._version
    assert version > 0
    optimizer.backward(w.square().sum())
    w.grad = torch.tensor([1.0, float("nan")])
    optimizer.step()
    assert torch.equal(w.detach(), before)
    assert float(optimizer.step_info["skipped_steps"]) == 1.0


def test_what_has_no_native_pass_is_refused() -> None:
    w = nn.Parameter(torch.ones(2))
    raw = TrustRegion(region=Box(), radius=FixedRadius(1.0))
    with pytest.raises(ValueError, match="compile=True takes"):
        SecondOrder([w], curvature=HutchinsonDiagonal(), trust_region=raw, momentum=0.9, compile=True)
    with pytest.raises(ValueError, match="compile=True takes"):
        AdaHessian([w], hessian_power=0.5, compile=True)
    with pytest.raises(ValueError, match="on a CPU"):
        SophiaH([torch.zeros(2, device="meta", requires_grad=True)], compile=True)


def test_curvature_that_may_be_negative_is_left_to_the_general_path() -> None:
    w = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = SecondOrder(
        [w],
        lr=0.1,
        curvature=HutchinsonDiagonal(),
        trust_region=TrustRegion(region=Box(), radius=FixedRadius(1.0)),
        momentum=0.9,
    )
    optimizer.backward((torch.tensor([1.0, -1.0]) * w**2).sum())
    optimizer.step()
    torch.testing.assert_close(w.data, torch.tensor([1.9, -1.1]))  # the concave element goes to the boundary


def test_a_record_that_is_asked_for_late_is_that_of_its_step() -> None:
    """Not of what a schedule, the loss or a loaded state have changed since."""
    records = []
    for late in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        optimizer = AdaHessian(model.parameters(), lr=0.1)
        saved = optimizer.state_dict()
        optimizer.backward(model(torch.randn(8, 4).double()).square().mean())
        optimizer.step()
        if not late:
            records.append(torch.tensor(list(optimizer.step_info.as_floats().values())))
        optimizer.param_groups[0]["lr"] = 7.0
        optimizer.load_state_dict(copy.deepcopy(saved))
        records.append(torch.tensor(list(optimizer.step_info.as_floats().values())))
    for record in records[1:]:
        torch.testing.assert_close(record, records[0], rtol=0, atol=0, equal_nan=True)
    assert bool((records[0] > 0).any())


def test_an_operator_dies_with_its_last_reference() -> None:
    """Not in a later garbage collection, until which it would hold the values that it formed."""
    gc.disable()
    try:
        operator = RootDiagonal(HutchinsonDiagonal()).operator({"diagonal": [torch.ones(3)]})
        assert operator.diagonal()[0].sum() == 3.0
        seen = weakref.ref(operator)
        del operator
        assert seen() is None
    finally:
        gc.enable()
