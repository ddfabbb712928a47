"""Cubic regularisation: the model plus (σ/3)‖p‖³, minimised over a growing Krylov space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, Needs
from trust_region.krylov import check_iteration, nothing, within
from trust_region.lanczos import Lanczos
from trust_region.protocols import Solution
from trust_region.secular import minimise_cubic
from trust_region.unbounded import Unbounded


@dataclass(frozen=True)
class CubicModel:
    """argmin gᵀp + ½ pᵀ(B+λI)p + (σ/3)‖p‖³: no region, the cubic term holds the step back.

    It takes B of any sign and goes with :class:`AdaptiveCubic`, which adapts σ.

    Args:
        max_iterations: products, and basis vectors kept, at most.
        tolerance: stop at a residual <= tolerance ‖g‖; ``None`` means min(1e-4, √‖g‖), the paper's.

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.zeros(1, dtype=torch.float64)])
    >>> found = CubicModel().solve([torch.tensor([2.0], dtype=torch.float64)], B, torch.tensor(2.0))
    >>> round(float(found.step[0]), 9)
    -1.0

    Cost: k products, O(k²P), memory k P after k iterations; waits for the host.
    Reference: Cartis, Gould & Toint 2011, Adaptive cubic regularisation methods, part I, section 6.
    """

    max_iterations: int = 100
    tolerance: float | None = None

    regions = (Unbounded,)
    weight = "sigma"

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
        """``radius`` is σ > 0."""
        norm_g, sigma, shift = float(vectors.norm(gradient)), float(radius), float(damping)
        if norm_g == 0 or not math.isfinite(norm_g):
            return nothing(gradient, norm_g != 0)
        share = min(1e-4, math.sqrt(norm_g)) if self.tolerance is None else self.tolerance
        lanczos = Lanczos(curvature, gradient)
        y, residual, multiplier, lowest = torch.zeros(0), norm_g, 0.0, math.inf
        while lanczos.size < self.max_iterations and lanczos.extend():
            h, V, g = lanczos.eigen()
            found = minimise_cubic(g, h + shift, sigma)
            y, multiplier, lowest = V @ found.step, found.multiplier, float(h[0]) + shift
            residual = lanczos.beta[-1] * abs(float(y[-1]))
            if residual <= share * norm_g or lanczos.invariant:
                break
        if lanczos.size == 0:
            return nothing(gradient, True)
        solution = within(lanczos, y, math.inf, True, lowest <= 0, residual)
        solution.diagnostics |= {"sigma": sigma, "multiplier": multiplier, "gradient_norm": norm_g}
        return solution
