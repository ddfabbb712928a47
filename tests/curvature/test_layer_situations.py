"""Situations in which a layer's rows or parameters are not what its kind suggests, against the dense reference."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import (
    EKFAC,
    KFAC,
    EmpiricalFisherDiagonal,
    GaussNewton,
    GaussNewtonDiagonal,
    Hessian,
    HutchinsonDiagonal,
    estimate,
)
from tests.curvature import dense
from tests.curvature.cases import Call, classes, reals, seeded

N = 4
X, Y = reals(N, 4), classes(N)
LOSS = nn.CrossEntropyLoss()


def instance_norm() -> tuple[nn.Module, Tensor]:
    layers = (
        nn.Conv2d(2, 3, 2),
        nn.InstanceNorm2d(3, affine=True),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return seeded(nn.Sequential(*layers)), reals(N, 2, 4, 4)


def weight_norm() -> tuple[nn.Module, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return seeded(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))), X


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.parametrize("make", [instance_norm, weight_norm])
def test_diagonals_of_layers_whose_node_or_parameters_look_otherwise(make: Any) -> None:
    model, x = make()
    z = model(x)
    params = dense.trainable(model)
    G = dense.gauss_newton(LOSS(z, Y), z, params)
    diagonal = estimate(GaussNewtonDiagonal(), model, LOSS, [(x, Y)]).diagonal()
    assert dense.relative_error(dense.flat(diagonal), G.diagonal()) < 1e-9
    trace = float(dense.flat(estimate(EKFAC(model), model, LOSS, [(x, Y)]).diagonal()).sum())
    assert abs(trace - float(G.trace())) < 1e-9 * float(G.trace())
    losses = [LOSS(model(x[n : n + 1]), Y[n : n + 1]) for n in range(N)]
    F = dense.empirical_fisher(losses, torch.full((N,), 1 / N), params)
    found = estimate(EmpiricalFisherDiagonal(samples="per_sample"), model, LOSS, [(x, Y)]).diagonal()
    assert dense.relative_error(dense.flat(found), F.diagonal()) < 1e-9


@pytest.mark.parametrize("estimator", [Hessian(), GaussNewton(), HutchinsonDiagonal(), GaussNewtonDiagonal()])
def test_gradients_scaled_by_frequency_belong_to_no_loss(estimator: Any) -> None:
    make = lambda m, x: m.b(m.a(x).mean(1))  # noqa: E731
    model = seeded(Call(make, a=nn.Embedding(5, 3, scale_grad_by_freq=True), b=nn.Linear(3, 3)))
    tokens = torch.tensor([[0, 0], [1, 2], [0, 3], [4, 4]])
    with pytest.raises(
        ValueError, match=r"'a' has scale_grad_by_freq=True.*belongs to no loss.*set it to False"
    ):
        estimate(estimator, model, LOSS, [(tokens, Y)])
    model.a.weight.requires_grad_(False)
    estimate(estimator, model, LOSS, [(tokens, Y)])


def routed(m: Any, x: Tensor) -> Tensor:
    """Samples go through one of two layers, by the sign of their first input."""
    one = x[:, 0] > 0
    out = x.new_zeros(len(x), 3)
    return out.index_put((one,), m.a(x[one])).index_put((~one,), m.b(x[~one]))


def test_a_layer_that_sees_some_samples_has_the_same_factors_however_the_batch_is_split() -> None:
    """A = Σ a aᵀ over the rows that it saw; with one row a sample G ⊗ A has a closed form."""
    model = seeded(Call(routed, a=nn.Linear(4, 3), b=nn.Linear(4, 3)))
    x, y = reals(6, 4, seed=3), classes(6)
    x[:, 0] = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    whole = estimate(KFAC(model), model, LOSS, [(x, y)]).to_dense()
    split = estimate(KFAC(model), model, LOSS, [(x[:4], y[:4]), (x[4:], y[4:])]).to_dense()
    assert dense.relative_error(split, whole) < 1e-10
    seen = x[x[:, 0] > 0]
    rows = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
    p = torch.softmax(model(x)[x[:, 0] > 0].detach(), 1)
    G = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).sum(0) / 6
    B = torch.kron(G, rows.T @ rows / len(rows)).reshape(3, 5, 3, 5)
    found = estimate(KFAC(model), model, LOSS, [(x, y)]).diagonal()
    exact = B.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)
    assert dense.relative_error(found[0], exact[:, :4]) < 1e-10
    assert dense.relative_error(found[1], exact[:, 4]) < 1e-10


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_samples_in_the_second_axis_may_come_one_by_one(kind: Any, sharing: Any) -> None:
    """Positions that count differently (only the first two of three), in batches of one sample as in one of four."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.a(x.transpose(0, 1)))).transpose(0, 1)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(z[:, :2].flatten(0, 1), y[:, :2].flatten())

    model = seeded(Call(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    x, y = reals(N, 3, 4), classes(N, 3)
    estimator = kind(model, sharing=sharing)
    whole = estimate(estimator, model, loss, [(x, y)]).to_dense()
    alone = estimate(
        kind(model, sharing=sharing), model, loss, [(x[n : n + 1], y[n : n + 1]) for n in range(N)]
    )
    assert dense.relative_error(alone.to_dense(), whole) < 1e-9


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ekfac_does_not_depend_on_the_eigenvectors_of_equal_eigenvalues(sharing: Any) -> None:
    """Every pixel meets one tap of the kernel, so A has each eigenvalue of its part as often as there are taps.

    With ``reduce`` the means of four samples leave a null space of A, in which their gradients are not zero.
    """
    layers = nn.ConvTranspose2d(2, 3, 2, stride=2, bias=False), nn.Tanh(), nn.Conv2d(3, 3, 2)
    model = seeded(nn.Sequential(*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    x = reals(N, 2, 2, 2)
    whole = estimate(EKFAC(model, sharing=sharing), model, LOSS, [(x, Y)])
    values = whole.blocks[0].eigenvalues_a.flatten().sort().values
    assert float((values.diff() / values[-1]).min()) < 1e-10  # the premise
    split = estimate(
        EKFAC(model, sharing=sharing), model, LOSS, [(x[n : n + 1], Y[n : n + 1]) for n in range(N)]
    )
    assert dense.relative_error(split.to_dense(), whole.to_dense()) < 1e-9
    z = model(x)
    G = dense.gauss_newton(LOSS(z, Y), z, dense.trainable(model))
    assert abs(float(dense.flat(whole.diagonal()).sum() / G.trace()) - 1) < 1e-9


@pytest.mark.parametrize("layer", [nn.Embedding(5, 3, sparse=True), nn.EmbeddingBag(5, 3, sparse=True)])
def test_sparse_gradients_are_refused(layer: nn.Module) -> None:
    model = seeded(Call(lambda m, x: m.b(m.a(x)), a=copy.deepcopy(layer), b=nn.Linear(3, 3)))
    x = classes(4) if isinstance(layer, nn.Embedding) else classes(4, 2)
    for estimator in (Hessian(), GaussNewtonDiagonal(), KFAC(model)):
        with pytest.raises(ValueError, match=r"'a' has sparse=True.*set it to False"):
            estimate(estimator, model, nn.CrossEntropyLoss(), [(x, classes(4))])
    model.a.weight.requires_grad_(False)
    estimate(Hessian(), model, nn.CrossEntropyLoss(), [(x, classes(4))])
