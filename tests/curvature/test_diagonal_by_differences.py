"""Hutchinson's diagonal by differences of gradients: beside the exact products, with the same probes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from curvature import AdaHessianDiagonal, FlooredDiagonal, HutchinsonDiagonal, estimate
from optimizers import AdaHessian, SecondOrder, SophiaH
from trust_region import FixedRadius, RmsBox, TrustRegion

#: u^(2/3) of float64 is 4e-11 of ‖H‖‖z‖; entries of the diagonal are smaller than that norm.
ERROR = 1e-7
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(2))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


ESTIMATORS: dict[str, Any] = {
    "rademacher": lambda hvp: HutchinsonDiagonal(probes=3, hvp=hvp),
    "gaussian": lambda hvp: HutchinsonDiagonal(distribution="gaussian", hvp=hvp),
    "averaged": lambda hvp: HutchinsonDiagonal(spatial_average=True, block_size=2, hvp=hvp),
    "adahessian": lambda hvp: AdaHessianDiagonal(probes=2, hvp=hvp),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimate_by_differences_equals_the_exact_one(name: str) -> None:
    """Three batches, the last of them smaller."""
    model = network()
    batches = [(X[:5], Y[:5]), (X[5:10], Y[5:10]), (X[10:], Y[10:])]
    loss_fn = nn.CrossEntropyLoss()
    exact = estimate(ESTIMATORS[name]("reverse"), model, loss_fn, batches).diagonal()
    found = estimate(ESTIMATORS[name]("finite-difference"), model, loss_fn, batches).diagonal()
    scale = max(float(h.abs().max()) for h in exact)
    assert scale > 0.1
    for h, d in zip(exact, found, strict=True):
        torch.testing.assert_close(d, h, rtol=0.0, atol=ERROR * scale)
        assert not torch.equal(d, h) or name == "averaged"  # another computation indeed


OPTIMIZERS: dict[str, Any] = {
    "hutchinson": lambda p, hvp: SecondOrder(
        p,
        lr=1e-2,
        curvature=HutchinsonDiagonal(interval=3, hvp=hvp),
        trust_region=TrustRegion(region=RmsBox(), radius=FixedRadius(1.0)),
        momentum=0.9,
    ),
    "adahessian": lambda p, hvp: AdaHessian(p, lr=1e-2, interval=2, hvp=hvp),
    "sophia-h": lambda p, hvp: SophiaH(p, lr=1e-2, interval=2, hvp=hvp),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_by_differences_equal_the_exact_ones(name: str) -> None:
    models = [network(), network()]
    made = [
        OPTIMIZERS[name](m.parameters(), h)
        for m, h in zip(models, ("reverse", "finite-difference"), strict=True)
    ]
    calls = [0, 0]
    for _ in range(6):
        for i, (model, optimizer) in enumerate(zip(models, made, strict=True)):

            def closure(
                i: int = i, model: nn.Module = model, optimizer: SecondOrder = optimizer
            ) -> torch.Tensor:
                calls[i] += 1
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(X), Y)
                optimizer.backward(loss)
                return loss

            optimizer.step(closure)
    refreshes = 2 if name == "hutchinson" else 3
    assert calls == [6, 6 + 2 * refreshes]  # two gradients a refresh, none between
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flat_loop_is_told_to_use_a_closure(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters(), "finite-difference")
    optimizer.backward(nn.functional.cross_entropy(model(X), Y))
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        optimizer.step()


def test_unknown_way_to_a_product_is_refused() -> None:
    with pytest.raises(ValueError, match="hvp must be 'reverse' or 'finite-difference', got 'forward'"):
        HutchinsonDiagonal(hvp="forward")  # type: ignore[arg-type]
    assert not HutchinsonDiagonal().shardable
    assert FlooredDiagonal(HutchinsonDiagonal(hvp="finite-difference")).shardable
    assert not HutchinsonDiagonal(hvp="finite-difference", spatial_average=True, block_size=2).shardable
