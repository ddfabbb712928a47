"""Extreme eigenvalues against the dense spectrum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from curvature import MatrixFreeOperator
from curvature.spectrum import extreme_eigenvalues
from curvature.vectors import flatten
from tests.curvature.spectrum import matrices

MAKERS = pytest.mark.parametrize("make", [matrices.decaying, matrices.indefinite, matrices.flat_spectrum])


@MAKERS
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_equal_the_dense_eigenvalues(make: Callable[[], torch.Tensor], which: str) -> None:
    B = make()
    found = extreme_eigenvalues(matrices.operator(B), 4, which, tolerance=1e-9)  # type: ignore[arg-type]
    values = torch.linalg.eigvalsh(B)
    key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    assert found.converged
    assert (found.eigenvalues - values[key.argsort()[:4]]).abs().max() < 1e-8
    for value, vector, residual in zip(found.eigenvalues, found.eigenvectors, found.residuals, strict=True):
        x = flatten(vector)
        assert abs(x.norm() - 1) < 1e-12
        assert abs((B @ x - value * x).norm() - residual) < 1e-10


def test_residuals_bound_the_error_before_convergence() -> None:
    B = matrices.indefinite()
    found = extreme_eigenvalues(matrices.operator(B), 3, max_products=12)
    assert not found.converged
    assert found.products == 12
    distance = (found.eigenvalues[:, None] - torch.linalg.eigvalsh(B)).abs().amin(1)
    assert (distance <= found.residuals + 1e-12).all()


def test_multiple_eigenvalues_are_found_when_the_krylov_space_is_exhausted() -> None:
    B = matrices.symmetric(torch.tensor([3.0] * 3 + [1.0] * 9))
    found = extreme_eigenvalues(matrices.operator(B), 4, tolerance=1e-10)
    assert (found.eigenvalues - torch.tensor([3.0, 3, 3, 1], dtype=torch.float64)).abs().max() < 1e-10


def test_bad_arguments_are_refused() -> None:
    B = matrices.operator(matrices.indefinite())
    with pytest.raises(ValueError, match="count must be within 1 and 60"):
        extreme_eigenvalues(B, 61)
    with pytest.raises(ValueError, match="which must be one of"):
        extreme_eigenvalues(B, 1, "LA")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tolerance must be > 0"):
        extreme_eigenvalues(B, 1, tolerance=0)


def test_nan_in_a_product_is_refused() -> None:
    like = [torch.zeros(5)]
    with pytest.raises(ArithmeticError, match="not finite"):
        extreme_eigenvalues(MatrixFreeOperator(lambda v: [x * float("nan") for x in v], like))
