"""The Cauchy point: the best step along steepest descent, the yardstick of every other solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, Needs
from trust_region.l2_ball import L2Ball
from trust_region.protocols import Solution


@dataclass(frozen=True)
class CauchyPoint:
    """-t g with the t in [0, Δ/‖g‖] that minimises the model.

    Choose it as a baseline, or where one product a step is all that can be paid. Every other solver of this package
    does at least as well.

    Raises:
        ValueError: for an infinite radius and curvature that is not positive along the gradient (on the CPU; an
            accelerator is not waited for, and there the step is not finite and is rejected).

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([1.0, 3.0])])
    >>> CauchyPoint().solve([torch.tensor([1.0, 1.0])], B, torch.tensor(10.0)).step
    [tensor([-0.5000, -0.5000])]

    Cost: one product, O(P), no wait for the host.
    Reference: Nocedal & Wright 2006, equations (4.11) and (4.12).
    """

    regions = (L2Ball,)

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
        """One product; a product that is not finite gives no step."""
        product = curvature.matvec(gradient)
        norm = vectors.norm(gradient)
        radius = radius.to(norm.device, norm.dtype)
        # per unit of ‖g‖, so that no square of it underflows
        unit = vectors.scale(gradient, 1 / torch.where(norm > 0, norm, torch.ones_like(norm)))
        bend = vectors.dot(unit, product) / torch.where(norm > 0, norm, torch.ones_like(norm)) + damping
        convex = bend > 0
        if vectors.readable(norm) and bool(torch.isinf(radius) & (bend <= 0) & (norm > 0)):
            raise ValueError(
                "the curvature is not positive along the gradient, and without a region the model has no minimum: "
                "use a finite radius or a larger damping"
            )
        newton = norm / torch.where(convex, bend, torch.ones_like(bend))
        length = torch.where(convex, torch.minimum(newton, radius), radius)
        usable = torch.isfinite(bend) & torch.isfinite(norm) & (norm > 0)
        length = torch.where(usable, length, torch.zeros_like(length))
        t = length / torch.where(norm > 0, norm, torch.ones_like(norm))
        step, Bp = (
            [torch.where(usable.to(x.device), -t.to(x.device, x.dtype) * x, torch.zeros_like(x)) for x in v]
            for v in (gradient, product)
        )
        return Solution(
            step=step,
            on_boundary=usable & (length >= radius),
            negative_curvature=usable & (bend <= 0),
            iterations=1,
            residual=vectors.norm([g + b + damping * p for g, b, p in zip(gradient, Bp, step, strict=True)]),
            curvature_step=Bp,
            diagnostics={"non_finite_product": ~torch.isfinite(bend)},
        )
