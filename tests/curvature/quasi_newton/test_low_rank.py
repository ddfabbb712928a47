"""Low-rank curvature: Nyström as its formula, Lanczos as the leading eigenpairs, an exact damped solve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from curvature import LossGraph, LowRank, LowRankOperator, Observation, SingularCurvatureError, estimate
from curvature.low_rank import nystrom
from curvature.vectors import flatten, unflatten
from tests.curvature import dense
from tests.curvature.matrix_free import cases
from tests.curvature.spectrum import matrices


def gauss_newton(case: cases.Case) -> Tensor:
    model, loss_fn, x, y = case
    z = model(x)
    return dense.gauss_newton(loss_fn(z, y), z, dense.trainable(model))


def orthonormal(n: int, k: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0].T


def test_nystrom_equals_its_formula() -> None:
    B = matrices.decaying(30)
    Omega = orthonormal(30, 6)
    U, mu = nystrom(Omega, Omega @ B)
    Y = B @ Omega.T
    expected = Y @ torch.linalg.pinv(Omega @ Y) @ Y.T
    assert dense.relative_error(U.T @ torch.diag(mu) @ U, expected) < 1e-10
    assert dense.relative_error(U @ U.T, torch.eye(6, dtype=torch.float64)) < 1e-12
    assert (mu[:-1] >= mu[1:]).all()


def test_nystrom_of_a_matrix_of_lower_rank_is_exact() -> None:
    B = matrices.symmetric(torch.cat([torch.tensor([4.0, 2.0, 1.0]), torch.zeros(27)]))
    U, mu = nystrom(orthonormal(30, 6), orthonormal(30, 6) @ B)
    assert dense.relative_error(U.T @ torch.diag(mu) @ U, B) < 1e-8


def test_nystrom_of_an_indefinite_matrix_is_refused() -> None:
    Omega = orthonormal(60, 30)
    with pytest.raises(ArithmeticError, match="not positive semidefinite"):
        nystrom(Omega, Omega @ matrices.indefinite())
    with pytest.raises(ArithmeticError, match="not finite"):
        nystrom(Omega, Omega * float("nan"))


def test_nystrom_of_zero_is_zero() -> None:
    Omega = orthonormal(10, 3)
    U, mu = nystrom(Omega, torch.zeros_like(Omega))
    assert not mu.any()
    assert dense.relative_error(U @ U.T, torch.eye(3, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("method", ["nystrom", "lanczos"])
def test_full_rank_is_the_matrix_itself(method: str) -> None:
    model, loss_fn, x, y = case = cases.classification()
    B = estimate(LowRank(rank=43, method=method), model, loss_fn, [(x, y)])  # type: ignore[arg-type]
    assert dense.relative_error(B.to_dense(), gauss_newton(case)) < 1e-7


def test_lanczos_gives_the_leading_eigenpairs_of_the_hessian_with_their_signs() -> None:
    model, loss_fn, x, y = cases.layer_norm()
    H = dense.hessian(loss_fn(model(x), y), dense.trainable(model))
    values, vectors = torch.linalg.eigh(H)
    top = values.abs().argsort(descending=True)[:8]
    assert values[top].min() < 0  # the premise: a negative one among them
    expected = vectors[:, top] @ torch.diag(values[top]) @ vectors[:, top].T
    B = estimate(LowRank(rank=8, of="hessian"), model, loss_fn, [(x, y)])
    assert dense.relative_error(B.to_dense(), expected) < 1e-3  # Lanczos stops at a residual of 1e-3


@pytest.mark.parametrize("method", ["nystrom", "lanczos"])
def test_split_of_the_data_gives_the_same(method: str) -> None:
    model, loss_fn, x, y = cases.classification()
    estimator = LowRank(rank=4, method=method)  # type: ignore[arg-type]
    whole = estimate(estimator, model, loss_fn, [(x, y)]).to_dense()
    parts = estimate(estimator, model, loss_fn, [(x[:3], y[:3]), (x[3:], y[3:])]).to_dense()
    assert dense.relative_error(parts, whole) < 1e-9


def observe(
    estimator: LowRank, state: dict, model: nn.Module, parts: list[tuple[float, Tensor, Tensor]]
) -> None:
    """One step of an optimizer: measure on every loss, add, update."""
    params = dense.trainable(model)
    graphs, sketch = [], None
    for share, x, y in parts:
        z = model(x)
        graphs.append(LossGraph(share * nn.functional.cross_entropy(z, y), params, z))
        found = estimator.measure(state, graphs[-1]) if estimator.due(state) else {}
        if found:
            new = found["sketch"]
            sketch = new if sketch is None else [a + b for a, b in zip(sketch, new, strict=True)]
    estimator.update(
        state,
        Observation(
            [None] * len(params),
            statistics={"sketch": sketch} if sketch else {},
            graphs=graphs,
            parameters=params,
        ),
    )


@pytest.mark.parametrize("method", ["nystrom", "lanczos"])
def test_step_of_an_optimizer_equals_the_one_shot_estimate(method: str) -> None:
    model, loss_fn, x, y = cases.classification()
    estimator = LowRank(rank=4, method=method, interval=2)  # type: ignore[arg-type]
    state = estimator.init(dense.trainable(model))
    observe(estimator, state, model, [(3 / 7, x[:3], y[:3]), (4 / 7, x[3:], y[3:])])
    expected = estimate(estimator, model, loss_fn, [(x, y)]).to_dense()
    first = estimator.operator(state).to_dense()
    assert dense.relative_error(first, expected) < 1e-9
    observe(estimator, state, model, [(1.0, x[:1], y[:1])])  # not due
    assert torch.equal(estimator.operator(state).to_dense(), first)
    observe(estimator, state, model, [(1.0, x[:1], y[:1])])  # due
    assert dense.relative_error(estimator.operator(state).to_dense(), first) > 1e-3


def test_repeated_refreshes_sharpen_the_approximation() -> None:
    model, _, x, y = case = cases.classification()
    G = gauss_newton(case)
    values, vectors = torch.linalg.eigh(G)
    best = vectors[:, -4:] @ torch.diag(values[-4:]) @ vectors[:, -4:].T
    estimator = LowRank(rank=4, interval=1, oversampling=0)
    state = estimator.init(dense.trainable(model))
    errors = []
    for _ in range(6):
        observe(estimator, state, model, [(1.0, x, y)])
        errors.append(float((estimator.operator(state).to_dense() - best).norm()))
    # Without fresh columns this is a subspace iteration on the true matrix.
    assert errors[5] < 0.2 * errors[0]


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_operator_equals_its_dense_matrix(shift: float) -> None:
    U, mu = orthonormal(12, 4), torch.tensor([3.0, 1.0, -0.2, 0.5], dtype=torch.float64)
    like = [torch.zeros(2, 3), torch.zeros(6)]
    basis = [torch.stack(parts) for parts in zip(*(unflatten(u, like) for u in U), strict=True)]
    B = LowRankOperator(basis, mu, torch.tensor(shift, dtype=torch.float64))
    D = shift * torch.eye(12, dtype=torch.float64) + U.T @ torch.diag(mu) @ U
    v = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert dense.relative_error(B.to_dense(), D) < 1e-14
    assert dense.relative_error(flatten(B.matvec(unflatten(v, like))), D @ v) < 1e-14
    assert dense.relative_error(flatten(B.diagonal()), D.diagonal()) < 1e-14
    for damping in (0.3, torch.tensor(1e-3)):
        expected = torch.linalg.solve(D + float(damping) * torch.eye(12, dtype=torch.float64), v)
        assert dense.relative_error(flatten(B.solve(unflatten(v, like), damping)), expected) < 1e-12


def test_singular_systems_are_refused() -> None:
    basis = [orthonormal(5, 2)]
    with pytest.raises(SingularCurvatureError, match="damping > 0"):
        LowRankOperator(basis, torch.ones(2, dtype=torch.float64)).solve([torch.ones(5)])
    with pytest.raises(SingularCurvatureError):  # γ + μ + λ = 0 along one direction
        LowRankOperator(basis, torch.tensor([-0.5, 1.0], dtype=torch.float64)).solve([torch.ones(5)], 0.5)
    full = LowRankOperator([orthonormal(5, 5)], torch.ones(5, dtype=torch.float64))
    v = torch.arange(5.0, dtype=torch.float64)
    assert dense.relative_error(full.solve([v])[0], v) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be >= 1"),
        ({"rank": 1, "interval": 0}, "interval must be >= 1"),
        ({"rank": 1, "oversampling": -1}, "oversampling must be >= 0"),
        ({"rank": 1, "of": "fisher"}, "of must be"),
        ({"rank": 1, "method": "power"}, "method must be"),
        ({"rank": 1, "of": "hessian", "method": "nystrom"}, "use method='lanczos'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRank(**options)  # type: ignore[arg-type]
