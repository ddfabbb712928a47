"""The diagonal from products: XDiag.

Legend: B symmetric (P, P), ω_i random signs, Y = [B ω_1 …] = Q R, s_i the direction that only vector i brought.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.protocols import CurvatureOperator
from curvature.spectrum.flat import FlatOperator, check_products
from curvature.spectrum.trace import leave_one_out_directions


@dataclass(frozen=True)
class EstimatedDiagonal:
    """A random estimate of a diagonal.

    Args:
        value: shaped like the parameters.
        standard_error: of every element, shaped like the parameters; NaN where the random signs depended on each
            other, as few signs may.
        products: products with B that it took.
    """

    value: list[Tensor]
    standard_error: list[Tensor]
    products: int


def xdiag(
    operator: CurvatureOperator, products: int = 30, *, seed: int = 0, like: Sequence[Tensor] | None = None
) -> EstimatedDiagonal:
    """diag(B) by the exchangeable estimator: exact on a sketched range, random signs on what is left.

    Unbiased. Where B is nearly diagonal, plain probes (:class:`curvature.HutchinsonDiagonal`) do as well with less
    memory; where its spectrum decays this is far more precise.

    Args:
        operator: B, symmetric.
        products: K >= 4; at most 2 P are used, and with 2 P the diagonal is exact.
        seed: of the signs.
        like: the parameters, where the operator does not know their shapes.

    Returns:
        estimate and standard error, shaped like the parameters.

    >>> from curvature import DiagonalOperator
    >>> estimate = xdiag(DiagonalOperator([torch.tensor([5.0, 2.0])]), products=4)
    >>> [d.round(decimals=4) for d in estimate.value]
    [tensor([5., 2.])]

    Cost: K products, O(P K²) beside them, 3 K/2 vectors of memory.
    Reference: Epperly, Tropp & Webber 2024, arXiv 2301.07825, section 2.4.
    """
    check_products(products, 4)
    B = FlatOperator(operator, like)
    m = min(products // 2, B.size)
    Omega = B.signs(m, seed)
    Q, R = torch.linalg.qr(B.columns(Omega))
    Z = B.columns(Q)
    caught = (Q * Z).sum(1)  # diag(Q Qᵀ B)
    if m == B.size:  # Q is square
        zeros = [torch.zeros_like(x) for x in B.unflatten(caught)]
        return EstimatedDiagonal(B.unflatten(caught), zeros, B.products)
    S, range_of_sketch = leave_one_out_directions(R)
    if range_of_sketch is not None:
        # B has rank < m, or signs repeat up to a factor, which few of them in a small space may do: the columns of Q
        # outside the sketch's range are no part of it.
        caught = ((Q @ range_of_sketch) * Z).sum(1)
    QS = Q @ S
    # (I - Q_(i) Q_(i)ᵀ) B ω_i = Q s_i (s_iᵀ R e_i), and ω² = 1.
    samples = Omega * QS * (S * R).sum(0) - QS * (Z @ S)
    error = samples.std(dim=1) / m**0.5
    if range_of_sketch is not None and int(torch.linalg.matrix_rank(Omega)) < m:
        error = torch.full_like(error, float("nan"))  # samples of repeated signs agree, and tell nothing
    return EstimatedDiagonal(B.unflatten(caught + samples.mean(1)), B.unflatten(error), B.products)
