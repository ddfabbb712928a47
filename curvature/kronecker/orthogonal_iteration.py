"""Eigenbases followed by one step of orthogonal iteration, in place of a new eigendecomposition at every refresh.

Legend: M a symmetric positive semidefinite matrix, Q the basis of before. Q ← qr(M Q P), P sorting the columns by
qᵀMq: where M moves slowly Q follows its eigenvectors. It is orthonormal whatever M did, and nearly the eigenbasis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.kronecker.eigen import Pairs, check_finite, eigh_here, shared


def iterate_many(matrices: Sequence[Tensor], before: Sequence[Tensor]) -> Pairs:
    """(values, vectors) of every matrix, with values qᵀMq in about ascending order; divided among the ranks.

    A matrix that had no basis is decomposed.

    Args:
        matrices: symmetric positive semidefinite, (groups, n, n) each; never changed.
        before: the orthonormal vectors of each; zeros, or no elements, where there are none.

    Raises:
        ValueError: for a matrix with a NaN or an infinity.

    >>> M = torch.tensor([[[2.0, 0.1], [0.1, 1.0]]])
    >>> values, vectors = iterate_many([M], [torch.eye(2).flip(-1).unsqueeze(0)])[0]
    >>> values
    tensor([[0.9925, 2.0075]])
    >>> torch.linalg.eigvalsh(M)
    tensor([[0.9901, 2.0099]])

    Cost: two products and a QR decomposition of n x n, about half of an eigendecomposition's time on a CPU, and less of
    it on an accelerator, on the rank that does it.
    Reference: Golub & Van Loan, Matrix Computations, section 8.2.4; in this use Vyas et al. 2024 (SOAP, arXiv
    2409.11321), algorithm 4.
    """
    return shared(iterate_here, matrices, before)


def iterate_here(matrices: Sequence[Tensor], before: Sequence[Tensor]) -> Pairs:
    """:func:`iterate_many` of one process."""
    new = [not Q.numel() or not bool(Q.any()) for Q in before]
    first = iter(eigh_here([M for M, is_new in zip(matrices, new, strict=True) if is_new]))
    return [
        next(first) if is_new else _iterated(M, Q) for M, Q, is_new in zip(matrices, before, new, strict=True)
    ]


def _iterated(M: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    check_finite(M)
    product = M @ Q
    # the leading vectors first: a column is made orthogonal to those before it
    order = (Q * product).sum(-2).argsort(-1, descending=True).unsqueeze(-2)
    Q = torch.linalg.qr(product.gather(-1, order.expand_as(product)))[0].flip(-1)
    return (Q * (M @ Q)).sum(-2).clamp(min=0.0), Q
