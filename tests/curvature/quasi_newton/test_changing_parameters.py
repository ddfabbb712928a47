"""Gradients that come and go, and parameters that an optimizer is given later: no pair and no basis mixes them up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import LBFGS, LSR1, LowRank
from optimizers import SecondOrder
from tests.curvature import dense
from tests.curvature.spectrum import matrices
from trust_region.registry import trust_regions

SIZES = (3, 4)
H = matrices.symmetric(torch.linspace(0.5, 2.0, sum(SIZES)), seed=5)


class Quadratic:
    """½ θᵀHθ of two parameters, of which ``given`` are the optimizer's at first."""

    def __init__(self, curvature: Any, given: int = 2) -> None:
        g = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(n, generator=g, dtype=torch.float64)) for n in SIZES]
        region = trust_regions["unbounded"](damping=1.0)
        self.optimizer = SecondOrder(
            self.params[:given], lr=0.05, curvature=curvature, trust_region=region, momentum=0.5
        )

    def step(self, second_has_gradient: bool = True) -> None:
        for p in self.params:
            p.grad = None
        theta = torch.cat(list(self.params))
        self.optimizer.backward(0.5 * theta @ H @ theta, theta)
        if not second_has_gradient:
            self.params[1].grad = None
        self.optimizer.step()

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer._curvature_state

    def pairs(self) -> tuple[Tensor, Tensor]:
        held = self.state["age"] >= 0
        steps, changes = (torch.cat(list(self.state[k]), 1)[held] for k in ("steps", "gradient_changes"))
        return steps, changes


@pytest.mark.parametrize("make", [LBFGS, LSR1])
@pytest.mark.parametrize(
    ("pattern", "kept"), [([1, 1, 1, 1], 3), ([1, 1, 0, 1, 1], 2), ([1, 0, 1, 0, 1], 0), ([0, 1, 1], 1)]
)
def test_a_pair_spans_steps_with_the_same_gradients_only(make: Any, pattern: list[int], kept: int) -> None:
    problem = Quadratic(make(history=10))
    for has in pattern:
        problem.step(bool(has))
    steps, changes = problem.pairs()
    assert len(steps) == kept
    torch.testing.assert_close(changes, steps @ H, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [LBFGS, LSR1])
def test_steps_of_one_parameter_alone_are_pairs_of_its_own_block(make: Any) -> None:
    problem = Quadratic(make(history=10))
    for has in (1, 0, 0, 0):
        problem.step(bool(has))
    steps, changes = problem.pairs()
    assert len(steps) == 2
    n = SIZES[0]
    torch.testing.assert_close(changes[:, :n], steps[:, :n] @ H[:n, :n], rtol=0, atol=1e-12)
    assert not steps[:, n:].any()
    assert not changes[:, n:].any()


@pytest.mark.parametrize("make", [LBFGS, LSR1])
def test_a_group_added_later_makes_no_pair_with_what_came_before(make: Any) -> None:
    problem = Quadratic(make(history=10), given=1)
    for _ in range(2):
        problem.step()
    problem.optimizer.add_param_group({"params": problem.params[1:]})
    for _ in range(3):
        problem.step()
    steps, changes = problem.pairs()
    assert len(steps) == 3  # one of the first parameter alone, none over the border, two of both
    torch.testing.assert_close(changes[1:], steps[1:] @ H, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["nystrom", "lanczos"])
def test_low_rank_takes_more_parameters_than_it_began_with(method: Any) -> None:
    problem = Quadratic(LowRank(rank=5, method=method, interval=1), given=1)
    problem.step()
    before = problem.optimizer.curvature.operator(problem.state)
    n = SIZES[0]
    # the loss's outputs are θ itself, so Gauss-Newton is H; rank 5 holds all of the first three elements
    assert dense.relative_error(before.to_dense(), H[:n, :n]) < 1e-6
    [x] = before.solve(
        [torch.ones(n, dtype=torch.float64)], 0.0
    )  # nothing lies across: no singular remainder
    assert dense.relative_error(H[:n, :n] @ x, torch.ones(n, dtype=torch.float64)) < 1e-6
    problem.optimizer.add_param_group({"params": problem.params[1:]})
    for _ in range(20):  # a subspace iteration for Nyström
        problem.step()
    found = torch.linalg.eigvalsh(problem.optimizer.curvature.operator(problem.state).to_dense())
    assert dense.relative_error(found[-5:], torch.linalg.eigvalsh(H)[-5:]) < 2e-2
