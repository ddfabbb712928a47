"""The trace from products: Hutchinson, Hutch++ and XTrace.

Legend: B (P, P), K products, ω a random vector with E[ω ωᵀ] = I, Q an orthonormal basis of a sketch of B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.protocols import CurvatureOperator
from curvature.spectrum.flat import Estimated, FlatOperator, check_products


def hutchinson_trace(
    operator: CurvatureOperator, products: int = 30, *, seed: int = 0, like: Sequence[Tensor] | None = None
) -> Estimated:
    """tr(B) as the mean of ωᵀ B ω over random signs ω.

    Unbiased, of variance 2 Σ_{i≠j} B_ij² / K: right for a spectrum without a few dominating eigenvalues, else
    take :func:`xtrace`.

    Args:
        operator: B, symmetric.
        products: K >= 1.
        seed: of the signs.
        like: the parameters, where the operator does not know their shapes.

    Returns:
        estimate and standard error.

    >>> from curvature import DiagonalOperator
    >>> hutchinson_trace(DiagonalOperator([torch.tensor([1.0, 2.0])]), products=3).value
    tensor(3.)

    Cost: K products, 2 vectors of memory. References: Girard 1989; Hutchinson 1990.
    """
    check_products(products, 1)
    B = FlatOperator(operator, like)
    signs = (B.signs(1, seed * products + k)[:, 0] for k in range(products))  # one at a time: no more memory
    samples = torch.stack([torch.dot(w, B(w)) for w in signs])
    return Estimated(samples.mean(), _error_of_mean(samples), B.products)


def hutch_plus_plus(
    operator: CurvatureOperator, products: int = 30, *, seed: int = 0, like: Sequence[Tensor] | None = None
) -> Estimated:
    """tr(B) = tr(Qᵀ B Q) + tr((I - QQᵀ) B (I - QQᵀ)): exact on a sketched range, Hutchinson on what is left.

    With K/3 products each for the sketch, its trace and the rest. For a positive semidefinite B the relative error
    falls as 1/K, not as 1/√K.

    Args:
        operator: B, symmetric.
        products: K >= 3; a multiple of 3 is used fully.
        seed: of the signs.
        like: the parameters, where the operator does not know their shapes.

    Returns:
        estimate, and the standard error of its random part (NaN for K < 6).

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([5.0, 2.0, 0.0, 0.0, 0.0, 0.0])])
    >>> hutch_plus_plus(B, products=6).value
    tensor(7.0000)

    Cost: K products, O(P K²) beside them, 2 K/3 vectors of memory.
    Reference: Meyer, Musco, Musco & Woodruff 2021, arXiv 2010.09649, algorithm 1.
    """
    check_products(products, 3)
    B = FlatOperator(operator, like)
    third = min(products // 3, B.size)
    S, G = B.signs(third, 2 * seed), B.signs(products // 3, 2 * seed + 1)
    Q, _ = torch.linalg.qr(B.columns(S))
    caught = (Q * B.columns(Q)).sum()
    rest = G - Q @ (Q.T @ G)
    samples = (rest * B.columns(rest)).sum(0)
    return Estimated(caught + samples.mean(), _error_of_mean(samples), B.products)


def xtrace(
    operator: CurvatureOperator, products: int = 30, *, seed: int = 0, like: Sequence[Tensor] | None = None
) -> Estimated:
    """tr(B) by the exchangeable estimator: every test vector serves the sketch and, left out of it, the rest.

    Unbiased, and of the three the most precise for a spectrum that decays. For a symmetric B it needs K/2 test
    vectors, twice multiplied.

    Args:
        operator: B, symmetric.
        products: K >= 4; at most 2 P are used, and with 2 P the trace is exact.
        seed: of the test vectors.
        like: the parameters, where the operator does not know their shapes.

    Returns:
        estimate, and the standard error that the leave-one-out estimates suggest.

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([5.0, 2.0, 0.0, 0.0, 0.0, 0.0])])
    >>> xtrace(B, products=6).value.round(decimals=4)
    tensor(7.)

    Cost: K products, O(P K²) beside them, 3 K/2 vectors of memory.
    Reference: Epperly, Tropp & Webber 2024, arXiv 2301.07825, section 2.2 and its efficient form.
    """
    check_products(products, 4)
    B = FlatOperator(operator, like)
    m = min(products // 2, B.size)
    Omega = _spheres(B.normals(m, seed))
    Q, R = torch.linalg.qr(B.columns(Omega))
    S, range_of_sketch = leave_one_out_directions(R)
    Z = B.columns(Q)
    H = Q.T @ Z
    W = Q.T @ Omega
    # Q_(i) Q_(i)ᵀ = Q (I - s_i s_iᵀ) Qᵀ projects on the sketch without vector i.
    caught = H.diagonal().sum() - (S * (H @ S)).sum(0)
    X = W - S * (S * W).sum(0)  # Qᵀ times the part of ω_i inside that sketch
    outside = Omega - Q @ X
    left = _squares(outside)
    # ωᵀ (I - P_i) B (I - P_i) ω, with B ω_i = Q R e_i known from the sketch.
    BOmega = Q @ R
    quadratic = (Omega * BOmega).sum(0) - 2 * (X * (Q.T @ BOmega)).sum(0) + (X * (H @ X)).sum(0)
    # Normalised as a random direction of the (P - m + 1)-dimensional complement.
    dimension = B.size - m + 1
    scaled = torch.where(left > _floor(Omega), quadratic * dimension / left.clamp(min=_floor(Omega)), 0.0)
    samples = caught + scaled
    if range_of_sketch is not None:
        # Gaussian vectors are independent: B has rank < m to working precision, and the sketch holds all of it.
        return Estimated(H.diagonal().sum(), torch.zeros_like(samples[0]), B.products)
    return Estimated(samples.mean(), _error_of_mean(samples), B.products)


def leave_one_out_directions(R: Tensor) -> tuple[Tensor, Tensor | None]:
    """Unit vectors s_i with Q s_i orthogonal to every column of Y = Q R but the i-th: the columns of R⁻ᵀ, normalised.

    Args:
        R: (m, m), upper triangular.

    Returns:
        S, (m, m), a column a direction; and where R is singular to working precision the projector (m, m) on its
        range, else ``None``. Column i of S is then within that range, and zero where vector i brought nothing: the
        others span the same without it.
    """
    m, eps = R.shape[0], torch.finfo(R.dtype).eps
    diagonal = R.diagonal().abs()
    if bool((diagonal > m * eps * diagonal.amax().clamp(min=torch.finfo(R.dtype).tiny)).all()):
        inverse = torch.linalg.solve_triangular(R, torch.eye(m, dtype=R.dtype, device=R.device), upper=True)
        S = inverse.T
        return S / torch.linalg.vector_norm(S, dim=0), None
    U, singular, Vh = torch.linalg.svd(R)
    held = singular > m * eps * singular[0]
    U, V = U[:, held], Vh[held].T
    S = U @ (V / singular[held]).T  # the transpose of R's pseudo-inverse
    # e_i lies in the row space exactly where column i of R is no combination of the others.
    alone = V.square().sum(1) > 1.0 - m * eps**0.5
    lengths = torch.linalg.vector_norm(S, dim=0)
    return torch.where(alone, S / torch.where(lengths > 0, lengths, 1.0), 0.0), U @ U.T


def _spheres(X: Tensor) -> Tensor:
    """Columns scaled to length √P."""
    scale: Tensor = X.shape[0] ** 0.5 / torch.linalg.vector_norm(X, dim=0)
    return X * scale


def _squares(X: Tensor) -> Tensor:
    return (X * X).sum(0)


def _floor(Omega: Tensor) -> float:
    """Below this a squared length is rounding."""
    return float(Omega.shape[0] * torch.finfo(Omega.dtype).eps)


def _error_of_mean(samples: Tensor) -> Tensor:
    if len(samples) < 2:
        return torch.full_like(samples[0], float("nan"))
    return samples.std().div(len(samples) ** 0.5)
