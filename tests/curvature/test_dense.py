"""The dense reference itself, against finite differences and closed forms."""

from __future__ import annotations

import torch
from torch import nn

from tests.curvature import dense


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()


def perturbed(model: nn.Module, x: torch.Tensor, y: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    params = dense.trainable(model)
    with torch.no_grad():
        for p, d in zip(params, dense.split(step, params), strict=True):
            p.add_(d)
    g = dense.gradient(nn.functional.cross_entropy(model(x), y), params)
    with torch.no_grad():
        for p, d in zip(params, dense.split(step, params), strict=True):
            p.sub_(d)
    return g


def test_hessian_equals_central_differences_of_the_gradient_with_layer_norm() -> None:
    with torch.random.fork_rng():
        model = small_model()
        x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    params = dense.trainable(model)
    H = dense.hessian(nn.functional.cross_entropy(model(x), y), params)
    P, h = H.shape[0], 1e-5
    for i in range(P):
        unit = torch.zeros(P, dtype=torch.float64)
        unit[i] = h
        column = (perturbed(model, x, y, unit) - perturbed(model, x, y, -unit)) / (2 * h)
        torch.testing.assert_close(H[:, i], column, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(H, H.T, atol=1e-14, rtol=1e-12)


def test_linear_regression_has_its_closed_form() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(7, 1, dtype=torch.float64, generator=generator)
    w = torch.randn(1, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    z = x @ w.T
    loss = ((z - y) ** 2).mean()
    exact = 2 * x.T @ x / 7
    torch.testing.assert_close(dense.hessian(loss, [w]), exact)
    torch.testing.assert_close(dense.gauss_newton(loss, z, [w]), exact)
    torch.testing.assert_close(dense.fisher(list(z), [2 / 7] * 7, [w], "gaussian"), exact)
    residual = (z - y).detach()
    squares = (2 * residual * x).T @ (2 * residual * x) / 7
    own = [((z[n] - y[n]) ** 2).mean() for n in range(7)]
    torch.testing.assert_close(dense.empirical_fisher(own, [1 / 7] * 7, [w]), squares)


def test_softmax_regression_fisher_equals_gauss_newton_equals_hessian() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    y = torch.tensor([0, 1, 2, 2, 1, 0])
    w = torch.randn(3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    z = x @ w.T
    loss = nn.functional.cross_entropy(z, y)
    H = dense.hessian(loss, [w])
    p = torch.softmax(z.detach(), 1)
    exact = (
        torch.einsum("nij,na,nb->iajb", torch.diag_embed(p) - p[:, :, None] * p[:, None, :], x, x).reshape(
            6, 6
        )
        / 6
    )
    torch.testing.assert_close(H, exact)
    torch.testing.assert_close(dense.gauss_newton(loss, z, [w]), exact)
    torch.testing.assert_close(dense.fisher(list(z), [1 / 6] * 6, [w], "categorical"), exact)


def test_bernoulli_fisher_equals_gauss_newton_of_binary_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(4, dtype=torch.float64, generator=generator, requires_grad=True)
    z = torch.sin(w)
    loss = nn.functional.binary_cross_entropy_with_logits(
        z, torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    )
    torch.testing.assert_close(dense.fisher([z], [1 / 4], [w], "bernoulli"), dense.gauss_newton(loss, z, [w]))
