"""Trust-region Newton, ARC and CAT on the classical problems, through ``step(closure)`` of the presets."""

from __future__ import annotations

import pytest
import torch

from optimizers.presets import ARC, CAT, TrustRegionNewton
from optimizers.second_order import SecondOrder
from tests.trust_region.more_garbow_hillstrom import PROBLEMS, Problem
from tests.trust_region.rosenbrock import gradient, hessian

STEPS = 200
#: Not solved within 200 trials, each from its standard start. Brown's needs a way of 10⁶ at a radius of at most 1000;
#: Powell's and Penalty II are valleys along which CAT's radius, which changes by 8, is cut at every second step.
UNSOLVED: dict[type[SecondOrder], set[int]] = {TrustRegionNewton: {4}, ARC: {4, 24}, CAT: {3, 24}}


def solve(preset: type[SecondOrder], problem: Problem) -> tuple[torch.Tensor, float]:
    x = torch.nn.Parameter(problem.x0)
    optimizer = preset([x])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem(x)
        optimizer.backward(loss)
        return loss

    norm = float("inf")
    for _ in range(STEPS):
        optimizer.step(closure)
        norm = float(gradient(problem, x).norm())
        if norm <= 1e-8:
            break
    return x.detach(), norm


@pytest.mark.parametrize("preset", UNSOLVED, ids=lambda p: p.__name__)
def test_preset_reaches_a_gradient_of_1e_8_on_all_but_the_worst_scaled(preset: type[SecondOrder]) -> None:
    unsolved = set()
    for problem in PROBLEMS:
        x, norm = solve(preset, problem)
        if norm > 1e-8:
            unsolved.add(problem.number)
            continue
        f = float(problem(x))
        # at a minimum that the paper lists (a gradient of 1e-8 stops Powell's at 1e-9 in a flat valley)
        assert any(f == pytest.approx(m, rel=1e-5, abs=2e-9) for m in problem.minima), (
            f"{problem.name}: f = {f}"
        )
        if problem.number == 18:
            # the start is symmetric in two terms, and so is every product: the minimum within that symmetry,
            # f = 5.66e-3, is a saddle of the whole, which a Krylov space of g does not see
            continue
        lowest = torch.linalg.eigvalsh(hessian(problem, x))
        assert float(lowest[0]) >= -1e-6 * float(lowest[-1]), f"{problem.name}: a saddle"
    assert unsolved <= UNSOLVED[preset]
    assert len(PROBLEMS) - len(unsolved) >= 15


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_problem_starts_away_from_its_minima_with_a_right_gradient(problem: Problem) -> None:
    """The premise: double-backward derivatives agree with differences, and the start is not a solution."""
    x, h = problem.x0, 1e-6
    g = gradient(problem, x)
    assert float(g.norm()) > 1e-5
    for i in range(len(x)):
        unit = torch.zeros_like(x)
        unit[i] = h * max(1.0, abs(float(x[i])))
        difference = float(problem(x + unit) - problem(x - unit)) / (2 * float(unit[i]))
        scale = max(float(g.norm()), abs(float(problem(x))) * 1e-9 / h)
        assert float(g[i]) == pytest.approx(difference, abs=2e-5 * scale, rel=1e-5)
