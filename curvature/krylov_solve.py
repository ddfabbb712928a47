"""(B + λI)⁻¹ v to working precision from products alone: conjugate gradients, then MINRES, or an error.

Legend: A = B + λI, b the right-hand side, x the solution, r = b - A x; u the unit roundoff.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature import vectors
from curvature.conjugate_gradient import Apply, conjugate_gradient
from curvature.minres import minres
from curvature.probes import probe
from curvature.protocols import SingularCurvatureError

#: Iterations in all before ``solve`` gives up; the memory is that of a few vectors.
MAX_ITERATIONS = 20_000
#: How many times u (‖A‖ ‖x‖ + ‖b‖) a residual may be, as a dense factorisation's would be.
BACKWARD_ERROR = 100.0


class ConvergenceError(ArithmeticError):
    """A Krylov method did not reach working precision; a larger damping is the remedy."""


def krylov_solve(product: Apply, b: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
    """x with ‖b - A x‖ within the error of a backward-stable factorisation.

    With λ = 0 the same system is also solved for a random right-hand side: a Krylov space of a consistent b
    never shows that A is singular, and the least-norm solution would be another answer than A⁻¹ b.

    Args:
        product: v ↦ B v, symmetric.
        b: one tensor a parameter.
        damping: λ >= 0.

    Raises:
        curvature.SingularCurvatureError: where A is singular to working precision.
        curvature.ConvergenceError: where the residual stays too large.

    Cost: one product an iteration; as many as the spectrum asks for.
    """
    solution = _solve(product, b, damping)
    if not bool(torch.as_tensor(damping) > 0):
        _solve(product, probe(b, seed=0, index=0, distribution="gaussian"), damping)
    return solution


def _solve(product: Apply, b: Sequence[Tensor], damping: float | Tensor) -> list[Tensor]:
    def apply(v: Sequence[Tensor]) -> list[Tensor]:
        return vectors.add(product(v), v, damping)

    size = vectors.norm(b)
    if not bool(size > 0):
        if bool(size == 0):
            return [torch.zeros_like(x) for x in b]
        raise ValueError("v must be finite, got NaN")
    epsilon = max(torch.finfo(x.dtype).eps for x in b)
    limit = min(MAX_ITERATIONS, 10 * vectors.numel(b))
    result = conjugate_gradient(product, b, damping=damping, rtol=10 * epsilon, max_iterations=limit)
    x, residual_norm = result.solution, result.residual_norm
    if result.direction is not None:  # indefinite, or singular: a method that does not mind
        x = minres(apply, b, tolerance=10 * epsilon, max_iterations=limit)
        residual_norm = vectors.norm(vectors.add(b, apply(x), -1.0))
    scale = vectors.norm(apply(b)) / size  # a lower bound of ‖A‖
    length = vectors.norm(x)
    if not bool(torch.isfinite(residual_norm + length + scale)):
        raise ConvergenceError("a product with this curvature is not finite: no solution")
    if bool(scale * length * epsilon * BACKWARD_ERROR > size):
        raise SingularCurvatureError("the damped curvature is singular; use a damping > 0 (or a larger one)")
    if not bool(residual_norm <= BACKWARD_ERROR * epsilon * (scale * length + size)):
        raise ConvergenceError(
            f"the solve ended ({result.outcome.value}) at a relative residual of {float(residual_norm / size):.1e}, "
            "short of working precision: the damped curvature is singular or nearly so; use a larger damping, or "
            "curvature.conjugate_gradient with a tolerance of your own"
        )
    return x
