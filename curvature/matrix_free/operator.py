"""The operator of a curvature that exists only as products: everything else is built from ``matvec``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvature import vectors
from curvature.krylov_solve import krylov_solve
from curvature.operators import Operator, check_damping, solve_dense
from curvature.protocols import HessianProduct


class MatrixFreeOperator(Operator):
    """B by its products v ↦ B v.

    Args:
        product: takes and gives lists of tensors shaped like the parameters; B must be symmetric.
        like: tensors shaped like the parameters, on their devices and in their dtypes.

    >>> B = MatrixFreeOperator(lambda v: [2.0 * v[0]], like=[torch.zeros(3)])
    >>> B.solve([torch.ones(3)], damping=2.0)
    [tensor([0.2500, 0.2500, 0.2500])]

    Cost: a ``matvec`` is one product; ``solve`` as many as the Krylov method takes; ``diagonal`` and ``to_dense``
    P products.
    """

    #: Up to this P ``solve`` forms the matrix once, which finds a singular one with certainty.
    dense_solve_limit: int = 512

    def __init__(self, product: HessianProduct, like: Sequence[Tensor]) -> None:
        super().__init__(like)
        self._product = product
        self._dense: Tensor | None = None

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """B v, one product."""
        self.check_vector(v)
        return [x.to(vectors.compute_dtype(x.dtype)) for x in self._product(v)]

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        """(B + λI)⁻¹ v to working precision: dense for small P, else conjugate gradients, or MINRES if indefinite.

        Raises:
            curvature.SingularCurvatureError: where B + λI is singular.
            curvature.ConvergenceError: where working precision was not reached; a larger damping is the remedy, or
                :func:`curvature.conjugate_gradient`, which reports how far it came.
        """
        self.check_vector(v)
        check_damping(damping)
        if vectors.numel(self.like) > self.dense_solve_limit:
            return krylov_solve(self.matvec, v, damping)
        if self._dense is None:
            self._dense = self.to_dense()
        B = self._dense + damping * torch.eye(
            len(self._dense), dtype=self._dense.dtype, device=self._dense.device
        )
        return vectors.unflatten(solve_dense(B, vectors.flatten(v).to(B.dtype)), self.like)


def summed(products: Sequence[Callable[[Sequence[Tensor]], list[Tensor]]]) -> HessianProduct:
    """v ↦ Σ_i B_i v."""
    if len(products) == 1:
        return products[0]

    def product(v: Sequence[Tensor]) -> list[Tensor]:
        total = [x.clone() for x in products[0](v)]
        for other in products[1:]:
            torch._foreach_add_(total, other(v))
        return total

    return product
