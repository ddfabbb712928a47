"""A ball for every layer, relative to the layer's own norm: the region of LARS and LAMB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, State
from trust_region.l2_ball import L2Ball, to_length
from trust_region.projected import each
from trust_region.protocols import Solution, StepContext
from trust_region.unbounded import Shape


@dataclass(frozen=True)
class RelativeBall(Shape):
    """{p : ‖p_i‖ <= Δ ‖θ_i‖ for every tensor i}.

    With ``fill=False`` the step is as in an :class:`L2Ball` of every tensor: exact for a diagonal B. With ``fill=True``
    every tensor's step is -(B+λI)⁻¹g (or -g where that would go uphill) stretched or shrunk to exactly Δ‖θ_i‖: that is
    the layer-wise scaling of LARS and LAMB, and its prediction is the linear model's.

    Args:
        fill: as above.
        floor: the smallest ‖θ_i‖ that is measured with, >= 0. With 0 a tensor that is 0 (a fresh bias) is not bounded,
            and with ``fill`` its step keeps its length: LARS's and LAMB's trust ratio of 1.
        cap: the largest ‖θ_i‖ that is measured with (LAMB's φ; 10 in its code).

    Raises:
        ValueError: without the parameters in the context.

    >>> from curvature import IdentityOperator
    >>> g, context = [torch.tensor([3.0, 4.0])], StepContext(params=[torch.tensor([0.0, 2.0])])
    >>> RelativeBall(fill=True).minimise({}, g, IdentityOperator(g), torch.tensor(0.5), 0.0, context).step
    [tensor([-0.6000, -0.8000])]

    Cost: one ``solve``, O(P).
    References: You, Gitman & Ginsburg 2017, arXiv 1708.03888, equation (6); You et al. 2019, arXiv 1904.00962,
    algorithm 2; the floor is that of Brock et al. 2021, arXiv 2102.06171, equation (3).
    """

    fill: bool = False
    floor: float = 1e-3
    cap: float = math.inf

    scope = "tensor"

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= self.cap or not self.cap > 0:
            raise ValueError(
                f"floor and cap must satisfy 0 <= floor <= cap, cap > 0, got {self.floor}, {self.cap}"
            )

    def radii(
        self, like: Sequence[Tensor], radius: Tensor | Sequence[Tensor], context: StepContext
    ) -> list[Tensor]:
        """Δ‖θ_i‖ for every tensor; infinite for a tensor that is 0 where the floor is 0."""
        if context.params is None:
            raise ValueError("params must be given in the context: RelativeBall measures every step by ‖θ‖")
        out = []
        for r, p in zip(each(radius, like), context.params, strict=True):
            norm = torch.linalg.vector_norm(p.detach().to(r.dtype)).clamp(self.floor, self.cap)
            out.append(torch.where(norm > 0, r * norm, torch.full_like(norm, math.inf)))
        return out

    def minimise(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        damping: Tensor | float,
        context: StepContext,
    ) -> Solution:
        """A ball for every tensor, or its sphere."""
        radii = self.radii(gradient, radius, context)
        if not self.fill:
            return L2Ball(scope="tensor").minimise(state, gradient, curvature, radii, damping, context)
        newton = curvature.solve(gradient, damping)
        slopes = [
            torch.linalg.vecdot(d.reshape(-1), g.reshape(-1)) for d, g in zip(newton, gradient, strict=True)
        ]
        direction = [
            torch.where(slope > 0, d, g.to(d.dtype))
            for slope, d, g in zip(slopes, newton, gradient, strict=True)
        ]
        step = [
            to_length([d], torch.linalg.vector_norm(d), r)[0] for d, r in zip(direction, radii, strict=True)
        ]
        return Solution(
            step=step,
            on_boundary=torch.ones((), dtype=torch.bool, device=step[0].device),
            negative_curvature=self._negative(slopes, curvature),
            iterations=1,
            # the linear model has no curvature
            curvature_step=[torch.zeros_like(p) for p in step],
        )

    @staticmethod
    def _negative(slopes: Sequence[Tensor], curvature: CurvatureOperator) -> Tensor:
        """gᵀ(B+λI)⁻¹g < 0; of one tensor alone it tells something only where B does not mix tensors."""
        if getattr(curvature, "is_diagonal", False):
            return vectors.any_of([slope < 0 for slope in slopes])
        return vectors.total(slopes) < 0

    def project(
        self,
        state: State,
        step: Sequence[Tensor],
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """Every tensor's step scaled into its ball."""
        return L2Ball(scope="tensor").project(
            state, step, gradient, curvature, self.radii(step, radius, context), context
        )

    def steepest(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """-Δ‖θ_i‖ g_i/‖g_i‖."""
        return L2Ball(scope="tensor").steepest(
            state, gradient, curvature, self.radii(gradient, radius, context), context
        )
