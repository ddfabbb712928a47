"""Tadam's radius: three levels of the loss ratio, applied before the step.

Legend: ℓ_t the loss at θ before step t, ℓ̄ its running mean and ℓ̂ the bias-corrected one, P_t the reduction predicted
for step t, d the radius, γ the bound's base, T the number of steps, η the learning rate, u the step downhill.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, Needs, State
from curvature.running_mean import bias_correction, check_beta
from trust_region import judgement
from trust_region.protocols import Policy, Proposal, Solution, StepContext, Verdict


@dataclass(frozen=True)
class TadamRadius(Policy):
    """d is multiplied by (1-γ)^x if ρ < γ, by 1 + γ^x if ρ > 1-γ, and kept otherwise; x = (t-1)/T, at most 1.

    ρ = (ℓ̂_{t-1} - ℓ_t) / max(P_{t-1}, ε) from the second step on, and d is then clipped to [(1-γ)^x, 1 + γ^x]. Unlike
    :class:`SOAARadius` the loss that arrives with step t decides the radius of step t itself. It evaluates no trial
    and takes nothing back. A step without a finite loss leaves d, ℓ̄ and P as they are.

    Args:
        total_steps: T >= 1, steps of the whole run; ``None`` has the final bounds from the start.
        gamma: γ, in (0, 0.5): the three levels are ρ < γ, in between, and ρ > 1-γ.
        beta: decay of the running loss, in [0, 1).
        eps: ε > 0, the smallest prediction that is divided by, in units of the loss.

    >>> policy = TadamRadius()
    >>> state = policy.init([torch.zeros(1)])
    >>> state["radius"]
    tensor(1.)

    Cost: O(P) for the prediction, a handful of scalars of state.
    Reference: Yang, Cho & Lee 2023, Tadam: a robust stochastic gradient optimizer.
    """

    total_steps: int | None = None
    gamma: float = 0.25
    beta: float = 0.9
    eps: float = 1e-8

    lagged = True

    def __post_init__(self) -> None:
        if self.total_steps is not None and not self.total_steps >= 1:
            raise ValueError(f"total_steps must be >= 1 or None, got {self.total_steps}")
        if not 0.0 < self.gamma < 0.5:
            raise ValueError(f"gamma must be in (0, 0.5), got {self.gamma}")
        check_beta(self.beta)
        if not self.eps > 0:
            raise ValueError(f"eps must be > 0, got {self.eps}")

    @property
    def needs(self) -> Needs:
        """The loss of every step."""
        return Needs.GRAD | Needs.LOSS

    def init(self, params: Sequence[Tensor]) -> State:
        """d = 1, P = 0, and the running loss."""
        return {
            "radius": vectors.scalar_like(params, 1.0),
            "predicted": vectors.scalar_like(params),
            "running_loss": vectors.scalar_like(params),
            "losses_seen": vectors.scalar_like(params),
            "policy_steps": vectors.scalar_like(params),
            "last_ratio": vectors.scalar_like(params, math.nan),
            "last_reduction": vectors.scalar_like(params, math.nan),
        }

    def prepare(self, state: State, context: StepContext) -> None:
        """ρ from P_{t-1} and ℓ_t, then d_t, before the step is proposed; then ℓ_t enters the running mean."""
        steps = cast(Tensor, state["policy_steps"]).add_(1.0)
        ratio, reduction = cast(Tensor, state["last_ratio"]), cast(Tensor, state["last_reduction"])
        if context.loss is None:
            ratio.fill_(math.nan)
            reduction.fill_(math.nan)
            return
        radius, predicted = cast(Tensor, state["radius"]), cast(Tensor, state["predicted"])
        running, seen = cast(Tensor, state["running_loss"]), cast(Tensor, state["losses_seen"])
        loss = context.loss.detach().to(running.device, running.dtype)
        finite = torch.isfinite(loss)
        live = finite & (seen > 0) & (predicted != 0.0)
        actual = running / bias_correction(seen, self.beta) - loss
        low, high = self.bounds(steps)
        radius.copy_(torch.where(live, self.adapted(radius, predicted, actual, low, high), radius))
        ratio.copy_(torch.where(live, judgement.ratio(actual, predicted.clamp(min=self.eps)), math.nan))
        reduction.copy_(torch.where(live, actual, math.nan))
        running.copy_(torch.where(finite, torch.lerp(loss, running, self.beta), running))
        seen.add_(finite)

    def bounds(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """(1-γ)^x and 1 + γ^x with x = min(1, (t-1)/T)."""
        if self.total_steps is None:
            x = torch.ones_like(steps)
        else:
            x = (steps - 1.0).div(self.total_steps).clamp(0.0, 1.0)
        return (1.0 - self.gamma) ** x, 1.0 + self.gamma**x

    def adapted(self, radius: Tensor, predicted: Tensor, actual: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """d_t; ρ is compared by products, so that nothing overflows."""
        promised = predicted.clamp(min=self.eps)
        factor = torch.where(
            actual < self.gamma * promised,
            low,
            torch.where(actual > (1.0 - self.gamma) * promised, high, torch.ones_like(high)),
        )
        return torch.minimum(torch.maximum(radius * factor, low), high)

    def predict(
        self,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        solution: Solution,
        context: StepContext,
    ) -> list[Tensor]:
        """P = η(a - ½(a² + Σ v̂u²)), a = Σ m̂u, as one share a tensor.

        Beside :class:`curvature.GradientVariance` the brackets are uᵀ(diag(v̂) + m̂m̂ᵀ)u. Any other curvature stands for
        itself: η(a - ½ uᵀBu).
        """
        lr = context.lr if context.lr is not None else [1.0] * len(solution.step)
        linear = [-x for x in vectors.dots(gradient, solution.step)]
        variance = cast("Sequence[Tensor] | None", getattr(curvature, "variance", None))
        if variance is None:
            quadratic = vectors.dots(curvature.matvec(solution.step), solution.step)
        else:
            whole = vectors.total(linear)  # a² = a Σ a_i: every tensor's share is a a_i
            spread = vectors.dots(
                [v * p for v, p in zip(variance, solution.step, strict=True)], solution.step
            )
            quadratic = [b + a * whole.to(a.device) for a, b in zip(linear, spread, strict=True)]
        return [eta * (a - 0.5 * b) for eta, a, b in zip(lr, linear, quadratic, strict=True)]

    def review(self, state: State, proposal: Proposal, loss: Tensor | None) -> Verdict:
        """Remember P_t; what :meth:`prepare` found is reported."""
        radius, predicted = cast(Tensor, state["radius"]), cast(Tensor, state["predicted"])
        if loss is not None:
            finite = torch.isfinite(loss.detach()).to(predicted.device)
            predicted.copy_(torch.where(finite, proposal.predicted_reduction.to(predicted), predicted))
        accepted = torch.ones((), dtype=torch.bool, device=radius.device)
        ratio, reduction = cast(Tensor, state["last_ratio"]), cast(Tensor, state["last_reduction"])
        return Verdict(accepted, ratio.clone(), radius.clone(), reduction.clone())

    def judge(
        self,
        state: State,
        proposal: Proposal,
        actual_reduction: Tensor,
        trial_gradient_norm: Tensor | None = None,
    ) -> Verdict:
        """The same levels for a reduction that the caller measured; only what is not finite is refused."""
        radius, steps = cast(Tensor, state["radius"]), cast(Tensor, state["policy_steps"]).add_(1.0)
        predicted = proposal.predicted_reduction
        credible = torch.isfinite(actual_reduction) & torch.isfinite(predicted) & (predicted > 0)
        low, high = self.bounds(steps)
        moved = self.adapted(radius, predicted, actual_reduction, low, high)
        radius.copy_(torch.where(credible, moved, torch.minimum(radius, radius * (1.0 - self.gamma))))
        ratio = torch.where(
            credible, judgement.ratio(actual_reduction, predicted.clamp(min=self.eps)), math.nan
        )
        return Verdict(credible, ratio, radius.clone(), actual_reduction)
