"""The box: no element moves further than the radius."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, State
from trust_region.projected import each, solve_then_project
from trust_region.protocols import Solution, StepContext
from trust_region.unbounded import Shape


@dataclass(frozen=True)
class Box(Shape):
    """{p : |p_i| <= Δ for every element}: the clipping of Sophia.

    Exact for a diagonal B: an element with h + λ > 0 takes its Newton step -g/(h+λ), clipped; one with h + λ <= 0 has
    its minimum on the boundary and goes there against its gradient. An element whose gradient is 0 stays where it
    is: it tells no direction. Any other B is solved, then clipped, with the Cauchy step -tΔ sign(g) where that would
    go uphill. The radius may be one for every tensor.

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([1.0, 0.1, -3.0])])
    >>> g = [torch.tensor([0.5, 4.0, 0.01])]
    >>> Box().minimise({}, g, B, torch.tensor(1.0), 0.0, StepContext()).step
    [tensor([-0.5000, -1.0000, -1.0000])]

    Cost: O(P), without waiting for the host.
    Reference: Liu et al. 2023, Sophia, arXiv 2305.14342, equation (6).
    """

    scope = "tensor"
    shardable = True

    def minimise(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        damping: Tensor | float,
        context: StepContext,
    ) -> Solution:
        """Exact, element by element, for a diagonal B; else solve, clip, and never uphill."""
        if not getattr(curvature, "is_diagonal", False):
            return solve_then_project(self, state, gradient, curvature, radius, damping, context)
        step, clipped, negative = [], [], []
        for g, h, r in zip(gradient, curvature.diagonal(), each(radius, gradient), strict=True):
            damped = h + (damping.to(h.device, h.dtype) if isinstance(damping, Tensor) else damping)
            convex = damped > 0
            newton = -g / torch.where(convex, damped, torch.ones_like(damped))
            p = torch.where(convex, newton.clamp(min=-r, max=r), -r * torch.sign(g))
            # an infinite radius times sign(0) is NaN
            p = torch.where(g == 0, torch.zeros_like(p), p)
            step.append(p)
            clipped.append((p.abs() >= r).any())
            negative.append((~convex & (g != 0)).any())
        return Solution(
            step=step,
            on_boundary=vectors.any_of(clipped),
            negative_curvature=vectors.any_of(negative),
            iterations=1,
        )

    def project(
        self,
        state: State,
        step: Sequence[Tensor],
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """``step`` clipped element by element: the nearest point in the Euclidean norm."""
        return [p.clamp(min=-r, max=r) for p, r in zip(step, each(radius, step), strict=True)]

    def steepest(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """-Δ sign(g)."""
        signs = [torch.sign(g) for g in gradient]
        radii = each(radius, gradient)
        finite = [
            torch.where(torch.isfinite(r), r, vectors.norm([g])) for r, g in zip(radii, gradient, strict=True)
        ]
        return [-r * s for r, s in zip(finite, signs, strict=True)]
