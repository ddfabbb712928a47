"""EK-FAC's bases by orthogonal iteration: orthonormal, tending to the eigenbasis, and measured like any other basis."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import EKFAC, LossGraph, Observation
from curvature.kronecker.orthogonal_iteration import iterate_many
from curvature.protocols import State
from optimizers import build
from tests.curvature import dense
from tests.curvature.kronecker.reference import block_diagonal, module_blocks

X = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * torch.tensor(
    [3.0, 1.0, 0.3]
)
Y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(2))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def positive(groups: int, size: int) -> Tensor:
    A = torch.randn(groups, 3 * size, size) * torch.arange(1.0, size + 1)
    return A.mT @ A


def test_iteration_tends_to_the_eigenbasis() -> None:
    M = positive(2, 5)
    _, Q = torch.linalg.eigh(positive(2, 5))
    for _ in range(400):
        [(values, Q)] = iterate_many([M], [Q])
        torch.testing.assert_close(Q.mT @ Q, torch.eye(5).expand(2, 5, 5))
        torch.testing.assert_close(values, torch.einsum("gji,gjk,gki->gi", Q, M, Q))
    expected, vectors = torch.linalg.eigh(M)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close((Q * vectors).sum(-2).abs(), torch.ones(2, 5))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_basis_of_a_singular_matrix_is_orthonormal(rank: int) -> None:
    X = torch.randn(1, rank, 5)
    [(values, Q)] = iterate_many([X.mT @ X], [torch.linalg.qr(torch.randn(1, 5, 5))[0]])
    torch.testing.assert_close(Q.mT @ Q, torch.eye(5).unsqueeze(0))
    assert int((values > 1e-12).sum()) == rank


def test_without_a_basis_a_matrix_is_decomposed() -> None:
    M, N = positive(1, 4), positive(1, 3)
    known = torch.linalg.qr(torch.randn(1, 3, 3))[0]
    (values, Q), (_, iterated), _ = iterate_many([M, N, M], [torch.zeros(1, 4, 4), known, M.new_empty(0)])
    expected = torch.linalg.eigh(M)
    torch.testing.assert_close((values, Q), (expected[0], expected[1]))
    torch.testing.assert_close(iterated, iterate_many([N], [known])[0][1])


def test_matrix_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        iterate_many([torch.full((1, 2, 2), torch.inf)], [torch.eye(2).unsqueeze(0)])


def observe(estimator: EKFAC, state: State, model: nn.Module) -> None:
    params, z = dense.trainable(model), model(X)
    statistics = estimator.measure(state, LossGraph(nn.functional.cross_entropy(z, Y), params, z))
    estimator.update(state, Observation(params, statistics=statistics, parameters=params))


def test_on_one_batch_the_curvature_tends_to_that_of_eigenbases() -> None:
    """Each step here has the same factors, so iteration converges to the bases that a decomposition finds at once."""
    operators = []
    for refresh, steps in (("eigh", 1), ("qr", 1), ("qr", 300)):
        model = network()
        estimator = EKFAC(model, beta=0.0, refresh=refresh)
        state = estimator.init(dense.trainable(model))
        if refresh == "qr":  # from the basis of other data
            noise = torch.randn(40, 3)
            z = model(noise)
            graph = LossGraph(nn.functional.cross_entropy(z, Y), dense.trainable(model), z)
            seen = Observation(
                graph.params, statistics=estimator.measure(state, graph), parameters=graph.params
            )
            estimator.update(state, seen)
        for _ in range(steps):
            observe(estimator, state, model)
        observe(estimator, state, model)
        operators.append(estimator.operator(state).to_dense())
    torch.testing.assert_close(operators[2], operators[0])
    assert (operators[1] - operators[0]).norm() > 1e-3 * operators[0].norm()  # one iteration is not there yet


def test_moments_are_the_best_diagonal_in_the_iterated_basis() -> None:
    """At a measurement without a refresh, with β = 0: Q diag(QᵀGQ) Qᵀ of the dense Gauss-Newton block G."""
    model = network()
    estimator = EKFAC(model, beta=0.0, inverse_interval=4, refresh="qr")
    params = dense.trainable(model)
    state = estimator.init(params)
    checked = 0
    for _ in range(14):
        before = [Q.clone() for Q in state["A_vectors"]]
        observe(estimator, state, model)
        if any(not torch.equal(a, b) for a, b in zip(before, state["A_vectors"], strict=True)):
            with torch.no_grad():
                for p in params:
                    p.mul_(0.9)  # the next measurement sees other factors than the bases do
            continue
        z = model(X)
        G = block_diagonal(
            dense.gauss_newton(nn.functional.cross_entropy(z, Y), z, params), module_blocks(model)
        )
        B = estimator.operator(state).to_dense()
        # what is left of G beside its best diagonal is orthogonal to every diagonal in that basis, B's among them
        torch.testing.assert_close((B * (G - B)).sum(), torch.zeros(()), atol=1e-12, rtol=0.0)
        assert (G - B).norm() > 1e-3 * G.norm()
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("place", ["everywhere", "owner"])
def test_only_the_first_bases_are_decomposed(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: found.append(M.shape[0]) or eigh(M))
    losses = train(network(), steps=6, refresh="qr", inverses=place)
    assert sum(found) == 4  # two layers, two factors each, in the first step
    assert losses[-1] < losses[0]


def train(model: nn.Module, steps: int, **options: Any) -> list[float]:
    optimizer = build(model, "ekfac", lr=0.3, damping="fixed", inverse_interval=2, seed=5, **options)
    losses = []
    for step in range(steps):
        if step == 3:  # a resumed run goes on from the bases that it had
            checkpoint = copy.deepcopy(optimizer.gathered_state_dict())
            optimizer = build(model, "ekfac", lr=0.3, damping="fixed", inverse_interval=2, seed=5, **options)
            optimizer.load_state_dict(checkpoint)
        optimizer.zero_grad()
        z = model(X)
        loss = nn.functional.cross_entropy(z, Y)
        optimizer.backward(loss, z)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_owners_iterate_as_everyone_would() -> None:
    assert train(network(), 8, refresh="qr", inverses="owner") == train(network(), 8, refresh="qr")
    assert train(network(), 8, refresh="qr") != train(network(), 8)


def test_refresh_is_checked() -> None:
    with pytest.raises(ValueError, match="refresh must be 'eigh' or 'qr', got 'QR'"):
        EKFAC(network(), refresh="QR")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="refresh='qr' is for EKFAC"):
        build(network(), "kfac", refresh="qr")
