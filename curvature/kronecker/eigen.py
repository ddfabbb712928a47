"""Eigendecompositions of many symmetric matrices: equal sizes together, and once more in float64 where one fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvature.shared_work import divided

Pairs = list[tuple[Tensor, Tensor]]
Decomposition = Callable[[Sequence[Tensor], Sequence[Tensor]], Pairs]
"""(values, vectors) of matrices, from them and the vectors of before: zeros, or none at all, where there were none."""


def eigh_many(matrices: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Pairs:
    """(values, vectors) of every matrix, values ascending and >= 0; divided among the ranks that hold them all.

    Args:
        matrices: symmetric positive semidefinite, (groups, n, n) each; never changed.
        before: not used: every decomposition starts anew.

    Raises:
        ValueError: for a matrix with a NaN or an infinity.

    >>> values, vectors = eigh_many([torch.diag(torch.tensor([2.0, 1.0])).unsqueeze(0)])[0]
    >>> values
    tensor([[1., 2.]])

    Cost: O(n³) a matrix, on the rank that does it.
    """
    return shared(eigh_here, matrices, before)


def shared(decompose: Decomposition, matrices: Sequence[Tensor], before: Sequence[Tensor]) -> Pairs:
    """``decompose`` of every matrix, divided by cost among the ranks that hold them all."""

    def compute(indices: Sequence[int]) -> list[list[Tensor]]:
        own = decompose([matrices[i] for i in indices], [before[i] for i in indices] if before else ())
        return [list(pair) for pair in own]

    costs = [float(m.shape[0]) * float(m.shape[-1]) ** 3 for m in matrices]
    found = divided(
        costs, compute, lambda i: [torch.empty_like(matrices[i][..., 0]), torch.empty_like(matrices[i])]
    )
    return [(values, vectors) for values, vectors in found]


def eigh_here(matrices: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Pairs:
    """:func:`eigh_many` of one process."""
    result: list[tuple[Tensor, Tensor] | None] = [None] * len(matrices)
    alike: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for i, m in enumerate(matrices):
        alike.setdefault((m.shape[-1], m.dtype, m.device), []).append(i)
    for members in alike.values():
        stacked = matrices[members[0]] if len(members) == 1 else torch.cat([matrices[i] for i in members])
        values, vectors = _eigh((stacked + stacked.mT) * 0.5)
        sizes = [matrices[i].shape[0] for i in members]
        for i, pair in zip(members, zip(values.split(sizes), vectors.split(sizes), strict=True), strict=True):
            result[i] = pair
    return [pair for pair in result if pair is not None]


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if matrix.shape[-1] == 1:
        return matrix.squeeze(-1).clamp(min=0.0), torch.ones_like(matrix)
    check_finite(matrix)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # LAPACK gives up on some ill-conditioned float32 matrices
        wide_values, wide_vectors = torch.linalg.eigh(matrix.double())
        values, vectors = wide_values.to(matrix.dtype), wide_vectors.to(matrix.dtype)
    return values.clamp(min=0.0), vectors


def check_finite(matrix: Tensor) -> None:
    """Refuse a factor that no decomposition is of."""
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(
            "a Kronecker factor is not finite: the inputs or gradients of a layer overflowed; clip the gradients or "
            "lower the learning rate, and go on from a checkpoint before it"
        )
