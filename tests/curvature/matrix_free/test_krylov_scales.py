"""Right-hand sides and matrices near the ends of float32's range, and vectors of a wrong shape, put to the solvers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from curvature import MatrixFreeOperator, conjugate_gradient, to_scipy, vectors
from curvature.krylov_solve import krylov_solve
from curvature.spectrum import extreme_eigenvalues, spectral_density

DEFINITE, INDEFINITE = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, -2.0, 4.0])
SCALES = [1e-30, 1e-22, 1e20, 1e30]


def times(h: Tensor, factor: float = 1.0):
    return lambda v: [factor * (h * v[0])]


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1e18, 1e30])
def test_norm_neither_overflows_nor_underflows(scale: float) -> None:
    v = [torch.full((2, 2), scale), torch.zeros(0), torch.full((5,), -scale)]
    exact = vectors.norm([x.double() for x in v])
    torch.testing.assert_close(vectors.norm(v).double(), exact, rtol=1e-4, atol=0)


def test_norm_of_parameters_has_a_gradient_and_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    p = torch.full((2,), 3e-30, requires_grad=True)
    vectors.norm([p, torch.full((2,), 4e-30)]).backward()
    torch.testing.assert_close(p.grad, torch.full((2,), 0.6 / 2**0.5))
    assert not recwarn.list


def test_norm_of_nothing_of_zeros_and_of_what_is_not_finite() -> None:
    assert vectors.norm([torch.zeros(0)]) == 0
    assert vectors.norm([torch.zeros(3), torch.zeros(2)]) == 0
    assert vectors.norm([torch.tensor([1.0, float("inf")])]) == float("inf")
    assert vectors.norm([torch.tensor([1e-30, float("nan")])]).isnan()


@pytest.mark.parametrize("scale", SCALES)
def test_conjugate_gradient_of_a_short_or_long_right_hand_side(scale: float) -> None:
    result = conjugate_gradient(times(DEFINITE), [torch.full((3,), scale)])
    assert result.converged
    torch.testing.assert_close(result.solution[0] / scale, 1 / DEFINITE, rtol=1e-5, atol=0)
    assert result.residual_norm / scale < 1e-5 * 3**0.5


@pytest.mark.parametrize("scale", SCALES)
def test_conjugate_gradient_scales_what_it_starts_from_and_its_absolute_tolerance(scale: float) -> None:
    b = [torch.full((3,), scale)]
    solved = conjugate_gradient(times(DEFINITE), b, initial=[scale / DEFINITE], rtol=1e-5)
    assert (solved.converged, solved.iterations) == (True, 0)
    loose = conjugate_gradient(times(DEFINITE), b, rtol=0.0, atol=10 * scale)
    assert (loose.converged, loose.iterations) == (True, 0)
    tight = conjugate_gradient(times(DEFINITE), b, rtol=0.0, atol=1e-4 * scale)
    assert tight.converged
    assert tight.iterations > 1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("h", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
def test_krylov_solve_at_every_scale(scale: float, h: Tensor) -> None:
    [x] = krylov_solve(times(h), [torch.full((3,), scale)])
    torch.testing.assert_close(x / scale, 1 / h, rtol=1e-4, atol=0)
    [x] = krylov_solve(times(h, scale), [torch.ones(3)])
    torch.testing.assert_close(x * scale, 1 / h, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_lanczos_of_a_small_or_large_matrix(scale: float) -> None:
    B = MatrixFreeOperator(times(INDEFINITE, scale), [torch.zeros(3)])
    found = extreme_eigenvalues(B, 3, "smallest")
    torch.testing.assert_close(found.eigenvalues / scale, torch.tensor([-2.0, 1.0, 4.0]), rtol=1e-5, atol=0)
    density = spectral_density(B, steps=3, probes=2)
    assert [len(t) for t in density.nodes] == [3, 3]


def test_empty_right_hand_side_is_solved() -> None:
    assert conjugate_gradient(lambda v: list(v), [torch.zeros(0)]).converged


def short(v: Sequence[Tensor]) -> list[Tensor]:
    return [x[:1] for x in v]


def test_vectors_of_a_wrong_shape_are_named() -> None:
    b = [torch.ones(3)]
    with pytest.raises(ValueError, match=r"the preconditioner gives must be shaped like b, \[\(3,\)\], got"):
        conjugate_gradient(times(DEFINITE), b, preconditioner=short)
    with pytest.raises(ValueError, match="a product with the operator must be shaped like b"):
        conjugate_gradient(short, b)
    with pytest.raises(ValueError, match="initial must be shaped like b"):
        conjugate_gradient(times(DEFINITE), b, initial=[torch.ones(3), torch.ones(3)])


def test_exported_operator_multiplies_complex_vectors_as_scipy_may_ask() -> None:
    h = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    exported = to_scipy(MatrixFreeOperator(times(h), [h]))
    x = np.array([1 + 1j, 2j, 3])
    np.testing.assert_array_equal(exported @ x, h.numpy() * x)
    np.testing.assert_array_equal(exported @ np.eye(3), np.diag(h.numpy()))
