"""Natural gradients from products alone: a few conjugate-gradient iterations, scaled into the KL ellipsoid.

Legend: F the Fisher matrix, λ the damping, g the gradient, x ≈ (F+λI)⁻¹g, Δ the bound on pᵀFp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import conjugate_gradient, vectors
from curvature.protocols import CurvatureOperator, Needs
from trust_region.kl_ball import KLBall
from trust_region.projected import scaling
from trust_region.protocols import Solution


@dataclass(frozen=True)
class KLConjugateGradient:
    """-x scaled to pᵀFp <= Δ, with x from ``max_iterations`` of conjugate gradients: TRPO's step.

    :class:`KLBall` by itself solves to working precision, which products alone make dear; a few iterations find most of
    the natural gradient, and every iterate reduces the model. For curvature that is positive semi-definite.

    Args:
        max_iterations: products at most, >= 1; TRPO's 10.
        tolerance: stop at a residual <= tolerance ‖g‖, >= 0.

    Raises:
        ValueError: where a direction of negative curvature is met.

    >>> from curvature import DiagonalOperator
    >>> F = DiagonalOperator([torch.tensor([4.0, 1.0])])
    >>> KLConjugateGradient().solve([torch.tensor([4.0, 0.0])], F, torch.tensor(1.0)).step
    [tensor([-0.5000,  0.0000])]

    Cost: one product an iteration and one more; every iteration waits for the host. Memory: 4 P.
    Reference: Schulman et al. 2015, Trust region policy optimization, arXiv 1502.05477, appendix C.
    """

    max_iterations: int = 10
    tolerance: float = 1e-10

    regions = (KLBall,)
    definite_only = True

    def __post_init__(self) -> None:
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be >= 1, got {self.max_iterations}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be >= 0, got {self.tolerance}")

    @property
    def needs(self) -> Needs:
        """Only gradient and curvature."""
        return Needs.GRAD

    def solve(
        self,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor,
        damping: Tensor | float = 0.0,
    ) -> Solution:
        """The truncated natural gradient, scaled."""
        found = conjugate_gradient(
            curvature,
            vectors.negative(gradient),
            damping=damping,
            rtol=self.tolerance,
            max_iterations=self.max_iterations,
        )
        product = curvature.matvec(found.solution)
        energy = vectors.dot(found.solution, product)
        self._refuse_negative(energy, found.solution)
        if found.direction is not None:
            self._refuse_negative(
                vectors.dot(found.direction, curvature.matvec(found.direction)), found.direction
            )
        energy = energy.clamp(min=0)
        factor = scaling(energy.sqrt(), radius.to(energy.device, energy.dtype).sqrt())
        return Solution(
            step=vectors.scale(found.solution, factor),
            on_boundary=factor < 1,
            # met is refused: what remains is semi-definite along every direction that was tried
            negative_curvature=torch.zeros_like(factor, dtype=torch.bool),
            iterations=found.iterations,
            residual=found.residual_norm,
            curvature_step=vectors.scale(product, factor),
            diagnostics={"outcome": found.outcome.value},
        )

    def _refuse_negative(self, bend: Tensor, p: Sequence[Tensor]) -> None:
        """Without a positive pᵀBp the ellipsoid has no length for p; rounding may make a zero slightly negative."""
        if bool(bend < -(torch.finfo(bend.dtype).eps ** 0.5) * vectors.dot(p, p)):
            raise ValueError(
                f"KLConjugateGradient needs positive semi-definite curvature, and met pᵀBp = {float(bend):.3g} < 0"
                ": use a Fisher or Gauss-Newton curvature, or L2Ball with SteihaugCG for an indefinite one"
            )
