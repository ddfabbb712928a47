"""Extreme eigenvalues and their vectors, by Lanczos.

Legend: (θ, x) a Ritz pair, ‖B x - θ x‖ its residual, which bounds the distance of θ to an eigenvalue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from curvature.lanczos import Lanczos
from curvature.protocols import CurvatureOperator
from curvature.spectrum.flat import FlatOperator

Which = Literal["largest", "smallest", "magnitude"]


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues with their vectors, the most extreme first.

    Args:
        eigenvalues: (k,).
        eigenvectors: k lists of tensors shaped like the parameters, each of length 1.
        residuals: ‖B x - θ x‖ of every pair, (k,): an eigenvalue lies so near.
        products: products with B that it took.
        converged: whether every residual is within the tolerance.
    """

    eigenvalues: Tensor
    eigenvectors: list[list[Tensor]]
    residuals: Tensor
    products: int
    converged: bool


def extreme_eigenvalues(
    operator: CurvatureOperator,
    count: int = 1,
    which: Which = "largest",
    *,
    tolerance: float = 1e-4,
    max_products: int = 200,
    seed: int = 0,
    like: Sequence[Tensor] | None = None,
) -> Eigenpairs:
    """The ``count`` largest or smallest (algebraic) eigenvalues, or those largest in magnitude.

    Lanczos from a random start with full reorthogonalisation. An eigenvalue of higher multiplicity is found as
    often as needed only once its Krylov space is exhausted; where multiplicities matter, compare with
    ``scipy.sparse.linalg.eigsh(curvature.to_scipy(B))``.

    Args:
        operator: B, symmetric.
        count: k >= 1, at most P.
        which: ``"largest"``, ``"smallest"`` (most negative) or ``"magnitude"``.
        tolerance: on the residuals, relative to the largest Ritz value in magnitude.
        max_products: the iteration ends there; ``converged`` then says ``False``.
        seed: of the start.
        like: the parameters, where the operator does not know their shapes.

    Returns:
        the pairs, with residuals.

    Raises:
        ValueError: for a count that is not within 1 … min(P, max_products).
        ArithmeticError: where a product is not finite.

    >>> import torch
    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([1.0, 5.0, 3.0, -2.0])])
    >>> extreme_eigenvalues(B, count=2).eigenvalues.round(decimals=4)
    tensor([5., 3.])

    Cost: m products, O(m² P) beside them, m vectors of memory, m the steps taken. Reference: Parlett 1998.
    """
    B = FlatOperator(operator, like)
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {', '.join(map(repr, get_args(Which)))}, got {which!r}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")
    if not 1 <= count <= min(B.size, max_products):
        raise ValueError(
            f"count must be within 1 and {min(B.size, max_products)} (P or max_products), got {count}"
        )
    process = Lanczos(B, B.normals(1, seed)[:, 0])
    check_at = count
    while True:
        if process.closed:
            process.restart(B.normals(1, seed + process.steps + 1)[:, 0])
        process.step()
        done = process.steps >= min(max_products, B.size)
        if process.steps < check_at and not done:
            continue
        check_at = process.steps + max(2, process.steps // 10)
        tridiagonal = process.result()
        theta, s = tridiagonal.eigh()
        order = {"largest": theta.argsort(descending=True), "smallest": theta.argsort()}.get(
            which, theta.abs().argsort(descending=True)
        )[:count]
        residuals = tridiagonal.ritz_residuals(s)[order]
        converged = bool((residuals <= tolerance * theta.abs().amax()).all())
        # A closed space may hide further copies of an eigenvalue, so it counts only when nothing is left outside.
        if done or (converged and not process.closed):
            X = s[:, order].T @ tridiagonal.basis
            return Eigenpairs(theta[order], [B.unflatten(x) for x in X], residuals, B.products, converged)
