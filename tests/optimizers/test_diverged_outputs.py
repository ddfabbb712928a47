"""Outputs that are not finite: the step is skipped whatever the curvature looks at, and training goes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional

from curvature.registry import estimators
from optimizers import SecondOrder, available
from optimizers.build import takes_model
from trust_region import LevenbergMarquardt, TrustRegion

NAMES = sorted(available()["curvature"])
OPTIONS: dict[str, dict[str, Any]] = {
    "empirical-fisher": {"likelihood": "categorical"},
    "fisher": {"likelihood": "categorical"},
    "fisher-diagonal": {"likelihood": "categorical"},
    "low-rank": {"rank": 3},
}
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(2))


def leaves(x: Any) -> list[Any]:
    if isinstance(x, dict):
        return [y for v in x.values() for y in leaves(v)]
    return [y for v in x for y in leaves(v)] if isinstance(x, list | tuple) else [x]


def same(a: Any, b: Any) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(leaves(a), leaves(b), strict=True)
    )


def curvature_of(optimizer: SecondOrder) -> list[Any]:
    """What the estimator keeps, and the counts of steps."""
    entries = optimizer.state_dict()["state"].values()
    return [
        copy.deepcopy({k: v for k, v in e.items() if k == "step" or k.startswith("curvature")})
        for e in entries
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_step_is_skipped_and_training_goes_on(name: str, at: int, bad: float) -> None:
    """At the first step and later: parameters and curvature stay as they are, and the loss falls afterwards."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    options = dict(OPTIONS.get(name, {}))
    if takes_model(estimators[name]):
        options["model"] = model
    region = TrustRegion(radius=LevenbergMarquardt())
    optimizer = SecondOrder(
        model.parameters(), curvature=estimators[name](**options), trust_region=region, lr=0.1
    )

    def step(factor: float) -> float:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            outputs = model(X * factor)
            loss = functional.cross_entropy(outputs, Y)
            optimizer.backward(loss, outputs)
            return loss

        return float(optimizer.step(closure).detach())

    for _ in range(at):
        step(1.0)
    held, kept = [p.detach().clone() for p in model.parameters()], curvature_of(optimizer)
    step(bad)
    assert all(torch.equal(a, b) for a, b in zip(held, model.parameters(), strict=True))
    assert float(optimizer.step_info.skipped_steps) == 1.0
    if at:
        assert same(kept, curvature_of(optimizer))
    losses = [step(1.0) for _ in range(6)]
    assert losses[-1] < losses[0]
