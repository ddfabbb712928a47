"""The truncated natural gradient in its ellipsoid, and what a trust region refuses when nothing judges the step."""

from __future__ import annotations

import pytest
import torch

from curvature import DiagonalOperator, vectors
from trust_region import (
    Box,
    FixedRadius,
    KLBall,
    KLConjugateGradient,
    L2Ball,
    LevenbergMarquardt,
    RatioRadius,
    SteihaugCG,
    StepContext,
    TrustRegion,
    Unbounded,
)
from trust_region.testing import MatrixOperator


def problem(seed: int, size: int = 12) -> tuple[list[torch.Tensor], MatrixOperator]:
    generator = torch.Generator().manual_seed(seed)
    like = [torch.zeros(3, 2, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)]
    A = torch.randn(size, size, generator=generator, dtype=torch.float64)
    g = vectors.unflatten(torch.randn(size, generator=generator, dtype=torch.float64), like)
    return g, MatrixOperator(A @ A.T, like)


@pytest.mark.parametrize("radius", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_with_all_iterations_it_equals_the_exact_ball(radius: float, damping: float) -> None:
    for seed in range(5):
        g, F = problem(seed)
        bound = torch.tensor(radius, dtype=torch.float64)
        exact = KLBall().minimise({}, g, F, bound, damping, StepContext())
        found = KLConjugateGradient(max_iterations=60, tolerance=1e-13).solve(g, F, bound, damping)
        assert bool(found.on_boundary) == bool(exact.on_boundary)
        for a, b in zip(found.step, exact.step, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_every_truncation_lies_inside_and_reduces_the_model(iterations: int) -> None:
    for seed in range(5):
        g, F = problem(seed)
        for radius in (1e-3, 1.0):
            found = KLConjugateGradient(max_iterations=iterations).solve(g, F, torch.tensor(radius))
            energy = float(vectors.dot(found.step, F.matvec(found.step)))
            assert energy <= radius * (1 + 1e-6)
            assert not bool(found.on_boundary) or energy == pytest.approx(radius, rel=1e-6)
            assert float(vectors.dot(g, found.step)) + 0.5 * energy < 0
            for a, b in zip(found.curvature_step, F.matvec(found.step), strict=True):
                torch.testing.assert_close(a, b)


def test_an_indefinite_curvature_is_refused() -> None:
    g = [torch.ones(2, dtype=torch.float64)]
    B = DiagonalOperator([torch.tensor([1.0, -3.0], dtype=torch.float64)])
    with pytest.raises(ValueError, match="needs positive semi-definite curvature"):
        KLConjugateGradient().solve(g, B, torch.tensor(1.0))


def test_it_works_in_its_ellipsoid_only() -> None:
    with pytest.raises(ValueError, match="inside KLBall only, got L2Ball"):
        TrustRegion(region=L2Ball(), subproblem=KLConjugateGradient())


def test_damping_beside_a_policy_without_one_makes_a_singular_curvature_solvable() -> None:
    trust = TrustRegion(region=Box(), radius=RatioRadius(initial_radius=100.0), damping=0.5)
    g = [torch.tensor([1.0, 2.0])]
    state = trust.init(g)
    proposal = trust.propose(state, g, MatrixOperator(torch.diag(torch.tensor([0.0, 1.5])), g))
    torch.testing.assert_close(proposal.step[0], torch.tensor([-2.0, -1.0]))
    assert float(state["damping"]) == 0.5
    with pytest.raises(ValueError, match="has a damping of its own"):
        TrustRegion(radius=LevenbergMarquardt(), damping=0.1)
    with pytest.raises(ValueError, match="damping must be >= 0, got -1"):
        TrustRegion(region=Box(), radius=RatioRadius(), damping=-1.0)


def test_uphill_steps_without_a_region_are_refused_unless_judged() -> None:
    g = [torch.tensor([1.0, 1.0])]
    B = DiagonalOperator([torch.tensor([1.0, -3.0])])
    fixed = TrustRegion(region=Unbounded(), radius=FixedRadius())
    with pytest.raises(ValueError, match="without a region its step goes uphill"):
        fixed.propose(fixed.init(g), g, B)
    matrix = MatrixOperator(torch.diag(torch.tensor([1.0, -0.5])), g)
    with pytest.raises(ValueError, match="without a region its step goes uphill"):
        fixed.propose(fixed.init(g), g, matrix)
    judged = TrustRegion(region=Unbounded(), radius=LevenbergMarquardt(initial_damping=0.01))
    assert float(judged.propose(judged.init(g), g, matrix).predicted_reduction) < 0
    held = TrustRegion(region=L2Ball(), subproblem=SteihaugCG(), radius=FixedRadius())
    assert float(held.propose(held.init(g), g, matrix).predicted_reduction) > 0
