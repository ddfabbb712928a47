"""The empirical Fisher diagonal of a matrix from its row and column means (Shazeer & Stern 2018, arXiv 1804.04235).

Legend: G (m, n) the gradient of a matrix, a tensor of more axes folded to one; R = mean over columns of G²,
C = mean over rows, both running means; V̂ = R Cᵀ / mean(R), the nonnegative rank-one matrix nearest to the running
mean of G² in the generalised Kullback-Leibler divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature import DiagonalOperator, Estimator, Needs, Observation
from curvature.protocols import State
from curvature.vectors import compute_dtype


@dataclass(frozen=True)
class FactoredFisher(Estimator):
    """diag(E[g gᵀ]) with m + n numbers for a matrix of m n elements; vectors keep all of theirs.

    Args:
        beta: decay of the running means, in [0, 1).

    Cost: O(P) time; 4 (m + n) bytes of state a float32 matrix.
    """

    beta: float = 0.999

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"beta must be in [0, 1), got {self.beta}")

    @property
    def needs(self) -> Needs:
        return Needs.GRAD

    def init(self, params: Sequence[Tensor]) -> State:
        """Zeros: row means (of a vector all elements), column means (of a vector none), updates seen."""
        folded = [fold(p) for p in params]
        return {
            "rows": [
                p.new_zeros(x.shape[0], dtype=compute_dtype(p.dtype))
                for p, x in zip(params, folded, strict=True)
            ],
            "columns": [
                p.new_zeros(x.shape[1] if p.dim() > 1 else 0, dtype=compute_dtype(p.dtype))
                for p, x in zip(params, folded, strict=True)
            ],
            "count": [p.new_zeros((), dtype=compute_dtype(p.dtype)) for p in params],
            "shapes": [torch.tensor(p.shape, dtype=torch.int64, device=p.device) for p in params],
        }

    def update(self, state: State, seen: Observation) -> None:
        """R and C of this gradient, into their running means."""
        entries = (cast("list[Tensor]", state[k]) for k in ("rows", "columns", "count"))
        for row, column, count, g in zip(*entries, seen.gradient, strict=True):
            if g is None:  # a parameter without a gradient keeps its state
                continue
            square = fold(g).to(row.dtype).square()
            row.lerp_(square.mean(1), 1.0 - self.beta)
            if column.numel():
                column.lerp_(square.mean(0), 1.0 - self.beta)
            count.add_(1.0)

    def operator(self, state: State) -> DiagonalOperator:
        """diag(V̂), bias-corrected, so that the first update is the observation itself."""
        values = []
        entries = (cast("list[Tensor]", state[k]) for k in ("rows", "columns", "count", "shapes"))
        for row, column, count, shape in zip(*entries, strict=True):
            correction = (1.0 - self.beta**count).clamp(min=torch.finfo(count.dtype).tiny)
            V = row / correction
            if column.numel():
                mean = V.mean().clamp(min=torch.finfo(V.dtype).tiny)
                V = torch.outer(V / mean, column / correction)
            values.append(V.reshape(shape.tolist()))
        return DiagonalOperator(values)


def fold(x: Tensor) -> Tensor:
    """A tensor as a matrix: its first axis, and all others in one; a vector as one column."""
    return x.reshape(x.shape[0], -1) if x.dim() else x.reshape(1, 1)
