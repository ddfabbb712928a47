"""Matrix-free curvature over a DataLoader: one large batch, whatever the loader's batch size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvature import (
    KFAC,
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    HutchinsonDiagonal,
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


def refilled(x: torch.Tensor, y: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches in one buffer that is filled anew."""
    inputs, target = torch.empty_like(x[:size]), torch.empty_like(y[:size])
    for start in range(0, len(x) - size + 1, size):
        inputs.copy_(x[start : start + size])
        target.copy_(y[start : start + size])
        yield inputs, target


@pytest.mark.parametrize("estimator", [GaussNewton(), HutchinsonDiagonal(), KFAC])
def test_a_buffer_that_is_filled_anew_is_refused_and_its_copies_are_exact(estimator: Any) -> None:
    model, loss_fn, x, y = cases.classification()
    estimator = estimator(model) if estimator is KFAC else estimator
    with pytest.raises(ValueError, match="batch 0 was written to while later ones were read"):
        estimate(estimator, model, loss_fn, refilled(x, y, 2))
    copies = [(a.clone(), b.clone()) for a, b in refilled(x, y, 2)]
    n = 2 * len(copies)
    found = estimate(estimator, model, loss_fn, copies).to_dense()
    assert (
        dense.relative_error(found, estimate(estimator, model, loss_fn, [(x[:n], y[:n])]).to_dense()) < 1e-9
    )
    assert (
        estimate(estimator, model, loss_fn, [copies[0]] * 2).to_dense().isfinite().all()
    )  # twice the same is no fault


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "estimator",
    [
        GaussNewton(),
        Hessian(),
        Hessian(hvp="forward"),
        Hessian(hvp="finite-difference"),
        Fisher("categorical"),
    ],
)
def test_a_batch_that_is_written_to_later_is_noticed(estimator: Any, count: int) -> None:
    model, loss_fn, x, y = cases.classification()
    batches = [(x.clone(), y)] * count
    operator = estimate(estimator, model, loss_fn, batches)
    v = dense.trainable(model)
    before = operator.matvec(v)
    for a, b in zip(before, operator.matvec(v), strict=True):
        assert torch.equal(a, b)
    batches[0][0].mul_(2.0)
    with pytest.raises(RuntimeError, match="a batch was written to since the curvature was observed"):
        operator.matvec(v)


@pytest.mark.parametrize("count", [1, 3])
def test_a_model_may_work_in_place_on_its_input(count: int) -> None:
    model, loss_fn, x, y = cases.classification()
    inner = nn.Sequential(nn.ReLU(inplace=True), model)
    batches = [(x[i::count].clone(), y[i::count]) for i in range(count)]
    expected = estimate(Hessian(), model, loss_fn, [(x.relu(), y)]).to_dense()
    assert dense.relative_error(estimate(Hessian(), inner, loss_fn, batches).to_dense(), expected) < 1e-9
