"""Conjugate gradients, MINRES, the exact solve, and the export to SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from curvature import (
    ConvergenceError,
    GaussNewton,
    MatrixFreeOperator,
    Outcome,
    SingularCurvatureError,
    conjugate_gradient,
    estimate,
    to_scipy,
)
from curvature.krylov_solve import krylov_solve
from curvature.minres import minres
from curvature.vectors import flatten, unflatten
from tests.curvature import dense
from tests.curvature.matrix_free import cases
from tests.curvature.spectrum import matrices


def positive(n: int = 30) -> Tensor:
    return matrices.symmetric(torch.logspace(-2, 2, n), seed=7)


def vector(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_list(op: MatrixFreeOperator, v: Tensor) -> list[Tensor]:
    return unflatten(v, op.like)


def test_converges_to_the_solution_and_reports_the_true_residual() -> None:
    B, b = positive(), vector(30)
    op = matrices.operator(B)
    result = conjugate_gradient(op, as_list(op, b), damping=0.1, rtol=1e-10, max_iterations=200)
    A = B + 0.1 * torch.eye(30, dtype=torch.float64)
    x = flatten(result.solution)
    assert result.converged
    assert dense.relative_error(x, torch.linalg.solve(A, b)) < 1e-8
    assert abs(result.residual_norm - (b - A @ x).norm()) < 1e-14


def test_iterates_are_those_of_the_textbook() -> None:
    B, b = positive(), vector(30)
    op = matrices.operator(B)
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for k in range(1, 8):  # Nocedal & Wright, algorithm 5.2
        step = (r @ r) / (p @ B @ p)
        x, r_new = x + step * p, r - step * (B @ p)
        p, r = r_new + (r_new @ r_new) / (r @ r) * p, r_new
        result = conjugate_gradient(op, as_list(op, b), rtol=0, max_iterations=k)
        assert result.outcome is Outcome.MAX_ITERATIONS
        assert result.iterations == k
        assert dense.relative_error(flatten(result.solution), x) < 1e-10


def test_exact_preconditioner_converges_at_once() -> None:
    B, b = positive(), vector(30)
    op = matrices.operator(B)
    inverse = torch.linalg.inv(B)
    plain = conjugate_gradient(op, as_list(op, b), rtol=1e-8, max_iterations=500)
    result = conjugate_gradient(
        op, as_list(op, b), preconditioner=lambda v: as_list(op, inverse @ flatten(v)), rtol=1e-8
    )
    assert result.iterations <= 2 < plain.iterations
    assert result.converged


def test_good_start_is_used() -> None:
    B, b = positive(), vector(30)
    op = matrices.operator(B)
    exact = as_list(op, torch.linalg.solve(B, b))
    assert conjugate_gradient(op, as_list(op, b), initial=exact).iterations == 0


def test_absolute_tolerance_ends_the_iteration() -> None:
    op = matrices.operator(positive())
    b = as_list(op, vector(30))
    assert conjugate_gradient(op, b, rtol=0, atol=100.0).iterations == 0
    few = conjugate_gradient(op, b, rtol=0, atol=1.0)
    assert few.converged
    assert few.residual_norm <= 1.0


def test_negative_curvature_is_reported_with_its_direction() -> None:
    B = matrices.indefinite()
    op = matrices.operator(B)
    result = conjugate_gradient(op, as_list(op, vector(60)))
    assert result.outcome is Outcome.NEGATIVE_CURVATURE
    assert result.direction is not None
    p = flatten(result.direction)
    assert p @ B @ p < 0
    assert torch.isfinite(flatten(result.solution)).all()


def test_direction_without_curvature_is_a_breakdown() -> None:
    op = matrices.operator(torch.zeros(30, 30, dtype=torch.float64))
    assert conjugate_gradient(op, as_list(op, vector(30))).outcome is Outcome.BREAKDOWN


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_product_ends_with_the_last_finite_iterate(bad: float) -> None:
    B, calls = positive(), 0

    def product(v: list[Tensor]) -> list[Tensor]:
        nonlocal calls
        calls += 1
        return unflatten(B @ flatten(v) * (bad if calls == 4 else 1.0), v)

    result = conjugate_gradient(product, [vector(30)])
    assert result.outcome is Outcome.NON_FINITE
    assert result.iterations == 4
    assert torch.isfinite(result.solution[0]).all()


def test_tolerance_below_rounding_ends_in_a_breakdown_not_in_a_loop() -> None:
    op = matrices.operator(positive())
    result = conjugate_gradient(op, as_list(op, vector(30)), rtol=1e-30, max_iterations=10_000)
    assert not result.converged
    assert result.iterations < 10_000
    assert result.residual_norm < 1e-10


def test_zero_right_hand_side_gives_zero() -> None:
    op = matrices.operator(positive())
    result = conjugate_gradient(op, as_list(op, torch.zeros(30, dtype=torch.float64)))
    assert result.converged
    assert not flatten(result.solution).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, "rtol must be >= 0"),
        ({"atol": float("nan")}, "atol must be >= 0"),
        ({"max_iterations": 0}, "max_iterations must be >= 1"),
        ({"damping": -1.0}, "damping must be >= 0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, float], message: str) -> None:
    op = matrices.operator(positive())
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(op, as_list(op, vector(30)), **options)  # type: ignore[arg-type]


def test_minres_equals_scipy_step_by_step() -> None:
    B, b = matrices.indefinite(), vector(60)
    op = matrices.operator(B)
    for k in (1, 2, 5, 10):
        x = flatten(minres(op.matvec, as_list(op, b), tolerance=0.0, max_iterations=k))
        expected, _ = scipy.sparse.linalg.minres(B.numpy(), b.numpy(), rtol=0, maxiter=k)
        assert dense.relative_error(x, torch.from_numpy(expected)) < 1e-9


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_krylov_solve_is_exact_for_definite_and_indefinite_matrices(damping: float) -> None:
    for B in (positive(60), matrices.indefinite(), matrices.flat_spectrum()):
        op = matrices.operator(B)
        b = vector(60)
        x = flatten(krylov_solve(op.matvec, as_list(op, b), damping))
        expected = torch.linalg.solve(B + damping * torch.eye(60, dtype=B.dtype), b)
        assert dense.relative_error(x, expected) < 1e-9


def test_krylov_solve_refuses_a_singular_matrix_even_where_the_system_is_consistent() -> None:
    B = matrices.low_rank()
    op = matrices.operator(B)
    with pytest.raises((SingularCurvatureError, ConvergenceError), match="singular"):
        krylov_solve(op.matvec, as_list(op, B @ vector(60)))


def test_krylov_solve_refuses_nan() -> None:
    with pytest.raises(ConvergenceError, match="not finite"):
        krylov_solve(lambda v: [x * float("nan") for x in v], [vector(30)], 1.0)
    with pytest.raises(ValueError, match="finite"):
        krylov_solve(lambda v: list(v), [vector(30) * float("nan")], 1.0)


def test_solve_inverts_a_large_damped_gauss_newton() -> None:
    model = cases.randomise(
        torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    )
    model = model.double()
    x = torch.randn(50, 20, generator=cases.generator(), dtype=torch.float64)
    y = torch.randint(0, 3, (50,), generator=cases.generator())
    G = estimate(GaussNewton(), model, torch.nn.CrossEntropyLoss(), [(x, y)])
    v = unflatten(vector(sum(p.numel() for p in model.parameters())), G.like)
    assert flatten(v).numel() > G.dense_solve_limit
    right = [a + 1e-3 * b for a, b in zip(G.matvec(v), v, strict=True)]
    assert dense.relative_error(flatten(G.solve(right, 1e-3)), flatten(v)) < 1e-8


def test_eigsh_on_the_export_equals_the_dense_spectrum() -> None:
    B = matrices.indefinite()
    exported = to_scipy(matrices.operator(B))
    assert exported.shape == (60, 60)
    assert exported.dtype == np.float64
    for which, expected in (("LA", torch.linalg.eigvalsh(B)[-3:]), ("SA", torch.linalg.eigvalsh(B)[:3])):
        found = scipy.sparse.linalg.eigsh(exported, k=3, which=which, return_eigenvectors=False)
        assert np.abs(np.sort(found) - expected.numpy()).max() < 1e-10
    X = vector(120).reshape(60, 2).numpy()
    assert np.abs(exported @ X - B.numpy() @ X).max() < 1e-12


def test_export_of_float32_parameters_takes_and_gives_float64() -> None:
    model, loss_fn, x, y = cases.classification()
    G = estimate(GaussNewton(), model.float(), loss_fn, [(x.float(), y)])
    out = to_scipy(G) @ np.ones(G.to_dense().shape[0])
    assert out.dtype == np.float64
    assert np.abs(out - G.to_dense().double().sum(1).numpy()).max() < 1e-6


def test_export_of_an_operator_without_shapes_asks_for_them() -> None:
    class Bare:
        def matvec(self, v: list[Tensor]) -> list[Tensor]:
            return [2 * x for x in v]

    with pytest.raises(ValueError, match="pass like="):
        to_scipy(Bare())  # type: ignore[arg-type]
    assert (to_scipy(Bare(), [torch.zeros(3)]) @ np.ones(3) == 2).all()  # type: ignore[arg-type]
