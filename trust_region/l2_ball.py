"""The Euclidean ball: the classical trust region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, State
from trust_region.projected import each, scaling, solve_then_project
from trust_region.protocols import Solution, StepContext
from trust_region.secular import SecularStep, minimise_in_ball
from trust_region.unbounded import Shape


@dataclass(frozen=True)
class L2Ball(Shape):
    """{p : ‖p‖₂ <= Δ}, over all parameters together or over every tensor by itself.

    Choose it with a subproblem solver (:class:`SteihaugCG`, :class:`Krylov`, :class:`ExactSubproblem`) for general
    curvature. Without one the step is exact for a diagonal B, of any sign, the hard case included; for any other B it
    is (B+λI)⁻¹g scaled to the radius, or the Cauchy step where that would go uphill.

    Args:
        scope: one ball for all tensors (``"global"``) or for every ``"tensor"`` its own.

    Raises:
        ValueError: for an unknown scope; in ``minimise`` for an infinite radius and a model without a minimum.

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([1.0, -1.0])])
    >>> L2Ball().minimise({}, [torch.tensor([0.0, 1.0])], B, torch.tensor(2.0), 0.0, StepContext()).step
    [tensor([ 0., -2.])]

    Cost: O(P) an iteration of the secular equation (five to ten of them, each waits for the host) for a diagonal B.
    Reference: Moré & Sorensen 1983; Conn, Gould & Toint 2000, chapter 7.
    """

    scope: Literal["global", "tensor"] = "global"

    def __post_init__(self) -> None:
        if self.scope not in ("global", "tensor"):
            raise ValueError(f"scope must be 'global' or 'tensor', got {self.scope!r}")

    def minimise(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        damping: Tensor | float,
        context: StepContext,
    ) -> Solution:
        """Exact for a diagonal B; else solve, scale, and never uphill."""
        if not getattr(curvature, "is_diagonal", False):
            return solve_then_project(self, state, gradient, curvature, radius, damping, context)
        diagonal, radii = curvature.diagonal(), each(radius, gradient)
        if self.scope == "global":
            step, found, negative = _exact(gradient, diagonal, radii[0], damping)
            return _solution(step, [found], negative)
        pieces = [_exact([g], [h], r, damping) for g, h, r in zip(gradient, diagonal, radii, strict=True)]
        steps, each_found, negatives = zip(*pieces, strict=True)
        return _solution([p for step in steps for p in step], each_found, any(negatives))

    def project(
        self,
        state: State,
        step: Sequence[Tensor],
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """``step`` scaled to the radius: the nearest point in the Euclidean norm."""
        radii = each(radius, step)
        if self.scope == "global":
            return vectors.scale(step, scaling(vectors.norm(step), radii[0]))
        return [p * scaling(torch.linalg.vector_norm(p), r) for p, r in zip(step, radii, strict=True)]

    def steepest(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """-Δ g/‖g‖."""
        radii = each(radius, gradient)
        if self.scope == "global":
            return to_length(gradient, vectors.norm(gradient), radii[0])
        return [
            to_length([g], torch.linalg.vector_norm(g), r)[0] for g, r in zip(gradient, radii, strict=True)
        ]


def to_length(gradient: Sequence[Tensor], norm: Tensor, radius: Tensor) -> list[Tensor]:
    """-Δ g/‖g‖, and 0 where g = 0; Δ = inf is taken as ‖g‖, the gradient step."""
    length = torch.where(torch.isfinite(radius), radius, norm)
    safe = torch.where(norm > 0, norm, torch.ones_like(norm))
    return vectors.scale(gradient, -(length / safe))


def _exact(
    gradient: Sequence[Tensor], diagonal: Sequence[Tensor], radius: Tensor, damping: Tensor | float
) -> tuple[list[Tensor], SecularStep, bool]:
    device = gradient[0].device
    g = vectors.flatten([x.to(device) for x in gradient])
    h = vectors.flatten([x.to(device) for x in diagonal])
    dtype = torch.promote_types(vectors.compute_dtype(g.dtype), h.dtype)
    h = h.to(dtype) + (damping.to(device, dtype) if isinstance(damping, Tensor) else damping)
    found = minimise_in_ball(g.to(dtype), h, float(radius))
    pieces = vectors.unflatten(found.step, gradient)
    negative = found.iterations > 0 and bool(h.min() <= 0)
    return [p.to(x.device) for p, x in zip(pieces, gradient, strict=True)], found, negative


def _solution(step: list[Tensor], found: Sequence[SecularStep], negative: bool) -> Solution:
    device = step[0].device
    return Solution(
        step=step,
        on_boundary=torch.tensor(any(f.on_boundary for f in found), device=device),
        negative_curvature=torch.tensor(negative, device=device),
        iterations=max(f.iterations for f in found),
        diagnostics={"multiplier": max(f.multiplier for f in found), "hard_case": any(f.hard for f in found)},
    )
