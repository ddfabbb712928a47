"""SOAP against the paper's algorithms 3 and 4 written in NumPy (arXiv 2409.11321)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curvature import SOAP, Observation


def gradients(shapes: list[tuple[int, ...]], steps: int, seed: int = 0) -> list[list[torch.Tensor]]:
    """With a few strong directions that turn, so that eigenvalues change places."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for t in range(steps):
        step = []
        for s in shapes:
            scale = 1.0 + 3.0 * torch.cos(torch.arange(s[0], dtype=torch.float64) + 0.7 * t).abs()
            noise = torch.randn(s, generator=generator, dtype=torch.float64)
            step.append(noise * scale.reshape([-1] + [1] * (len(s) - 1)))
        drawn.append(step)
    return drawn


class LiteralSOAP:
    """One square matrix, whose factors have unique eigenvectors.

    The first step is Adam's; then algorithm 3 from the first gradient's basis."""

    def __init__(
        self, beta: float, factor_beta: float, interval: int, eps: float, every_step_until: int = 0
    ) -> None:
        self.beta, self.factor_beta, self.interval, self.eps = beta, factor_beta, interval, eps
        self.every_step_until = every_step_until
        self.t, self.sorted = 0, 0
        self.V: np.ndarray | float = 0.0
        self.L = self.R = None

    def solve(self, G: np.ndarray, M: np.ndarray) -> np.ndarray:
        self.t += 1
        if self.t == 1:
            self.L, self.R = G @ G.T, G.T @ G
            return M / (np.abs(G) + self.eps)
        if self.t == 2:
            self.QL, self.QR = (np.linalg.eigh(A)[1][:, ::-1] for A in (self.L, self.R))
        rotated = self.QL.T @ G @ self.QR
        self.V = self.beta * self.V + (1 - self.beta) * rotated**2
        V_hat = self.V / (1 - self.beta ** (self.t - 1))
        step = self.QL @ ((self.QL.T @ M @ self.QR) / (np.sqrt(V_hat) + self.eps)) @ self.QR.T
        b = self.factor_beta
        w = (1 - b) / (1 - b**self.t)
        self.L = (1 - w) * self.L + w * G @ G.T
        self.R = (1 - w) * self.R + w * G.T @ G
        if self.t <= self.every_step_until or (self.t - 1) % self.interval == 0:
            self.QL, order = self.refreshed(self.L, self.QL)
            self.V = self.V[order]
            self.QR, order = self.refreshed(self.R, self.QR)
            self.V = self.V[:, order]
        return step

    def refreshed(self, A: np.ndarray, Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(-np.einsum("ij,ik,kj->j", Q, A, Q))
        self.sorted += int((order != np.arange(len(order))).any())
        return np.linalg.qr((A @ Q)[:, order])[0], order


@pytest.mark.parametrize(("interval", "until"), [(1, 0), (3, 0), (7, 12)])
def test_step_equals_the_papers(interval: int, until: int) -> None:
    literal = LiteralSOAP(beta=0.9, factor_beta=0.8, interval=interval, eps=1e-2, every_step_until=until)
    estimator = SOAP(beta=0.9, factor_beta=0.8, interval=interval, eps=1e-2, every_step_until=until)
    state = estimator.init([torch.zeros(5, 5, dtype=torch.float64)])
    generator = torch.Generator().manual_seed(1)
    for [G] in gradients([(5, 5)], 40):
        v = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        estimator.update(state, Observation(gradient=[G]))
        [step] = estimator.operator(state).solve([v])
        np.testing.assert_allclose(step.numpy(), literal.solve(G.numpy(), v.numpy()), rtol=1e-7, atol=1e-9)
    assert literal.sorted > 3  # the second moment was sorted with its basis, several times


def test_operator_is_symmetric_positive_and_exact() -> None:
    estimator = SOAP(interval=2, rotate_vectors=True, max_dim=5)
    shapes: list[tuple[int, ...]] = [(3, 6), (2, 2, 3), (4,)]
    state = estimator.init([torch.zeros(s, dtype=torch.float64) for s in shapes])
    for g in gradients(shapes, 7):
        estimator.update(state, Observation(gradient=g))
    B = estimator.operator(state)
    dense = B.to_dense()
    torch.testing.assert_close(dense, dense.T)
    assert bool((torch.linalg.eigvalsh(dense) > 0).all())
    torch.testing.assert_close(torch.cat([d.reshape(-1) for d in B.diagonal()]), dense.diagonal())
    [v] = gradients(shapes, 1, seed=3)
    solved = B.solve([a + 0.3 * b for a, b in zip(B.matvec(v), v, strict=True)], damping=0.3)
    for a, b in zip(solved, v, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    flat = torch.cat([x.reshape(-1) for x in v])
    torch.testing.assert_close(torch.cat([x.reshape(-1) for x in B.matvec(v)]), dense @ flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_gradients_of_low_rank_keep_the_basis_orthogonal_and_the_sum_of_the_moment(
    rank: int, dtype: torch.dtype
) -> None:
    """What does not depend on which basis rounding chooses for the directions that no gradient has."""
    estimator = SOAP(beta=0.9, interval=2)
    state = estimator.init([torch.zeros(6, 5, dtype=dtype)])
    generator = torch.Generator().manual_seed(rank)
    eps, total = torch.finfo(dtype).eps, 0.0
    left = torch.randn(6, rank, generator=generator, dtype=torch.float64)  # the same directions at every step
    for t in range(30):
        G = (left @ torch.randn(rank, 5, generator=generator, dtype=torch.float64)).to(dtype)
        estimator.update(state, Observation(gradient=[G]))
        if t > 0:  # the first gradient has no basis, and leaves the moment
            total = 0.9 * total + 0.1 * float(G.double().square().sum())
        [moment], [flat] = state["second_moment"], state["bases"]
        if t > 0:
            assert abs(float(moment.double().sum()) - total) <= 1e3 * eps * total
        for Q in (flat[:36].reshape(6, 6), flat[36:].reshape(5, 5)):
            torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q), dtype=dtype), rtol=0, atol=1e2 * eps)
        assert bool(estimator.operator(state).solve([G])[0].isfinite().all())


