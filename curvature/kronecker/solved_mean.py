"""A running mean's solve kept beside the mean: B⁻¹ is linear, so the solve follows the mean by its newest gradient.

Legend: m ← βm + (1-β)g a running mean of gradients, m̂ = m / c its bias-corrected value; P = G⁻¹ · A⁻¹ the damped
inverse of a block; s = P m. As long as P stays, s ← βs + (1-β) P g, and where g = Yᵀ [X, 1] has few rows,
P g = (Y G⁻¹)ᵀ ([X, 1] A⁻¹) costs less than P m. A block whose inverses were formed anew takes s = P m in full.

The numbers are those of a solve with m̂, up to rounding, which no more than a refresh interval of steps adds up.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvature.kronecker.gradient_rows import GradientRows
from curvature.kronecker.inverses import Entry, FactoredKroneckerOperator
from curvature.kronecker.layout import Block
from curvature.operators import Operator, check_damping


@dataclass
class Solved:
    """s of one block.

    Args:
        damping: λ of P.
        members: s, a tensor a member, shaped like it.
    """

    damping: float
    members: list[Tensor]


@dataclass
class Mean:
    """The mean that is solved for, and what is known of it; lists have one entry a parameter.

    Args:
        averaged: m̂.
        buffers: m.
        newest: 1-β, the weight of the newest gradient in m.
        corrections: c, 0-d; ``None`` where it is m that is solved for, and s itself is the answer.
        rows: the newest gradient of some blocks, by their root.
        kept: s of the mean as it was before the newest gradient, by root; after a solve as it is now.
    """

    averaged: Sequence[Tensor]
    buffers: Sequence[Tensor]
    newest: Sequence[float]
    corrections: Sequence[Tensor] | None
    rows: Mapping[int, GradientRows]
    kept: MutableMapping[int, Solved] = field(default_factory=dict)


class SolvedMeanOperator(Operator):
    """B of K-FAC with formed inverses; its first ``solve`` for the mean m̂ goes by rows where these are known.

    Args:
        of: B.
        mean: what is to be solved for. After the solve ``mean.kept`` holds s of the blocks whose gradient came in rows.
    """

    def __init__(self, of: FactoredKroneckerOperator, mean: Mean) -> None:
        super().__init__(of.like)
        self.of, self.mean = of, mean
        self._before, mean.kept = mean.kept, {}
        self._done = False

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """B v."""
        return self.of.matvec(v)

    def diagonal(self) -> list[Tensor]:
        """The diagonal of B."""
        return self.of.diagonal()

    def to_dense(self) -> Tensor:
        """B as a (P, P) matrix."""
        return self.of.to_dense()

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        """(B + λI)⁻¹ v."""
        mean = self.mean
        if self._done or any(x is not m for x, m in zip(v, mean.averaged, strict=True)):
            return self.of.solve(v, damping)
        self._done = True
        self.check_vector(v)
        check_damping(damping)
        value, entries, refreshed = self.of.inverses(damping)
        out = self.of.solve_rest(v, damping)
        for block in self.of.factorblocks:
            entry, root = entries[block.block.root], block.block.root
            rows, before = mean.rows.get(root), self._before.pop(root, None)
            if rows is None:
                entry.solve_into(out, v, self.like)
                continue
            if before is not None and before.damping == value and root not in refreshed:
                add_rows_(before.members, entry, block.block, rows, mean.newest[root])
                members = before.members
            else:
                members = solved_in_full(entry, block.block, mean.buffers)
            mean.kept[root] = Solved(value, members)
            for i, s in zip(block.block.members, members, strict=True):
                out[i] = s if mean.corrections is None else s / mean.corrections[i].to(s)
        return out


def add_rows_(
    members: Sequence[Tensor], entry: Entry, block: Block, rows: GradientRows, newest: float
) -> None:
    """s ← βs + (1-β) (Y G⁻¹)ᵀ ([X, 1] A⁻¹), in place."""
    d = rows.X.shape[-1]
    inverse_A = entry.A[0]
    left = rows.Y * entry.G[0] if entry.of.G is None else rows.Y @ entry.G[0]
    if block.bias is None:
        right = rows.X @ inverse_A
    else:  # the 1 of the bias picks the last row
        right = torch.addmm(inverse_A[d], rows.X, inverse_A[:d])
        members[1].addmv_(left.mT, right[:, d], beta=1.0 - newest, alpha=newest)
    members[0].addmm_(left.mT, right[:, :d], beta=1.0 - newest, alpha=newest)


def solved_in_full(entry: Entry, block: Block, buffers: Sequence[Tensor]) -> list[Tensor]:
    """s = G⁻¹ m A⁻¹ by the products of whole matrices, a tensor a member, each in memory of its own."""
    into = list(buffers)
    entry.solve_into(into, buffers, buffers)
    return [into[i].contiguous() for i in block.members]
