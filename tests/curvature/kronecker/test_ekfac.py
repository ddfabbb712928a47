"""EK-FAC: its first update is the one-shot estimate, and it is never further from Gauss-Newton than K-FAC."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import EKFAC, KFAC, LossGraph, Observation, estimate
from curvature.estimate import add_statistics
from tests.curvature import dense

Batch = tuple[Tensor, Tensor]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Channels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.attention(x, x, x)[0]).mean(1)


CASES: dict[str, Any] = {
    "perceptron": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
        (torch.randn(6, 3), torch.tensor([0, 2, 1, 1, -100, 2])),
    ),
    "convolution": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.SiLU(), nn.Conv2d(4, 3, 2), Channels()),
        (torch.randn(4, 2, 4, 4), torch.tensor([0, 2, 1, 1])),
    ),
    "positions": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3), Mean()),
        (torch.randn(4, 3, 3), torch.tensor([0, 2, 1, 1])),
    ),
    "attention": lambda: (Attending(), (torch.randint(0, 5, (4, 3)), torch.tensor([0, 2, 1, 1]))),
}
LOSS = nn.CrossEntropyLoss(torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64))


def observe(
    estimator: KFAC | EKFAC, state: dict[str, Any], model: nn.Module, batches: list[Batch], total: float
) -> None:
    """One step over micro-batches, each loss divided by the whole weight as a user does."""
    params, statistics = dense.trainable(model), {}
    for x, y in batches:
        z = model(x)
        loss = functional.cross_entropy(z, y, LOSS.weight, reduction="sum") / total
        add_statistics(statistics, estimator.measure(state, LossGraph(loss, params, z)))
    estimator.update(state, Observation(params, statistics=statistics, parameters=params))


def weight(y: Tensor) -> float:
    return float(LOSS.weight[y[y >= 0]].sum())


@pytest.mark.parametrize(
    "options", [{}, {"sharing": "reduce"}, {"fisher": "mc", "samples": 3}, {"fisher": "empirical"}], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_first_update_is_the_one_shot_estimate(case: str, options: dict[str, Any]) -> None:
    model, (x, y) = CASES[case]()
    exact = estimate(EKFAC(model, **options), model, LOSS, [(x, y)]).to_dense()
    ekfac = EKFAC(model, **options)
    state = ekfac.init(dense.trainable(model))
    observe(ekfac, state, model, [(x, y)], weight(y))
    assert dense.relative_error(ekfac.operator(state).to_dense(), exact) < 1e-9
    product = estimate(KFAC(model, **options), model, LOSS, [(x, y)]).to_dense()
    assert dense.relative_error(product, exact) > 1e-3  # the premise: it is not K-FAC's product


def test_micro_batches_of_the_first_step_start_from_the_product() -> None:
    model, (x, y) = CASES["perceptron"]()
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    ekfac = EKFAC(model)
    state = ekfac.init(dense.trainable(model))
    observe(ekfac, state, model, parts, weight(y))
    product = estimate(KFAC(model), model, LOSS, [(x, y)]).to_dense()
    assert dense.relative_error(ekfac.operator(state).to_dense(), product) < 1e-9
    # With the bases known, the second step's micro-batches measure S: with β = 0 it is the estimate.
    forgetful = EKFAC(model, beta=0.0)
    state = forgetful.init(dense.trainable(model))
    for _ in range(2):
        observe(forgetful, state, model, parts, weight(y))
    exact = estimate(EKFAC(model), model, LOSS, [(x, y)]).to_dense()
    assert dense.relative_error(forgetful.operator(state).to_dense(), exact) < 1e-8


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES)
def test_never_further_from_gauss_newton_than_kfac(case: str, sharing: str) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model, (x, y) = CASES[case]()
        z = model(x)
        GN = dense.gauss_newton(LOSS(z, y), z, dense.trainable(model))
        k = estimate(KFAC(model, sharing=sharing), model, LOSS, [(x, y)]).to_dense()
        e = estimate(EKFAC(model, sharing=sharing), model, LOSS, [(x, y)]).to_dense()
        assert float((e - GN).norm()) < (1 - 1e-6) * float((k - GN).norm())


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
def test_a_model_without_any_block_has_its_diagonal() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.Tanh())
    x, y = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    z = model(x)
    GN = dense.gauss_newton(LOSS(z, y), z, dense.trainable(model))
    ours = estimate(EKFAC(model), model, LOSS, [(x, y)]).to_dense()
    assert dense.relative_error(ours, torch.diag(GN.diagonal())) < 1e-10