def test_a_vector_and_a_long_dimension_are_adams() -> None:
    estimator = SOAP(beta=0.9, max_dim=2, interval=1)
    shapes: list[tuple[int, ...]] = [(4,), (3, 5)]
    state = estimator.init([torch.zeros(s, dtype=torch.float64) for s in shapes])
    v = [torch.zeros(s, dtype=torch.float64) for s in shapes]
    for t, g in enumerate(gradients(shapes, 5)):
        estimator.update(state, Observation(gradient=g))
        v = [0.1 * y**2 if t <= 1 else 0.9 * x + 0.1 * y**2 for x, y in zip(v, g, strict=True)]
        for a, b in zip(estimator.operator(state).diagonal(), v, strict=True):
            torch.testing.assert_close(a, (b / (1 - 0.9 ** max(t, 1))).sqrt() + 1e-8, rtol=1e-12, atol=0)


def test_a_parameter_without_a_gradient_keeps_its_state() -> None:
    estimator = SOAP(interval=100)
    state = estimator.init([torch.zeros(3, 3, dtype=torch.float64)] * 2)
    for t, (a, b) in enumerate(gradients([(3, 3), (3, 3)], 6)):
        before = [state[k][1].clone() for k in ("second_moment", "factors", "bases")]
        estimator.update(state, Observation(gradient=[a, b if t in (2, 4) else None]))
        same = [
            torch.equal(x, state[k][1])
            for x, k in zip(before, ("second_moment", "factors", "bases"), strict=True)
        ]
        assert same == [t not in (2, 4)] * 2 + [t != 4]  # the second gradient brings the basis
    assert state["decomposed"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
        ({"factor_beta": -0.1}, r"factor_beta must be in \[0, 1\), got -0.1"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"interval": 0}, "interval must be >= 1, got 0"),
        ({"every_step_until": -1}, "every_step_until must be >= 0, got -1"),
        ({"max_dim": 0}, "max_dim must be >= 1 or None, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOAP(**arguments)
