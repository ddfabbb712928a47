"""A block-diagonal operator: every group of parameters has a curvature of its own, and no group feels another.

Legend: B = diag(B_1, …, B_K) up to the order of the parameters; (B + λI)⁻¹ acts block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from curvature import vectors
from curvature.operators import Operator
from curvature.protocols import CurvatureOperator


class BlockOperator(Operator):
    """B from the operators of disjoint groups of parameters.

    Args:
        like: tensors shaped like the parameters; their values are never read.
        parts: (indices, operator): which parameters an operator is about. Together they name each parameter once.

    >>> from curvature import DiagonalOperator, IdentityOperator
    >>> a, b = torch.zeros(1), torch.zeros(2)
    >>> B = BlockOperator([a, b], [([1], DiagonalOperator([torch.tensor([2.0, 3.0])])), ([0], IdentityOperator([a]))])
    >>> B.matvec([torch.ones(1), torch.ones(2)])
    [tensor([1.]), tensor([2., 3.])]
    """

    def __init__(
        self, like: Sequence[Tensor], parts: Sequence[tuple[Sequence[int], CurvatureOperator]]
    ) -> None:
        super().__init__(like)
        named = sorted(i for indices, _ in parts for i in indices)
        if named != list(range(len(like))):
            raise ValueError(
                f"parts must name each of the {len(like)} parameters once, got the indices {named}"
            )
        self.parts = [(list(indices), operator) for indices, operator in parts]
        self.is_diagonal = all(getattr(operator, "is_diagonal", False) for _, operator in parts)

    def _each(
        self, v: Sequence[Tensor], apply: Callable[[CurvatureOperator, list[Tensor]], list[Tensor]]
    ) -> list[Tensor]:
        self.check_vector(v)
        result: list[Tensor] = [torch.empty(0)] * len(self.like)
        for indices, operator in self.parts:
            for i, x in zip(indices, apply(operator, [v[i] for i in indices]), strict=True):
                result[i] = x
        return result

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """B v, block by block."""
        return self._each(v, lambda operator, x: operator.matvec(x))

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        """(B + λI)⁻¹ v, block by block: each block solves in its own way, or raises."""
        return self._each(v, lambda operator, x: operator.solve(x, damping))

    def diagonal(self) -> list[Tensor]:
        """The blocks' diagonals."""
        return self._each(self.like, lambda operator, _: operator.diagonal())

    def to_dense(self) -> Tensor:
        """The blocks' dense matrices, with zeros between them."""
        self._check_size("to_dense")
        ends = torch.tensor([x.numel() for x in self.like]).cumsum(0).tolist()
        spans = [range(end - x.numel(), end) for end, x in zip(ends, self.like, strict=True)]
        blocks = [operator.to_dense() for _, operator in self.parts]
        dtype = reduce(torch.promote_types, (block.dtype for block in blocks))
        size = vectors.numel(self.like)
        dense = torch.zeros(size, size, dtype=dtype, device=blocks[0].device)
        for (indices, _), block in zip(self.parts, blocks, strict=True):
            where = torch.tensor(
                [k for i in indices for k in spans[i]], dtype=torch.int64, device=dense.device
            )
            dense[where.unsqueeze(1), where] = block.to(dense)
        return dense
