"""Shampoo against its equations in NumPy (arXiv 1802.09568), and its operator against dense Kronecker products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from curvature import (
    LBFGS,
    SOAP,
    EmpiricalFisherDiagonal,
    Hessian,
    Observation,
    RootDiagonal,
    Shampoo,
    SingularCurvatureError,
)
from curvature.tensor_blocks import blocks_of


def gradients(shapes: list[tuple[int, ...]], steps: int, seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(steps)]


def root(A: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(A)
    return (vectors * values**exponent) @ vectors.T


def literal_factors(sequence: list[np.ndarray], beta: float) -> list[np.ndarray]:
    """Σ w_t G_(i)G_(i)ᵀ for every dimension; weights βᵗ normalised to 1, or ones for β = 1."""
    weights = np.array([beta ** (len(sequence) - 1 - t) for t in range(len(sequence))])
    if beta != 1.0:
        weights /= weights.sum()
    factors = []
    for i in range(sequence[0].ndim):
        unfolded = [np.moveaxis(G, i, 0).reshape(G.shape[i], -1) for G in sequence]
        factors.append(sum(w * U @ U.T for w, U in zip(weights, unfolded, strict=True)))
    return factors


def literal_solve(v: np.ndarray, factors: list[np.ndarray], eps: float, exponent: float) -> np.ndarray:
    for i, L in enumerate(factors):
        v = np.moveaxis(np.tensordot(root(L + eps * np.eye(len(L)), -exponent), v, axes=([1], [i])), 0, i)
    return v


@pytest.mark.parametrize("beta", [1.0, 0.9])
@pytest.mark.parametrize(
    ("shape", "exponent"), [((4, 6), None), ((5,), None), ((3, 2, 4), None), ((4, 6), 0.5)]
)
def test_step_equals_the_papers(shape: tuple[int, ...], exponent: float | None, beta: float) -> None:
    eps = 1e-3
    estimator = Shampoo(beta=beta, eps=eps, exponent=exponent, interval=1)
    state = estimator.init([torch.zeros(shape, dtype=torch.float64)])
    seen: list[np.ndarray] = []
    generator = torch.Generator().manual_seed(1)
    for [G] in gradients([shape], 12):
        seen.append(G.numpy())
        estimator.update(state, Observation(gradient=[G]))
        v = torch.randn(shape, generator=generator, dtype=torch.float64)
        e = exponent if exponent is not None else 1 / (2 * len(shape))
        expected = literal_solve(v.numpy(), literal_factors(seen, beta), eps, e)
        [step] = estimator.operator(state).solve([v])
        np.testing.assert_allclose(step.numpy(), expected, rtol=1e-9)


def test_blocks_equal_separate_parameters() -> None:
    estimator = Shampoo(beta=0.9, interval=1, block_size=3, eps=1e-6)
    whole, parts = torch.zeros(5, 4, dtype=torch.float64), [(3, 3), (3, 1), (2, 3), (2, 1)]
    state = estimator.init([whole])
    separate = estimator.init([torch.zeros(s, dtype=torch.float64) for s in parts])

    def cut(G: torch.Tensor) -> list[torch.Tensor]:
        return [G[:3, :3], G[:3, 3:], G[3:, :3], G[3:, 3:]]

    for [G] in gradients([(5, 4)], 5):
        estimator.update(state, Observation(gradient=[G]))
        estimator.update(separate, Observation(gradient=cut(G)))
    [v] = gradients([(5, 4)], 1, seed=2)[0]
    [step] = estimator.operator(state).solve([v])
    for a, b in zip(cut(step), estimator.operator(separate).solve(cut(v)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


def test_blocks_cover_every_element_once() -> None:
    for shape in [(), (7,), (5, 4), (3, 5, 2)]:
        covered = torch.zeros(shape)
        for block in blocks_of(shape, 2, None, 1):
            covered[block.index] += 1
            assert covered[block.index].shape == block.shape
        assert bool((covered == 1).all())


def test_operator_is_the_kronecker_product_of_the_roots() -> None:
    estimator = Shampoo(beta=1.0, eps=0.01, interval=1)
    shapes = [(2, 3), (2, 2, 2), (4,), ()]
    params = [torch.zeros(s, dtype=torch.float64) for s in shapes]
    state = estimator.init(params)
    sequence = gradients(shapes, 6)
    for g in sequence:
        estimator.update(state, Observation(gradient=g))
    B = estimator.operator(state)
    dense = B.to_dense()
    at = 0
    for i, shape in enumerate(shapes):
        size = int(np.prod(shape))
        if shape:
            roots = [
                root(L + 0.01 * np.eye(len(L)), 0.5 / len(shape))
                for L in literal_factors([g[i].numpy() for g in sequence], 1.0)
            ]
            expected = np.ones((1, 1))
            for r in roots:
                expected = np.kron(expected, r)
            np.testing.assert_allclose(
                dense[at : at + size, at : at + size].numpy(), expected, rtol=1e-8, atol=1e-10
            )
        at += size
    torch.testing.assert_close(dense, dense.T)
    assert bool((torch.linalg.eigvalsh(dense) > 0).all())
    torch.testing.assert_close(torch.cat([d.reshape(-1) for d in B.diagonal()]), dense.diagonal())
    [v] = gradients(shapes, 1, seed=3)
    solved = B.solve([a + 0.3 * b for a, b in zip(B.matvec(v), v, strict=True)], damping=0.3)
    for a, b in zip(solved, v, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_roots_stand_still_between_refreshes_and_a_new_parameter_does_not_wait() -> None:
    estimator = Shampoo(interval=4)
    params = [torch.zeros(3, 3, dtype=torch.float64)] * 2
    state = estimator.init(params)
    [v] = gradients([(3, 3)], 1, seed=5)[0]
    steps = []
    for t, (a, b) in enumerate(gradients([(3, 3), (3, 3)], 9)):
        estimator.update(state, Observation(gradient=[a, None if t < 2 else b]))
        steps.append([s.clone() for s in estimator.operator(state).solve([v, v])])
    moved = [[not torch.equal(steps[t][i], steps[t - 1][i]) for t in range(1, 9)] for i in range(2)]
    assert moved[0] == [False, False, False, True, False, False, False, True]
    assert moved[1] == [
        False,
        True,
        False,
        True,
        False,
        False,
        False,
        True,
    ]  # its first gradient is that of step 2


def test_grafted_step_has_the_others_length_and_its_own_direction() -> None:
    adam = RootDiagonal(EmpiricalFisherDiagonal(beta=0.9))
    grafted, plain = Shampoo(grafting=adam, interval=1), Shampoo(interval=1)
    shapes = [(4, 3), (5,)]
    params = [torch.zeros(s, dtype=torch.float64) for s in shapes]
    states = [e.init(params) for e in (grafted, plain, adam)]
    for g in gradients(shapes, 5):
        for e, state in zip((grafted, plain, adam), states, strict=True):
            e.update(state, Observation(gradient=g))
    a, b, c = (e.operator(s).solve(g) for e, s in zip((grafted, plain, adam), states, strict=True))
    for x, y, z in zip(a, b, c, strict=True):
        torch.testing.assert_close(x.norm(), z.norm(), rtol=1e-10, atol=0)
        torch.testing.assert_close(x / x.norm(), y / y.norm(), rtol=1e-10, atol=1e-12)


def test_float32_singular_factors_give_finite_steps() -> None:
    estimator = Shampoo()
    state = estimator.init([torch.zeros(50, 40)])
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(50, 1, generator=generator) @ torch.randn(1, 40, generator=generator)
    estimator.update(state, Observation(gradient=[G]))
    [step] = estimator.operator(state).solve([G])
    # G = σ u vᵀ has the step u vᵀ; rounding must not be amplified by the inverse root of a zero eigenvalue
    torch.testing.assert_close(step, G / torch.linalg.matrix_norm(G, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", [Shampoo(interval=1, eps=1e-3), SOAP(interval=1, rotate_vectors=True)])
def test_a_tensor_of_order_0_is_one_of_order_1_with_one_element(estimator: Any) -> None:
    state = estimator.init([torch.zeros(s, dtype=torch.float64) for s in [(), (1,)]])
    for [g] in gradients([(1,)], 5):
        estimator.update(state, Observation(gradient=[g.reshape(()), g]))
    B = estimator.operator(state)
    v = torch.tensor([2.0], dtype=torch.float64)
    for found in (B.solve([v.reshape(()), v]), B.matvec([v.reshape(()), v]), B.diagonal()):
        assert [x.shape for x in found] == [(), (1,)]
        assert torch.equal(found[0].reshape(1), found[1])
    assert B.diagonal()[0] != 1


def test_an_overflow_names_the_remedy() -> None:
    estimator = Shampoo(interval=1)
    p = torch.zeros(2, 2)
    state = estimator.init([p])
    with pytest.raises(ValueError, match=r"not finite.*clip the gradients"):
        estimator.update(state, Observation(gradient=[torch.full((2, 2), 1e20)]))


@pytest.mark.parametrize("other", [LBFGS(), Hessian(hvp="finite-difference"), Hessian()])
def test_grafting_of_what_needs_more_than_the_steps_gradients_is_refused(other: Any) -> None:
    with pytest.raises(ValueError, match=f"only.* gradients.*, got {type(other).__name__}"):
        Shampoo(grafting=other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.1}, r"beta must be in \[0, 1\], got 1.1"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"exponent": 0.0}, "exponent must be > 0 or None, got 0.0"),
        ({"interval": 0}, "interval must be >= 1, got 0"),
        ({"block_size": 0}, "block_size must be >= 1 or None, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shampoo(**arguments)


def test_a_zero_damping_on_a_zero_value_raises() -> None:
    from curvature.rotated_diagonal import RotatedDiagonalOperator
    from curvature.tensor_blocks import identity_storage, views

    p = torch.zeros(2, 2)
    blocks = blocks_of(p.shape, None, None, 1)
    B = RotatedDiagonalOperator(
        [torch.tensor([[1.0, 0.0], [1.0, 1.0]])], [views(identity_storage(p, blocks), blocks)], [blocks]
    )
    with pytest.raises(SingularCurvatureError, match="damping > 0"):
        B.solve([p])
    assert torch.equal(B.solve([torch.ones(2, 2)], damping=1.0)[0], torch.tensor([[0.5, 1.0], [0.5, 0.5]]))
