"""Laws of the subproblem solvers on random symmetric matrices of any signature, the hard case included."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import trust_region as tr
from curvature import DiagonalOperator, vectors
from trust_region.secular import minimise_cubic, minimise_in_ball
from trust_region.testing import MatrixOperator, reduction

law = settings(max_examples=150, deadline=None, derandomize=True)

eigenvalue = st.one_of(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 1e-3, 1e3]), st.floats(-10, 10))


@dataclass
class Problem:
    B: Tensor
    g: Tensor
    radius: float
    damping: float

    @property
    def operator(self) -> MatrixOperator:
        return MatrixOperator(self.B, [self.g])

    @property
    def Δ(self) -> Tensor:
        return torch.tensor(self.radius, dtype=torch.float64)


@st.composite
def problems(draw: Any, definite: bool = False, hard: bool | None = None, max_size: int = 7) -> Problem:
    """B = QΛQᵀ with Q from a seeded generator; ``hard`` takes the lowest eigenspace out of the gradient."""
    size = draw(st.integers(2, max_size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    eigenvalues = torch.tensor(draw(st.lists(eigenvalue, min_size=size, max_size=size)), dtype=torch.float64)
    if definite:
        eigenvalues = eigenvalues.abs() + 1e-3
    eigenvalues = eigenvalues.sort().values
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    coefficients = torch.randn(size, generator=generator, dtype=torch.float64) * 10.0 ** draw(
        st.integers(-3, 3)
    )
    if hard if hard is not None else draw(st.booleans()):
        coefficients[eigenvalues <= eigenvalues[0] + 1e-9] = 0.0
    if float(coefficients.norm()) == 0:
        coefficients[-1] = 1.0
    B = Q @ torch.diag(eigenvalues) @ Q.T
    radius = 10.0 ** draw(st.integers(-3, 3))
    return Problem(0.5 * (B + B.T), Q @ coefficients, radius, draw(st.sampled_from([0.0, 0.0, 0.5])))


@law
@given(problems())
def test_exact_subproblem_satisfies_the_conditions_of_more_and_sorensen(problem: Problem) -> None:
    found = tr.ExactSubproblem().solve([problem.g], problem.operator, problem.Δ, problem.damping)
    p, mu = found.step[0], float(found.diagnostics["multiplier"])  # type: ignore[arg-type]
    H = problem.B + problem.damping * torch.eye(len(p), dtype=torch.float64)
    scale = float(torch.linalg.matrix_norm(H, 2)) + mu
    norm = float(p.norm())
    assert mu >= 0
    assert norm <= problem.radius * (1 + 1e-12)
    # B + λI + μI ⪰ 0
    assert float(torch.linalg.eigvalsh(H)[0]) + mu >= -1e-12 * scale
    # stationarity, relative to the two sides of the equation
    residual = float(((H @ p) + mu * p + problem.g).norm())
    assert residual <= 1e-8 * (scale * norm + float(problem.g.norm()))
    # complementarity
    assert mu * (problem.radius - norm) <= 1e-8 * max(mu * problem.radius, 1e-300)
    assert float(found.residual) == pytest.approx(
        residual, abs=1e-8 * (scale * norm + float(problem.g.norm()))
    )  # type: ignore[arg-type]


@law
@given(problems(hard=True), st.floats(1.01, 100.0))
def test_exact_subproblem_solves_the_hard_case(problem: Problem, factor: float) -> None:
    eigenvalues, Q = torch.linalg.eigh(problem.B)
    lowest = float(eigenvalues[0])
    c = Q.T @ problem.g
    above = eigenvalues > lowest + 1e-6
    assume(lowest < -1e-6 and float(c[~above].norm()) < 1e-12 * float(c.norm()))
    p_rest = -(c[above] / (eigenvalues[above] - lowest))
    radius = factor * max(float(p_rest.norm()), 1e-3)
    Δ = torch.tensor(radius, dtype=torch.float64)
    p = tr.ExactSubproblem().solve([problem.g], problem.operator, Δ).step[0]
    # the closed form: the rest, plus as much of the lowest eigenspace as reaches the boundary
    best = -(float(c[above] @ p_rest) + 0.5 * float(eigenvalues[above] @ p_rest**2)) - 0.5 * lowest * (
        radius**2 - float(p_rest @ p_rest)
    )
    assert reduction([problem.g], problem.operator, [p]) == pytest.approx(best, rel=1e-6)
    assert float(p.norm()) == pytest.approx(radius, rel=1e-9)


@law
@given(problems())
def test_no_solver_is_worse_than_cauchy_or_better_than_exact(problem: Problem) -> None:
    def reduced(solver: Any) -> float:
        found = solver.solve([problem.g], problem.operator, problem.Δ, problem.damping)
        p = found.step[0]
        assert float(p.norm()) <= problem.radius * (1 + 1e-10)
        return reduction([problem.g], problem.operator, [p]) - 0.5 * problem.damping * float(p @ p)

    cauchy, best = reduced(tr.CauchyPoint()), reduced(tr.ExactSubproblem())
    assert cauchy > 0
    for solver in (tr.SteihaugCG(), tr.SteihaugCG(tolerance=1e-12), tr.Krylov(), tr.Krylov(tolerance=1e-13)):
        mine = reduced(solver)
        assert cauchy * (1 - 1e-9) <= mine <= best * (1 + 1e-9), solver


@law
@given(problems(definite=True))
def test_dogleg_lies_between_cauchy_and_exact_for_definite_curvature(problem: Problem) -> None:
    def reduced(solver: Any) -> float:
        found = solver.solve([problem.g], problem.operator, problem.Δ, problem.damping)
        p = found.step[0]
        assert float(p.norm()) <= problem.radius * (1 + 1e-9)
        torch.testing.assert_close(
            found.curvature_step[0], problem.B @ p, rtol=1e-6, atol=1e-6 * float(problem.g.norm())
        )
        return reduction([problem.g], problem.operator, [p]) - 0.5 * problem.damping * float(p @ p)

    assert reduced(tr.CauchyPoint()) * (1 - 1e-9) <= reduced(tr.Dogleg())
    assert reduced(tr.Dogleg()) <= reduced(tr.ExactSubproblem()) * (1 + 1e-8)


@law
@given(problems(hard=False), st.sampled_from([None, 0.3, 1e-10]), st.integers(1, 20))
def test_conjugate_gradients_report_the_residual_and_the_product(
    problem: Problem, tolerance: float | None, iterations: int
) -> None:
    solver = tr.SteihaugCG(max_iterations=iterations, tolerance=tolerance)
    found = solver.solve([problem.g], problem.operator, problem.Δ, problem.damping)
    p = found.step[0]
    scale = float(problem.g.norm()) + float(torch.linalg.matrix_norm(problem.B, 2)) * float(p.norm())
    residual = float((problem.B @ p + problem.damping * p + problem.g).norm())
    assert float(found.residual) == pytest.approx(residual, abs=1e-9 * scale)  # type: ignore[arg-type]
    torch.testing.assert_close(found.curvature_step[0], problem.B @ p, rtol=1e-8, atol=1e-9 * scale)  # type: ignore[index]
    assert found.iterations <= iterations
    if not bool(found.on_boundary) and found.iterations < min(iterations, 2 * len(p)):
        norm = float(problem.g.norm())
        target = min(0.5, math.sqrt(norm)) * norm if tolerance is None else tolerance * norm
        assert residual <= target + 1e-9 * scale


@law
@given(problems(hard=False), st.integers(-3, 3))
def test_cubic_model_satisfies_its_global_optimality_conditions(problem: Problem, exponent: int) -> None:
    sigma = 10.0**exponent
    found = tr.CubicModel(tolerance=1e-14).solve(
        [problem.g], problem.operator, torch.tensor(sigma, dtype=torch.float64), problem.damping
    )
    p = found.step[0]
    H = problem.B + problem.damping * torch.eye(len(p), dtype=torch.float64)
    mu = sigma * float(p.norm())
    scale = float(torch.linalg.matrix_norm(H, 2)) + mu
    # Cartis, Gould & Toint 2011, theorem 3.1
    assert float(((H @ p) + mu * p + problem.g).norm()) <= 1e-7 * (
        scale * float(p.norm()) + float(problem.g.norm())
    )
    assert found.diagnostics["multiplier"] == pytest.approx(mu, rel=1e-6)


diagonals = st.lists(eigenvalue, min_size=1, max_size=6)


@law
@given(diagonals, st.integers(0, 1000), st.integers(-3, 3), st.lists(st.booleans(), min_size=6, max_size=6))
def test_secular_cubic_step_is_the_global_minimiser(
    h: list[float], seed: int, exponent: int, zero: list[bool]
) -> None:
    values = torch.tensor(h, dtype=torch.float64)
    g = torch.randn(len(h), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g[torch.tensor(zero[: len(h)])] = 0.0
    sigma = 10.0**exponent
    found = minimise_cubic(g, values, sigma)
    if float(g.norm()) == 0:
        assert float(found.step.norm()) == 0
        return
    mu = sigma * float(found.step.norm())
    assert found.multiplier == pytest.approx(mu, rel=1e-9)
    # (h + μ) p = -g with h + μ >= 0 is necessary and sufficient
    scale = float(values.abs().max()) + mu
    assert float(values.min()) + mu >= -1e-9 * scale
    residual = float(((values + mu) * found.step + g).norm())
    assert residual <= 1e-9 * (scale * float(found.step.norm()) + float(g.norm()))


@law
@given(diagonals, st.integers(0, 1000), st.integers(-6, 6), st.lists(st.booleans(), min_size=6, max_size=6))
def test_secular_ball_step_is_the_global_minimiser(
    h: list[float], seed: int, exponent: int, zero: list[bool]
) -> None:
    values = torch.tensor(h, dtype=torch.float64)
    g = torch.randn(len(h), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g[torch.tensor(zero[: len(h)])] = 0.0
    radius = 10.0**exponent
    found = minimise_in_ball(g, values, radius)
    if float(g.norm()) == 0:
        assert float(found.step.norm()) == 0
        return
    mu, norm = found.multiplier, float(found.step.norm())
    scale = float(values.abs().max()) + mu
    assert mu >= 0
    assert float(values.min()) + mu >= -1e-12 * scale
    assert norm <= radius * (1 + 1e-12)
    assert mu * (radius - norm) <= 1e-9 * mu * radius
    residual = float(((values + mu) * found.step + g).norm())
    assert residual <= 1e-9 * (scale * norm + float(g.norm()))


@law
@given(
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    st.integers(0, 1000),
    st.floats(0.01, 10),
    st.booleans(),
)
def test_box_step_is_the_best_of_a_fine_grid_for_any_signed_diagonal(
    h: list[float], seed: int, radius: float, damped: bool
) -> None:
    values = torch.tensor(h, dtype=torch.float64)
    g = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    damping = 0.7 if damped else 0.0
    found = tr.Box().minimise(
        {},
        [g],
        DiagonalOperator([values]),
        torch.tensor(radius, dtype=torch.float64),
        damping,
        tr.StepContext(),
    )
    grid = torch.linspace(-radius, radius, 2001, dtype=torch.float64)[:, None]
    model = g * grid + 0.5 * (values + damping) * grid**2
    p = found.step[0]
    mine = g * p + 0.5 * (values + damping) * p**2
    assert bool((mine <= model.min(dim=0).values + 1e-12).all())
    assert float(p.abs().max()) <= radius


@law
@given(problems())
def test_regions_never_go_uphill_and_equal_newton_inside(problem: Problem) -> None:
    for region in (tr.Box(), tr.L2Ball(), tr.L2Ball(scope="tensor"), tr.RelativeBall()):
        context = tr.StepContext(params=[torch.ones_like(problem.g)])
        try:
            found = region.minimise({}, [problem.g], problem.operator, problem.Δ, problem.damping, context)
        except ArithmeticError:  # a singular B is the operator's own error
            return
        assert reduction([problem.g], problem.operator, found.step) > 0
        newton = torch.linalg.solve(problem.B + problem.damping * torch.eye(len(problem.g)), -problem.g)
        inside = float(newton.abs().max()) < problem.radius / 2 and float(newton.norm()) < problem.radius / 2
        if inside and not bool(found.diagnostics["cauchy_fallback"]):
            torch.testing.assert_close(found.step[0], newton, rtol=1e-6, atol=1e-12)


@law
@given(problems(definite=True))
def test_kl_ball_is_the_exact_minimiser_in_the_ellipsoid(problem: Problem) -> None:
    found = tr.KLBall().minimise({}, [problem.g], problem.operator, problem.Δ, 0.0, tr.StepContext())
    p = found.step[0]
    # with C Cᵀ = B and q = Cᵀp it is a ball problem with B = I: q = -s C⁻¹g
    q = -torch.linalg.solve_triangular(torch.linalg.cholesky(problem.B), problem.g[:, None], upper=False)[
        :, 0
    ]
    q = q * min(1.0, math.sqrt(problem.radius) / float(q.norm()))
    expected = torch.linalg.solve(torch.linalg.cholesky(problem.B).T, q)
    torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-9 * float(expected.norm()))
    assert float(p @ problem.B @ p) <= problem.radius * (1 + 1e-9)


def nan_after(products: int, B: Tensor) -> Any:
    class Breaking(MatrixOperator):
        count = 0

        def matvec(self, v: Any) -> list[Tensor]:
            self.count += 1
            out = super().matvec(v)
            return [x * math.nan for x in out] if self.count > products else out

    return Breaking(B, [torch.zeros(len(B), dtype=torch.float64)])


@pytest.mark.parametrize(
    "solver", [tr.SteihaugCG(tolerance=1e-12), tr.Krylov(tolerance=1e-12), tr.CubicModel(tolerance=1e-12)]
)
@pytest.mark.parametrize("products", [0, 1, 3])
def test_nan_in_a_product_ends_the_search_at_the_last_good_iterate(solver: Any, products: int) -> None:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    B, g = (
        A @ A.T + torch.eye(8, dtype=torch.float64),
        [torch.randn(8, generator=generator, dtype=torch.float64)],
    )
    one = torch.tensor(1.0, dtype=torch.float64)
    found = solver.solve(g, nan_after(products, B), one)
    clean = type(solver)(max_iterations=max(products, 1), tolerance=1e-12).solve(g, MatrixOperator(B, g), one)
    assert found.diagnostics["non_finite_product"]
    assert bool(torch.isfinite(found.step[0]).all())
    if products == 0:
        assert float(vectors.norm(found.step)) == 0
    else:
        torch.testing.assert_close(found.step, clean.step)


def test_cubic_step_survives_a_multiplier_below_the_rounding_of_the_curvature() -> None:
    """μ = σ‖p‖ of 1e-10 beside h of 1e8: μ found as (h + μ) - h would be 0."""
    g, h = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([1e8, 3e8], dtype=torch.float64)
    found = minimise_cubic(g, h, 1e-2)
    assert found.multiplier == pytest.approx(1e-2 * float((g / h).norm()), rel=1e-9)
    torch.testing.assert_close(found.step, -g / h, rtol=1e-12, atol=0.0)
