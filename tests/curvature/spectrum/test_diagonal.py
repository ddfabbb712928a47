"""XDiag: its definition, unbiased, exact where it must be."""

from __future__ import annotations

import pytest
import torch

from curvature import MatrixFreeOperator
from curvature.spectrum import xdiag
from curvature.spectrum.flat import FlatOperator
from curvature.vectors import flatten
from tests.curvature.spectrum import matrices


def test_equals_its_definition_written_literally() -> None:
    B = matrices.indefinite(12)
    m = 4
    Omega = FlatOperator(matrices.operator(B)).signs(m, 3)
    parts = []
    for i in range(m):
        Q, _ = torch.linalg.qr(B @ Omega[:, [j for j in range(m) if j != i]])
        P = Q @ Q.T
        parts.append((P @ B).diagonal() + Omega[:, i] * ((B - P @ B) @ Omega[:, i]))
    estimate = flatten(xdiag(matrices.operator(B), 2 * m, seed=3).value)
    assert (estimate - torch.stack(parts).mean(0)).abs().max() < 1e-11


def test_mean_over_400_seeds_is_the_diagonal() -> None:
    B = matrices.indefinite(12)
    estimates = torch.stack([flatten(xdiag(matrices.operator(B), 8, seed=s).value) for s in range(400)])
    error = estimates.std(0) / 400**0.5
    assert ((estimates.mean(0) - B.diagonal()).abs() < 4.5 * error).all()  # 12 elements, 400 seeds from 0


def test_reported_error_matches_the_spread_over_seeds() -> None:
    B = matrices.operator(matrices.indefinite(30))
    runs = [xdiag(B, 24, seed=s) for s in range(200)]
    spread = torch.stack([flatten(r.value) for r in runs]).std(0)
    reported = torch.stack([flatten(r.standard_error) for r in runs]).square().mean(0).sqrt()
    assert 0.5 < (reported / spread).median() < 2.0


def test_low_rank_matrix_is_exact_and_has_the_parameters_shapes() -> None:
    B = matrices.low_rank()
    estimate = xdiag(matrices.operator(B), 18)
    assert [x.shape for x in estimate.value] == [(2, 3), (54,)]
    assert (flatten(estimate.value) - B.diagonal()).abs().max() < 1e-12


def test_all_directions_are_exact() -> None:
    B = matrices.indefinite(10)
    assert (flatten(xdiag(matrices.operator(B), 20).value) - B.diagonal()).abs().max() < 1e-10


@pytest.mark.parametrize(("size", "products"), [(3, 4), (4, 6), (8, 4)])
def test_repeated_signs_neither_bias_the_estimate_nor_make_it_seem_exact(size: int, products: int) -> None:
    B = matrices.symmetric(torch.linspace(-1.0, 3.0, size), seed=7)
    like = [torch.zeros(size, dtype=torch.float64)]
    op = MatrixFreeOperator(lambda v: [B @ v[0]], like)
    runs = [xdiag(op, products, seed=s) for s in range(600)]
    values, errors = (
        torch.stack([x[0] for x in xs])
        for xs in zip(*[(r.value, r.standard_error) for r in runs], strict=True)
    )
    # size elements, 600 seeds from 0
    assert ((values.mean(0) - B.diagonal()).abs() < 4.5 * values.std(0) / 600**0.5).all()
    wrong = (values - B.diagonal()).abs().amax(1) > 1e-6
    exact = (errors < 1e-9).all(1)
    assert not (wrong & exact).any()
    assert errors.isnan().any()  # the premise: some of these seeds draw dependent signs


def test_a_single_parameter_is_exact_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    found = xdiag(MatrixFreeOperator(lambda v: [-2.0 * v[0]], [torch.zeros(1)]), 30)
    assert (found.value[0].item(), found.standard_error[0].item(), found.products) == (-2.0, 0.0, 2)
    assert not recwarn.list
