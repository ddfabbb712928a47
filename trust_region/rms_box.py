"""A box whose sides are measured in root-mean-square gradients: the region of Adam, Tadam and SOAA.

Legend: g the (mean) gradient, h the diagonal of B, v̂ the bias-corrected running mean of squared gradients, d the
radius, s = Σg²/Σ(v̂+ε), F = (1+s)h, u = -p the step downhill. Equations of SOAA: arXiv 2410.02293.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureEstimator, CurvatureOperator, State
from curvature.running_mean import bias_corrected, check_beta
from trust_region.projected import solve_then_project
from trust_region.protocols import Solution, StepContext
from trust_region.unbounded import Shape


@dataclass(frozen=True)
class RmsBox(Shape):
    """{p : |p_i| <= d |g_i| / √v̂_i}: no element moves further than d times Adam's step.

    Inside the box stands the natural-gradient step g/F with F = (1+s)h; where that leaves the box the step is Adam's
    times d: u = d g / (max(d F, √v̂) + ε). With ``interior=False`` the step always goes to the edge of the box, and a
    fixed radius of 1 makes it Adam's; no curvature is asked then, and with a large radius the model may predict a rise.
    A negative h goes to the edge, which is the exact minimiser there.

    The second moment v̂ is the curvature's own where that is the empirical Fisher diagonal (SOAA, Adam: no extra
    memory); beside any other curvature the region keeps one.

    Args:
        eps: ε > 0 is added to the denominator and to v̂ inside s.
        scope: whether s spans all tensors (``"global"``, the paper's vector form) or every ``"tensor"`` its own.
        interior: whether the step may end inside the box; ``False`` is Adam's.
        rank_one_scale: whether the curvature is scaled by 1 + s (SOAA's correction for the gradient's own direction).
        beta: decay of the region's own second moment, beside curvature that has none.
        fisher_scale: whether 1 + s is this step's (``"exact"``), or the ``"lagged"`` one of the step before, which a
            fused step need not wait for: an element then depends on itself alone. The first step takes 1 + s = 2.

    >>> from curvature import EmpiricalFisherDiagonal, Observation
    >>> adam, g = EmpiricalFisherDiagonal(), [torch.tensor([3.0, -4.0])]
    >>> moments = adam.init(g)
    >>> adam.update(moments, Observation(gradient=g))
    >>> box = RmsBox(interior=False)
    >>> box.minimise({}, g, adam.operator(moments), torch.tensor(1.0), 0.0, StepContext()).step
    [tensor([-1.,  1.])]

    Cost: O(P). Beside a curvature that is not diagonal the step is (B+λI)⁻¹g clipped to the box.
    References: SOAA 2024, arXiv 2410.02293; Yang, Cho & Lee 2023 (Tadam).
    """

    eps: float = 1e-8
    scope: Literal["global", "tensor"] = "global"
    interior: bool = True
    rank_one_scale: bool = True
    beta: float = 0.999
    fisher_scale: Literal["exact", "lagged"] = "exact"

    shardable = True
    finite_only = True

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if not self.eps > 0:
            raise ValueError(f"eps must be > 0, got {self.eps}")
        if self.scope not in ("global", "tensor"):
            raise ValueError(f"scope must be 'global' or 'tensor', got {self.scope!r}")
        if self.fisher_scale not in ("exact", "lagged"):
            raise ValueError(f"fisher_scale must be 'exact' or 'lagged', got {self.fisher_scale!r}")

    def init(self, params: Sequence[Tensor], estimator: CurvatureEstimator | None = None) -> State:
        """A second moment of its own, unless the estimator keeps one; the scale of the step before where it lags."""
        state: State = {}
        if self.lags:
            state["fisher_scale"] = (
                [vectors.scalar_like([p], 2.0) for p in params]
                if self.scope == "tensor"
                else vectors.scalar_like(params, 2.0)
            )
        if estimator is None or getattr(estimator, "tracks_second_moment", False):
            return state
        return state | {
            "box_second_moment": vectors.zeros_like(params),
            "box_count": [vectors.scalar_like([p]) for p in params],
        }

    @property
    def lags(self) -> bool:
        """Whether a scale is formed, and used one step later."""
        return self.fisher_scale == "lagged" and self.interior and self.rank_one_scale

    def observe(self, state: State, context: StepContext) -> None:
        """Take this step's gradient into the region's own second moment."""
        if "box_second_moment" not in state or context.raw_gradient is None:
            return
        moments, counts = (
            cast("list[Tensor]", state["box_second_moment"]),
            cast("list[Tensor]", state["box_count"]),
        )
        for v, t, g in zip(moments, counts, context.raw_gradient, strict=True):
            if g is not None:
                v.mul_(self.beta).addcmul_(g.to(v.dtype), g.to(v.dtype), value=1.0 - self.beta)
                t.add_(1.0)

    def second_moment(self, state: State, curvature: CurvatureOperator) -> list[Tensor]:
        """v̂: the region's own, or the curvature's diagonal."""
        if "box_second_moment" in state:
            return bias_corrected(state["box_second_moment"], state["box_count"], self.beta)  # type: ignore[arg-type]
        return curvature.diagonal()

    def minimise(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        damping: Tensor | float,
        context: StepContext,
    ) -> Solution:
        """-u, exact for a diagonal B."""
        moment = self.second_moment(state, curvature)
        d = list(radius) if isinstance(radius, (list, tuple)) else [cast(Tensor, radius)] * len(moment)
        if not self.interior:
            return adam_step(gradient, moment, d, self.eps)
        if not getattr(curvature, "is_diagonal", False):
            found = solve_then_project(self, state, gradient, curvature, radius, damping, context)
            edge = self.steepest(state, gradient, curvature, radius, context)
            inside = [torch.count_nonzero(p.abs() < e.abs()) for p, e in zip(found.step, edge, strict=True)]
            return replace(found, on_boundary=_record(found.step, inside, found.diagnostics) < 1.0)
        scale = self.curvature_scale(gradient, moment)
        if self.lags:
            scale = exchanged(state, scale)
        step, inside, negative = [], [], []
        squares = "box_second_moment" not in state  # then h is v̂ itself, which no sign need be looked for in
        for g, h, v, d_i, scale_i in zip(gradient, curvature.diagonal(), moment, d, scale, strict=True):
            d_i, scale_i = vectors.on(g.device, d_i, scale_i)
            rms = v.sqrt()
            curved = (h * scale_i).add_(damping).mul_(d_i) if _is_nonzero(damping) else h * (scale_i * d_i)
            inside.append(torch.count_nonzero(curved > rms))
            if not squares:
                negative.append(((curved <= 0) & (g != 0)).any())
            denominator = torch.maximum(curved, rms, out=rms).add_(self.eps)
            step.append(torch.div(g, denominator, out=denominator).mul_(-d_i))
        diagnostics: dict[str, object] = {"curvature_scale": scale}
        met = (
            vectors.any_of(negative) if negative else torch.zeros((), dtype=torch.bool, device=step[0].device)
        )
        return _solution(step, inside, diagnostics, met)

    def curvature_scale(self, gradient: Sequence[Tensor], moment: Sequence[Tensor]) -> list[Tensor]:
        """1 + s for every tensor; s = Σg² / Σ(v̂+ε) over all tensors, or over each its own."""
        if not self.rank_one_scale:
            return [torch.ones((), dtype=v.dtype, device=v.device) for v in moment]
        squares = vectors.dots(gradient, gradient)
        masses = vectors.completed([v.sum() + self.eps * v.numel() for v in moment])
        if self.scope == "tensor":  # a tensor without elements has mass 0
            return [
                rank_one_scale(a, torch.where(b > 0, b, 1.0)) for a, b in zip(squares, masses, strict=True)
            ]
        return [rank_one_scale(vectors.total(squares), vectors.total(masses))] * len(moment)

    def project(
        self,
        state: State,
        step: Sequence[Tensor],
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """``step`` clipped element by element to d|g|/(√v̂+ε)."""
        moment = self.second_moment(state, curvature)
        d = list(radius) if isinstance(radius, (list, tuple)) else [cast(Tensor, radius)] * len(moment)
        clipped = []
        for p, g, v, d_i in zip(step, gradient, moment, d, strict=True):
            half_width = g.abs().div_(v.sqrt().add_(self.eps)).mul_(d_i.to(g.device))
            clipped.append(torch.clamp(p, min=-half_width, max=half_width))
        return clipped

    def steepest(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """-d g / (√v̂ + ε): the corner of the box."""
        moment = self.second_moment(state, curvature)
        d = list(radius) if isinstance(radius, (list, tuple)) else [cast(Tensor, radius)] * len(moment)
        return adam_step(gradient, moment, d, self.eps).step


def exchanged(state: State, scale: Sequence[Tensor]) -> list[Tensor]:
    """The scale of the step before, for every tensor; this one's is kept in its place."""
    held = state["fisher_scale"]
    if isinstance(held, list):
        before = [x.clone() for x in held]
        for x, y in zip(held, scale, strict=True):
            x.copy_(y)
        return before
    one = cast(Tensor, held).clone()
    cast(Tensor, held).copy_(scale[0])
    return [one] * len(scale)


def rank_one_scale(square: Tensor, mass: Tensor) -> Tensor:
    """1 + s, s = Σg²/Σ(v̂+ε); where both sums overflow s is unknown, and 0 keeps the step a number."""
    return 1.0 + torch.nan_to_num(square / mass, nan=0.0, posinf=float("inf"))


def adam_step(
    gradient: Sequence[Tensor], moment: Sequence[Tensor], radius: Sequence[Tensor], eps: float
) -> Solution:
    """-d g / (√v̂ + ε): to the edge of the box in every element."""
    step = []
    for g, v, d in zip(gradient, moment, radius, strict=True):
        denominator = v.sqrt().add_(eps)
        step.append(torch.div(g, denominator, out=denominator).mul_(-d.to(g.device)))
    zero = torch.zeros((), dtype=torch.int64, device=step[0].device)
    return _solution(step, [zero], {}, zero.to(torch.bool))  # no curvature is looked at


def _is_nonzero(damping: Tensor | float) -> bool:
    return isinstance(damping, Tensor) or damping != 0.0


def _record(step: list[Tensor], inside: list[Tensor], diagnostics: dict[str, object]) -> Tensor:
    """Telemetry: the fraction of elements strictly inside the box is the fraction where the curvature is live."""
    fraction = vectors.fraction(vectors.total(inside), step)
    diagnostics["fisher_active_fraction"] = fraction
    return fraction


def _solution(
    step: list[Tensor], inside: list[Tensor], diagnostics: dict[str, object], negative: Tensor
) -> Solution:
    fraction = _record(step, inside, diagnostics)
    return Solution(
        step=step,
        on_boundary=fraction < 1.0,
        negative_curvature=negative,
        iterations=1,
        diagnostics=diagnostics,
    )
