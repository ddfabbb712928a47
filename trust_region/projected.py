"""Solve, then project: what regions do with a curvature that is not diagonal, and the Cauchy step that backs it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, SingularCurvatureError, State
from trust_region.protocols import Solution, StepContext


class Projecting(Protocol):
    """What :func:`solve_then_project` asks of a region."""

    def project(
        self,
        state: State,
        step: Sequence[Tensor],
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """The nearest point of the region."""
        ...

    def steepest(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """argmin of gᵀp over the region."""
        ...


def each(radius: Tensor | Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """One radius a tensor, on its device and in a dtype that mixes with it."""
    radii = [radius] * len(like) if isinstance(radius, Tensor) else list(radius)
    return [r.to(x.device, vectors.compute_dtype(x.dtype)) for r, x in zip(radii, like, strict=True)]


def changed(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Whether any element differs, a 0-d bool on the first tensor's device."""
    return vectors.any_of([(x != y).any() for x, y in zip(a, b, strict=True)])


def choose(condition: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """``a`` where the 0-d condition holds, else ``b``; no host is asked."""
    return [torch.where(condition.to(x.device), x, y.to(x.dtype)) for x, y in zip(a, b, strict=True)]


def cauchy_fraction(slope: Tensor, bend: Tensor) -> Tensor:
    """The best t in [0, 1] along a descent direction s with slope = gᵀs < 0 and bend = sᵀ(B+λI)s."""
    positive = bend > 0
    t = torch.where(
        positive, -slope / torch.where(positive, bend, torch.ones_like(bend)), torch.ones_like(bend)
    )
    return torch.where(slope < 0, t.clamp(0.0, 1.0), torch.zeros_like(t))


def cauchy_step(
    gradient: Sequence[Tensor],
    steepest: Sequence[Tensor],
    curvature: CurvatureOperator,
    damping: Tensor | float,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The best multiple t <= 1 of the steepest step s: (t s, t B s, t = 1, sᵀ(B+λI)s <= 0). One product."""
    product = curvature.matvec(steepest)
    slope = vectors.dot(gradient, steepest)
    bend = vectors.dot(steepest, product) + damping * vectors.dot(steepest, steepest)
    t = cauchy_fraction(slope, bend)
    return vectors.scale(steepest, t), vectors.scale(product, t), t >= 1, (bend <= 0) & (slope < 0)


def solve_then_project(
    region: Projecting,
    state: State,
    gradient: Sequence[Tensor],
    curvature: CurvatureOperator,
    radius: Tensor | Sequence[Tensor],
    damping: Tensor | float,
    context: StepContext,
) -> Solution:
    """-(B+λI)⁻¹g projected to the region, or the region's Cauchy step where that would not reduce the model.

    The Cauchy step also stands in where the damping λ > 0 happens to make an indefinite B singular.

    An operator that says ``positive_semidefinite = True`` and is only scaled down needs no such check; that is
    left to the regions that know (:class:`KLBall`).

    Cost: one ``solve`` and two products.
    """
    newton = damped_newton(gradient, curvature, damping)
    steepest = region.steepest(state, gradient, curvature, radius, context)
    fallback, fallback_product, full, concave = cauchy_step(gradient, steepest, curvature, damping)
    if newton is None:  # an eigenvalue of -λ
        told: dict[str, object] = {"cauchy_fallback": torch.ones_like(full)}
        return Solution(
            fallback,
            on_boundary=full,
            negative_curvature=torch.ones_like(full),
            iterations=1,
            curvature_step=fallback_product,
            diagnostics=told,
        )
    step = region.project(state, newton, gradient, curvature, radius, context)
    product = curvature.matvec(step)
    # the damped model is the one that is minimised; the undamped one must fall too, since it is what is judged
    reduction = -(vectors.dot(gradient, step) + 0.5 * vectors.dot(step, product))
    downhill = reduction > 0
    return Solution(
        step=choose(downhill, step, fallback),
        on_boundary=torch.where(downhill, changed(step, newton).to(downhill.device), full),
        # gᵀp = -pᵀ(B+λI)p for the Newton step p
        negative_curvature=concave | (vectors.dot(gradient, newton) > 0),
        iterations=1,
        curvature_step=choose(downhill, product, fallback_product),
        diagnostics={"cauchy_fallback": ~downhill},
    )


def damped_newton(
    gradient: Sequence[Tensor], curvature: CurvatureOperator, damping: Tensor | float
) -> list[Tensor] | None:
    """-(B+λI)⁻¹g; ``None`` where λ > 0 met an eigenvalue of -λ, which an indefinite B may have at any step.

    Raises:
        curvature.SingularCurvatureError: for a singular B without a damping: there a damping is what is missing.
    """
    try:
        return vectors.negative(curvature.solve(gradient, damping))
    except SingularCurvatureError:
        if not bool(torch.as_tensor(damping) > 0):
            raise
        return None


def scaling(norm: Tensor, radius: Tensor) -> Tensor:
    """min(1, Δ/‖p‖) without dividing by zero."""
    inside = norm <= radius
    return torch.where(
        inside, torch.ones_like(norm), radius / torch.where(inside, torch.ones_like(norm), norm)
    )


def check_radius_bounds(name: str, value: float, upper: float = math.inf) -> None:
    """Refuse a radius, damping or weight that is not in (0, upper]."""
    if not 0 < value <= upper:
        rule = "> 0" if math.isinf(upper) else f"in (0, {upper:g}]"
        raise ValueError(f"{name} must be {rule}, got {value}")
