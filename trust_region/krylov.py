"""Generalised Lanczos (GLTR): the exact step within the Krylov space, for large problems with indefinite curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, Needs
from trust_region.l2_ball import L2Ball
from trust_region.lanczos import Lanczos
from trust_region.protocols import Solution
from trust_region.secular import minimise_in_ball
from trust_region.steihaug_cg import forcing


@dataclass(frozen=True)
class Krylov:
    """The minimiser of the model in the ball over span{g, Bg, B²g, …}, which grows until the residual is small.

    Choose it over :class:`SteihaugCG` where curvature is often negative or steps often end at the boundary: it goes
    on along the boundary instead of stopping there. The parts of B that g does not excite (the hard case) stay unseen,
    as they do for SciPy's ``trust-krylov``, whose first Krylov space this is; solved to the end the iterates are the
    same (by default SciPy stops by a rule of its own).

    Args:
        max_iterations: products, and basis vectors kept, at most.
        tolerance: stop at a residual <= tolerance ‖g‖; ``None`` means min(½, √‖g‖).

    Raises:
        ValueError: for an infinite radius and a model without a minimum.

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([1.0, -1.0], dtype=torch.float64)])
    >>> found = Krylov(tolerance=1e-10).solve([torch.ones(2, dtype=torch.float64)], B, torch.tensor(2.0))
    >>> found.iterations, bool(found.on_boundary), round(float(found.step[0].norm()), 9)
    (2, True, 2.0)

    Cost: k products, O(k²P), memory k P after k iterations; waits for the host.
    Reference: Gould, Lucidi, Roma & Toint 1999, Solving the trust-region subproblem using the Lanczos method.
    """

    max_iterations: int = 100
    tolerance: float | None = None

    regions = (L2Ball,)

    def __post_init__(self) -> None:
        check_iteration(self.max_iterations, self.tolerance)

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
        """Algorithm 5.1, with every iterate from an eigendecomposition of the small matrix T."""
        norm_g, bound, shift = float(vectors.norm(gradient)), float(radius), float(damping)
        if norm_g == 0 or not math.isfinite(norm_g):
            return nothing(gradient, norm_g != 0)
        target = forcing(norm_g) if self.tolerance is None else self.tolerance * norm_g
        lanczos = Lanczos(curvature, gradient)
        y, residual, boundary, lowest = torch.zeros(0), norm_g, False, math.inf
        while lanczos.size < self.max_iterations and lanczos.extend():
            h, V, g = lanczos.eigen()
            found = minimise_in_ball(g, h + shift, bound)
            y, boundary, lowest = V @ found.step, found.on_boundary, float(h[0]) + shift
            residual = lanczos.beta[-1] * abs(float(y[-1]))
            if residual <= target or lanczos.invariant:
                break
        if lanczos.size == 0:
            return nothing(gradient, True)
        return within(lanczos, y, bound, boundary, lowest <= 0, residual)


def check_iteration(max_iterations: int, tolerance: float | None) -> None:
    """Refuse what no iteration can work with."""
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be >= 1, got {max_iterations}")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1) or None, got {tolerance}")


def nothing(gradient: Sequence[Tensor], broken: bool) -> Solution:
    """No step: g = 0, or a product that was not finite at once; then nothing is predicted and the trial is refused."""
    zeros = [torch.zeros_like(g) for g in gradient]
    false = torch.tensor(False, device=zeros[0].device)
    return Solution(zeros, false, false, residual=vectors.norm(gradient), curvature_step=zeros,
                    diagnostics={"non_finite_product": broken})  # fmt: skip


def within(
    lanczos: Lanczos, y: Tensor, radius: float, boundary: bool, negative: bool, residual: float
) -> Solution:
    """Q y and B Q y, held inside the radius against the rounding of Q."""
    step, product = lanczos.combine(y), lanczos.product(y)
    norm = vectors.norm(step)
    factor = torch.clamp(radius / norm, max=1.0) if math.isfinite(radius) else torch.ones_like(norm)
    return Solution(
        step=vectors.scale(step, factor),
        on_boundary=torch.tensor(boundary, device=norm.device),
        negative_curvature=torch.tensor(negative, device=norm.device),
        iterations=lanczos.size,
        residual=torch.full_like(norm, residual),
        curvature_step=vectors.scale(product, factor),
        diagnostics={"non_finite_product": lanczos.broken},
    )
