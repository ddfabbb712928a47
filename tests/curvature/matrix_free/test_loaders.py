"""Matrix-free curvature over a DataLoader: one large batch, whatever the loader's batch size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch.utils.data import DataLoader, TensorDataset

from curvature import (
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    Outcome,
    conjugate_gradient,
    estimate,
    to_scipy,
)
from tests.curvature import dense
from tests.curvature.matrix_free import cases

ESTIMATORS: dict[str, Any] = {
    "hessian": Hessian(),
    "hessian, forward": Hessian(hvp="forward"),
    "gauss-newton": GaussNewton(),
    "fisher": Fisher("categorical"),
    "empirical fisher": EmpiricalFisher(),
}


def loader(x: torch.Tensor, y: torch.Tensor, size: int, shuffle: bool = False) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(11)
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=shuffle, generator=g)


@pytest.mark.parametrize("case", ["classification", "weighted", "summed"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_loader_with_a_short_last_batch_gives_the_matrix_of_one_batch(name: str, case: str) -> None:
    model, loss_fn, x, y = cases.CASES[case]()
    assert len(x) % 4 != 0  # the premise: the last batch is short
    whole = estimate(ESTIMATORS[name], model, loss_fn, [(x, y)]).to_dense()
    parts = estimate(ESTIMATORS[name], model, loss_fn, loader(x, y, 4))
    assert dense.relative_error(parts.to_dense(), whole) < 1e-12
    shuffled = estimate(ESTIMATORS[name], model, loss_fn, loader(x, y, 4, shuffle=True)).to_dense()
    assert dense.relative_error(shuffled, whole) < 1e-12


@pytest.mark.parametrize("name", ESTIMATORS)
def test_eigsh_over_a_loader_gives_the_dense_spectrum(name: str) -> None:
    model, loss_fn, x, y = cases.classification()
    operator = estimate(ESTIMATORS[name], model, loss_fn, loader(x, y, 4))
    found, directions = scipy.sparse.linalg.eigsh(to_scipy(operator), k=3, which="LA")
    expected = torch.linalg.eigvalsh(estimate(ESTIMATORS[name], model, loss_fn, [(x, y)]).to_dense())[-3:]
    assert np.abs(np.sort(found) - expected.numpy()).max() < 1e-10
    assert np.abs(operator.to_dense().numpy() @ directions - directions * found).max() < 1e-8


def test_sampled_fisher_over_a_loader_approaches_the_exact_one() -> None:
    model, loss_fn, x, y = cases.classification()
    exact = estimate(Fisher("categorical"), model, loss_fn, [(x, y)]).to_dense()
    estimator = Fisher("categorical", samples=400, seed=2)
    found = estimate(estimator, model, loss_fn, loader(x, y, 4)).to_dense()
    assert float((found - exact).norm() / exact.norm()) < 0.2  # 400 draws of 7 labels
    assert torch.equal(found, estimate(estimator, model, loss_fn, loader(x, y, 4)).to_dense())


def test_conjugate_gradients_over_a_loader_report_what_they_reached() -> None:
    model, loss_fn, x, y = cases.classification()
    operator = estimate(GaussNewton(), model, loss_fn, loader(x, y, 4))
    params = dense.trainable(model)
    b = [torch.ones_like(p) for p in params]

    diagonal = operator.diagonal()
    B = operator.to_dense()
    expected = torch.linalg.solve(B + 0.1 * torch.eye(len(B), dtype=torch.float64), dense.flat(b))
    plain = conjugate_gradient(operator, b, damping=0.1, rtol=1e-11)
    better = conjugate_gradient(
        operator,
        b,
        damping=0.1,
        rtol=1e-11,
        preconditioner=lambda v: [u / (d + 0.1) for u, d in zip(v, diagonal, strict=True)],
    )
    for found in (plain, better):
        assert found.outcome is Outcome.CONVERGED
        assert dense.relative_error(dense.flat(found.solution), expected) < 1e-9
    assert better.iterations != plain.iterations  # the preconditioner took part
    stopped = conjugate_gradient(operator, b, damping=0.1, rtol=1e-11, max_iterations=2)
    assert stopped.outcome is Outcome.MAX_ITERATIONS
    assert stopped.iterations == 2
    residual = dense.flat(b) - B @ dense.flat(stopped.solution) - 0.1 * dense.flat(stopped.solution)
    torch.testing.assert_close(stopped.residual_norm, residual.norm(), rtol=1e-9, atol=1e-12)
