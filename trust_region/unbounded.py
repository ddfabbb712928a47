"""No region: the model is believed everywhere, and only the damping holds the step back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureEstimator, CurvatureOperator, Needs, State
from trust_region.protocols import Solution, StepContext


class Shape:
    """Base class of regions: no signals of their own and no state; inheriting is not required."""

    @property
    def needs(self) -> Needs:
        """Only gradient and curvature."""
        return Needs.GRAD

    def init(self, params: Sequence[Tensor], estimator: CurvatureEstimator | None = None) -> State:
        """Nothing to remember."""
        return {}


@dataclass(frozen=True)
class Unbounded(Shape):
    """All of space: p = -(B + λI)⁻¹ g, the damped Newton (or natural-gradient) step.

    Choose it where a damping or a learning rate is to do the work of a radius. B + λI must be positive definite;
    an indefinite B makes an uphill step, so give such curvature a region.

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([1.0, 3.0])])
    >>> Unbounded().minimise({}, [torch.ones(2)], B, torch.tensor(1.0), 1.0, StepContext()).step
    [tensor([-0.5000, -0.2500])]

    Cost: one ``solve``.
    """

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
        """-(B + λI)⁻¹ g; B p is known without a product: B p = -g - λp."""
        step = vectors.negative(curvature.solve(gradient, damping))
        if getattr(curvature, "is_diagonal", False):  # every element by itself: p_i = -g_i / (h_i + λ)
            uphill = vectors.any_of([(g * p > 0).any() for g, p in zip(gradient, step, strict=True)])
        else:
            uphill = vectors.dot(gradient, step) > 0  # gᵀp = -pᵀ(B+λI)p
        return Solution(
            step=step,
            on_boundary=torch.zeros((), dtype=torch.bool, device=step[0].device),
            negative_curvature=uphill,
            iterations=1,
            curvature_step=vectors.negative(vectors.add(gradient, step, damping)),
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
        """``step`` itself."""
        return list(step)
