"""EK-FAC: its first update is the one-shot estimate, and it is never further from Gauss-Newton than K-FAC."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import EKFAC, KFAC, TRANSIENT, LossGraph, Observation, estimate
from curvature.estimate import add_statistics
from curvature.kronecker import moments
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


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens))).mean(1)[:, :3]


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


@pytest.mark.parametrize(
    "options", [{}, {"sharing": "reduce"}, {"fisher": "mc", "samples": 2}, {"fisher": "empirical"}], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_of_the_first_step_give_the_whole_batchs_estimate(
    case: str, options: dict[str, Any]
) -> None:
    model, (x, y) = CASES[case]()
    if case == "attention" and options.get("sharing") == "reduce":
        # The softmax is blind to a shift of all keys, so their gradients add up to 0 and G has no eigenbasis at all.
        model.attention.requires_grad_(False)
    parts = [(x[:1], y[:1]), (x[1:4], y[1:4]), *([(x[4:], y[4:])] if len(y) > 4 else [])]
    ekfac = EKFAC(model, **options)
    state = ekfac.init(dense.trainable(model))
    observe(ekfac, state, model, parts, weight(y))
    exact = estimate(EKFAC(model, **options), model, LOSS, [(x, y)]).to_dense()
    assert dense.relative_error(ekfac.operator(state).to_dense(), exact) < 1e-9


def test_a_tied_head_has_its_first_moments_from_micro_batches_too() -> None:
    model = Tied()
    x, y = torch.randint(0, 5, (6, 3)), torch.randint(0, 3, (6,))
    ekfac = EKFAC(model)
    state = ekfac.init(dense.trainable(model))
    observe(ekfac, state, model, [(x[:2], y[:2]), (x[2:], y[2:])], weight(y))
    exact = estimate(EKFAC(model), model, LOSS, [(x, y)]).to_dense()
    assert dense.relative_error(ekfac.operator(state).to_dense(), exact) < 1e-9


def test_what_is_held_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that the next micro-batch overwrites may be the input of a layer."""
    model, (x, y) = CASES["perceptron"]()
    exact = estimate(EKFAC(model), model, LOSS, [(x.clone(), y)]).to_dense()
    ekfac, params, statistics = EKFAC(model), dense.trainable(model), {}
    state = ekfac.init(params)
    buffer = torch.empty(2, 3)
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        buffer.copy_(x[part])
        z = model(buffer)
        loss = functional.cross_entropy(z, y[part], LOSS.weight, reduction="sum") / weight(y)
        add_statistics(statistics, ekfac.measure(state, LossGraph(loss, params, z)))
    ekfac.update(state, Observation(params, statistics=statistics, parameters=params))
    assert dense.relative_error(ekfac.operator(state).to_dense(), exact) < 1e-9


@pytest.mark.parametrize("fisher", ["type-2", "mc"])
def test_a_first_step_too_large_to_hold(fisher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "HELD", 10)
    model, (x, y) = CASES["perceptron"]()
    exact = estimate(EKFAC(model, fisher=fisher), model, LOSS, [(x, y)]).to_dense()
    ekfac = EKFAC(model, fisher=fisher)
    state = ekfac.init(dense.trainable(model))
    observe(ekfac, state, model, [(x, y)], weight(y))  # one part is looked at twice
    assert dense.relative_error(ekfac.operator(state).to_dense(), exact) < 1e-9
    state = ekfac.init(dense.trainable(model))
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    with pytest.warns(UserWarning, match="too many samples to hold.*starts from K-FAC's eigenvalues"):
        observe(ekfac, state, model, parts, weight(y))
    product = estimate(KFAC(model, fisher=fisher), model, LOSS, [(x, y)]).to_dense()
    assert dense.relative_error(ekfac.operator(state).to_dense(), product) < 1e-9
    # With the bases known, the second step's micro-batches measure S: with β = 0 it is the estimate.
    forgetful = EKFAC(model, beta=0.0, fisher=fisher)
    state = forgetful.init(dense.trainable(model))
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            observe(forgetful, state, model, parts, weight(y))
        state["draws"] = 0
    assert dense.relative_error(forgetful.operator(state).to_dense(), exact) < 1e-8


def test_nothing_is_held_after_the_first_step() -> None:
    model, (x, y) = CASES["perceptron"]()
    ekfac = EKFAC(model)
    state = ekfac.init(dense.trainable(model))
    observe(ekfac, state, model, [(x, y)], weight(y))
    assert TRANSIENT not in state
    z = model(x)
    loss = functional.cross_entropy(z, y)
    ekfac.measure(state, LossGraph(loss, dense.trainable(model), z))
    assert state[TRANSIENT].held is None


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


def dense_basis(state: dict[str, Any]) -> Tensor:
    """(P, P), the columns in the order of S: Q_G ⊗ Q_A for the weight of a linear layer without bias."""
    return torch.kron(state["G_vectors"][0][0], state["A_vectors"][0][0])


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_later_moments_are_a_running_mean_and_a_new_basis_keeps_the_blocks_diagonal(interval: int) -> None:
    """George et al. 2018 literally: S is averaged in the basis at hand; a new one takes the diagonal B has in it."""
    beta, refreshed = 0.7, []
    model = nn.Linear(3, 2, bias=False).double()
    params = dense.trainable(model)
    estimator = EKFAC(
        model, fisher="empirical", likelihood="categorical", beta=beta, inverse_interval=interval
    )
    state = estimator.init(params)
    g = torch.Generator().manual_seed(3)
    B: Tensor | None = None
    for t in range(1, 7):
        x, y = torch.randn(5, 3, generator=g, dtype=torch.float64), torch.randint(0, 2, (5,), generator=g)
        before = None if B is None else dense_basis(state)
        z = model(x)
        loss = functional.cross_entropy(z, y)
        statistics = estimator.measure(state, LossGraph(loss, params, z))
        estimator.update(state, Observation(params, statistics=statistics, parameters=params))
        found, Q = estimator.operator(state).to_dense(), dense_basis(state)
        each = [
            dense.gradient(functional.cross_entropy(z[n : n + 1], y[n : n + 1]), params) for n in range(5)
        ]
        if before is None or B is None:
            measured_in = Q
            S = torch.stack([(Q.T @ u) ** 2 for u in each]).mean(0)
        else:
            measured_in = before
            new = torch.stack([(before.T @ u) ** 2 for u in each]).mean(0)
            share = (1 - beta) / (1 - beta**t)
            S = (1 - share) * (before.T @ B @ before).diagonal() + share * new
        B = measured_in @ torch.diag(S) @ measured_in.T
        refreshed.append(before is not None and not torch.equal(before, Q))
        B = Q @ torch.diag((Q.T @ B @ Q).diagonal()) @ Q.T
        torch.testing.assert_close(found, B, rtol=1e-10, atol=1e-14)
    assert 0 < sum(refreshed) <= 5
    assert interval == 1 or not all(refreshed[1:])
