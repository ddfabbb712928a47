"""Exact diagonals against backpack 1.7.1 and curvlinops 3.0.1, in float64, where those are right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from curvature import EmpiricalFisherDiagonal, GaussNewtonDiagonal, HessianDiagonal, estimate

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

N = 6


def network() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.Sigmoid(),
        nn.Linear(5, 3),
    )
    g = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, 2, 4, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (N,), generator=g)


def regression() -> Tensor:
    return torch.randn(N, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


LOSSES = {
    "cross entropy": (nn.CrossEntropyLoss(), data()[1]),
    "squared": (nn.MSELoss(), regression()),
    "squared, sum": (nn.MSELoss(reduction="sum"), regression()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_against_backpack(name: str) -> None:
    backpack = pytest.importorskip("backpack", reason="needs backpack-for-pytorch (the extra 'peers')")
    from backpack import extensions

    loss_fn, y = LOSSES[name]
    x, _ = data()
    model = network()
    extended, extended_loss = (
        backpack.extend(network()),
        backpack.extend(type(loss_fn)(reduction=loss_fn.reduction)),
    )
    with backpack.backpack(extensions.DiagGGNExact(), extensions.DiagHessian(), extensions.SumGradSquared()):
        extended_loss(extended(x), y).backward()
    # backpack's sum of squares is of the shares u_n of a mean, so Σ u_n² = (1/N) Σ c_n g_n²; of a sum, c_n = 1.
    factor = N if loss_fn.reduction == "mean" else 1
    for estimator, theirs, scale in (
        (GaussNewtonDiagonal(), "diag_ggn_exact", 1),
        (HessianDiagonal(), "diag_h", 1),
        (EmpiricalFisherDiagonal(samples="per_sample"), "sum_grad_squared", factor),
    ):
        ours = estimate(estimator, model, loss_fn, [(x, y)]).diagonal()
        for a, p in zip(ours, extended.parameters(), strict=True):
            torch.testing.assert_close(a, scale * getattr(p, theirs), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_against_curvlinops(name: str) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch (the extra 'peers')")
    loss_fn, y = LOSSES[name]
    x, _ = data()
    model = network()
    params = list(model.parameters())
    size = sum(p.numel() for p in params)
    for estimator, operator in (
        (GaussNewtonDiagonal(), curvlinops.GGNLinearOperator),
        (HessianDiagonal(), curvlinops.HessianLinearOperator),
    ):
        theirs = operator(model, loss_fn, params, [(x, y)], check_deterministic=False)
        matrix = theirs @ torch.eye(size, dtype=torch.float64)
        ours = torch.cat([d.reshape(-1) for d in estimate(estimator, model, loss_fn, [(x, y)]).diagonal()])
        torch.testing.assert_close(ours, matrix.diagonal(), rtol=1e-8, atol=1e-10)
