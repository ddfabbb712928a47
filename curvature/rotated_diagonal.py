"""B = Q diag(d) Qᵀ with Q a Kronecker product of small orthogonal matrices: the operator of Shampoo and SOAP.

Legend: Q = Q_1 ⊗ … ⊗ Q_k for every block of a parameter, d shaped like the parameter, v a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvature import vectors
from curvature.operators import DiagonalOperator, Operator, check_damping
from curvature.protocols import SingularCurvatureError
from curvature.tensor_blocks import Block, along

Bases = Sequence[Sequence[dict[int, Tensor]]]
"""For every parameter, for every block: dimension ↦ Q_i; a dimension without one counts as the identity."""


class RotatedDiagonalOperator(Operator):
    """B = Q diag(d) Qᵀ, block by block; everything is exact.

    Args:
        values: d, one tensor a parameter in its shape, each entry belonging to a column of Q; or a diagonal operator
            that has them, which may form them where they are read.
        bases: Q_i, orthogonal.
        blocks: the blocks of every parameter.

    >>> c = 0.5 ** 0.5
    >>> Q = torch.tensor([[c, c], [c, -c]])
    >>> block = Block((slice(0, 2),), (2,), (0,))
    >>> B = RotatedDiagonalOperator([torch.tensor([3.0, 1.0])], [[{0: Q}]], [[block]])
    >>> B.to_dense()
    tensor([[2.0000, 1.0000],
            [1.0000, 2.0000]])

    Cost: O(P Σ n_i) for ``matvec`` and ``solve``, no memory but one vector.
    """

    def __init__(
        self, values: Sequence[Tensor] | DiagonalOperator, bases: Bases, blocks: Sequence[Sequence[Block]]
    ) -> None:
        self.spectrum = values if isinstance(values, DiagonalOperator) else DiagonalOperator(values)
        super().__init__(self.spectrum.like)
        self.bases = bases
        self.blocks = blocks

    @property
    def values(self) -> list[Tensor]:
        """d."""
        return self.spectrum.values

    def _map(self, v: Sequence[Tensor], change: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Q change(Qᵀv, d)."""
        self.check_vector(v)
        result = []
        for x, d, bases, blocks in zip(v, self.values, self.bases, self.blocks, strict=True):
            out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, d.dtype))
            for basis, block in zip(bases, blocks, strict=True):
                rotated = along(x[block.index].to(out.dtype), basis, transpose=True)
                out[block.index] = along(change(rotated, d[block.index]), basis)
            result.append(out)
        return result

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Q (d ∘ Qᵀv)."""
        return self._map(v, torch.mul)

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        """Q (Qᵀv / (d+λ))."""
        check_damping(damping)
        for d in self.values:
            # on an accelerator the test would wait; there 1/0 shows, and the step's finiteness test refuses it
            if (
                vectors.readable(d)
                and d.numel()
                and not bool(d.amin() + damping > 0)
                and bool((d + damping == 0).any())
            ):
                raise SingularCurvatureError(
                    "the damped curvature has zeros; use a damping > 0 (or a larger one)"
                )
        return self._map(
            v,
            lambda x, d: (
                x / (d + (damping.to(d.device, d.dtype) if isinstance(damping, Tensor) else damping))
            ),
        )

    def diagonal(self) -> list[Tensor]:
        """Σ_j Q_ij² d_j: the squares of the factors are those of their Kronecker product."""
        result = []
        for d, bases, blocks in zip(self.values, self.bases, self.blocks, strict=True):
            out = torch.empty_like(d)
            for basis, block in zip(bases, blocks, strict=True):
                out[block.index] = along(d[block.index], {i: q.square() for i, q in basis.items()})
            result.append(out)
        return result
