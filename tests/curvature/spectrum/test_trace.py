"""Trace estimators: exact where they must be, unbiased, as precise as their theory says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from curvature.spectrum import (
    Estimated,
    extreme_eigenvalues,
    hutch_plus_plus,
    hutchinson_trace,
    spectral_density,
    xdiag,
    xtrace,
)
from tests.curvature.spectrum import matrices

ESTIMATORS: list[Callable[..., Estimated]] = [hutchinson_trace, hutch_plus_plus, xtrace]
ALL = pytest.mark.parametrize("trace", ESTIMATORS)


@ALL
@pytest.mark.parametrize("make", [matrices.decaying, matrices.indefinite, matrices.flat_spectrum])
def test_mean_over_400_seeds_is_the_trace(
    trace: Callable[..., Estimated], make: Callable[[int], torch.Tensor]
) -> None:
    B = make(20)
    estimates = torch.stack([trace(matrices.operator(B), 12, seed=s).value for s in range(400)])
    error = estimates.std() / 400**0.5
    assert abs(estimates.mean() - B.trace()) < 4 * error  # 400 seeds from 0: four standard errors
    assert error > 0


@ALL
def test_reported_error_matches_the_spread_over_seeds(trace: Callable[..., Estimated]) -> None:
    B = matrices.operator(matrices.indefinite(30))
    runs = [trace(B, 24, seed=s) for s in range(200)]
    spread = torch.stack([r.value for r in runs]).std()
    reported = torch.stack([r.standard_error for r in runs]).square().mean().sqrt()
    assert 0.5 < reported / spread < 2.0  # leave-one-out estimates are correlated: a factor, not a law


@pytest.mark.parametrize("trace", [hutch_plus_plus, xtrace])
def test_low_rank_matrix_is_exact(trace: Callable[..., Estimated]) -> None:
    estimate = trace(matrices.operator(matrices.low_rank()), 18)
    assert abs(estimate.value - 5.0) < 1e-12
    assert estimate.standard_error < 1e-12


def test_variance_falls_as_the_theory_says() -> None:
    B = matrices.decaying()
    spread = {
        trace.__name__: torch.stack([trace(matrices.operator(B), 30, seed=s).value for s in range(100)]).std()
        for trace in ESTIMATORS
    }
    theory = (2 * (B.square().sum() - B.diagonal().square().sum()) / 30).sqrt()
    assert 0.8 < spread["hutchinson_trace"] / theory < 1.2  # 100 seeds: a 7% error of the spread
    assert spread["xtrace"] < spread["hutch_plus_plus"] < 0.2 * spread["hutchinson_trace"]


def test_all_directions_make_xtrace_exact() -> None:
    B = matrices.indefinite(10)
    assert abs(xtrace(matrices.operator(B), 20).value - B.trace()) < 1e-10


def test_xtrace_equals_its_definition_written_literally() -> None:
    B = matrices.indefinite(12)
    m = 4
    from curvature.spectrum.flat import FlatOperator

    Omega = FlatOperator(matrices.operator(B)).normals(m, 3)
    Omega = Omega * (12**0.5 / Omega.norm(dim=0))
    parts = []
    for i in range(m):
        rest = [j for j in range(m) if j != i]
        Q, _ = torch.linalg.qr(B @ Omega[:, rest])
        mu = Omega[:, i] - Q @ (Q.T @ Omega[:, i])
        mu = mu * (12 - m + 1) ** 0.5 / mu.norm()
        parts.append((Q.T @ B @ Q).trace() + mu @ B @ mu)
    assert abs(xtrace(matrices.operator(B), 2 * m, seed=3).value - torch.stack(parts).mean()) < 1e-11


@ALL
def test_same_seed_gives_the_same_and_the_global_state_stays(trace: Callable[..., Estimated]) -> None:
    B = matrices.operator(matrices.indefinite())
    rng = torch.get_rng_state()
    first, again, other = (trace(B, 12, seed=s).value for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), rng)


@ALL
def test_products_are_counted(trace: Callable[..., Estimated]) -> None:
    count = 0
    B = matrices.indefinite()
    op = matrices.operator(B)
    product = op._product

    def counted(v: list[torch.Tensor]) -> list[torch.Tensor]:
        nonlocal count
        count += 1
        return product(v)

    op._product = counted  # type: ignore[assignment]
    assert trace(op, 18).products == count == 18


@ALL
def test_too_few_products_are_refused(trace: Callable[..., Estimated]) -> None:
    with pytest.raises(ValueError, match="products must be >="):
        trace(matrices.operator(matrices.indefinite()), 0)


@pytest.mark.parametrize(
    "method", [hutchinson_trace, hutch_plus_plus, xtrace, xdiag, spectral_density, extreme_eigenvalues]
)
def test_a_product_that_is_not_finite_is_an_error_not_an_estimate(method: Any) -> None:
    B = torch.eye(9, dtype=torch.float64)
    for bad in (float("nan"), float("inf")):
        B[4, 4] = bad
        with pytest.raises(ArithmeticError, match="a product with this curvature is not finite: no spectrum"):
            method(matrices.operator(B))


@pytest.mark.parametrize("products", [6.5, True, "6"])
def test_a_budget_that_is_no_whole_number_is_refused(products: Any) -> None:
    with pytest.raises(ValueError, match="products must be a whole number"):
        xtrace(matrices.operator(matrices.indefinite(9)), products)
