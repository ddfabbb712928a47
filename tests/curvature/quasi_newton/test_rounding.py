"""Pairs whose numbers are rounding: what float32 leaves of short steps and of products that cancel teaches nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from curvature import LBFGS, LSR1, Observation
from tests.curvature.spectrum import matrices

SIZE = 8


def feed(estimator: Any, H: Tensor, steps: list[Tensor], dtype: torch.dtype) -> Any:
    x = torch.ones(SIZE, dtype=torch.float64)
    state = estimator.init([torch.zeros(SIZE, dtype=dtype)])
    for s in [torch.zeros(SIZE, dtype=torch.float64), *steps]:
        x = x + s
        estimator.update(state, Observation([(H @ x).to(dtype)], step_change=[s.to(dtype)]))
    return state


def directions(count: int, length: float, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [length * torch.randn(SIZE, generator=g, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("make", [LBFGS, LSR1, lambda history: LBFGS(history, safeguard="powell")])
def test_a_step_whose_gradient_change_is_rounding_teaches_nothing(make: Any) -> None:
    H = matrices.symmetric(torch.linspace(1.0, 2.0, SIZE))
    estimator = make(20)
    state = feed(estimator, H, [*directions(3, 0.1), *directions(5, 1e-8, seed=1)], torch.float32)
    assert int((state["age"] >= 0).sum()) == 3
    values = torch.linalg.eigvalsh(estimator.operator(state).to_dense())
    assert values[0] > 0.5
    assert values[-1] < 2.5


def test_scaled_curvature_is_not_taken_from_a_pair_without_curvature() -> None:
    estimator = LSR1(history=4)
    state = estimator.init([torch.zeros(2, dtype=torch.float64)])
    H = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    x = torch.zeros(2, dtype=torch.float64)
    for s in ([0.0, 0.0], [1.0, 1.0], [1.0, 1e-13]):  # sᵀHs = 2, then 2e-13
        x = x + torch.tensor(s, dtype=torch.float64)
        estimator.update(state, Observation([H @ x], step_change=[torch.tensor(s, dtype=torch.float64)]))
    assert estimator.operator(state).shift == 1.0  # of the first pair
