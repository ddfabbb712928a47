"""SOAA's radius: scaled by the clipped ratio of what the smoothed loss lost to what was predicted.

Legend (arXiv 2410.02293): ℓ_t the loss at θ before step t, ℓ̄ its running mean and ℓ̂ the bias-corrected one, P_t the
reduction predicted for step t, d the radius, γ the bound's base, T the number of steps, η the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, Needs, State
from curvature.running_mean import bias_correction, check_beta
from trust_region.protocols import Policy, Proposal, Solution, StepContext, Verdict


@dataclass(frozen=True)
class SOAARadius(Policy):
    """d_t = min(max(ρ d_{t-1}, (1-γ)^((t-1)/T)), 1 + γ^((t-1)/T)), with ρ = (ℓ̂_t - ℓ_t) / max(P_{t-1}, ε).

    A lagged policy: it evaluates no trial and rejects nothing; the minibatch loss that arrives with step t says how
    good step t - 1 was. The bounds start at [1, 2] and end at [1-γ, 1+γ], reached after T steps, so that d acts as a
    multiplier of the learning rate between those two. A step without a finite loss leaves d, ℓ̄ and P as they are;
    so does d while nothing has been predicted yet.

    Args:
        total_steps: T >= 1, steps of the whole run; ``None`` has the final bounds from the start.
        gamma: γ, in (0, 0.25].
        beta: decay of the running loss, β₁ in the paper, in [0, 1).
        eps: ε > 0, the smallest prediction that is divided by, in units of the loss.
        scope: one radius for all tensors (``"global"``) or for every ``"tensor"`` its own.
        prediction: ``"paper"`` is P = η(⟨g,u⟩ - ½⟨v̂,u²⟩); ``"model"`` is the reduction of the quadratic model that the
            region minimises, η⟨g,u⟩ - ½η²⟨(1+s)v̂,u²⟩.

    Cost: O(P) for the prediction, a handful of scalars of state.
    Reference: SOAA 2024, arXiv 2410.02293.
    """

    total_steps: int | None = None
    gamma: float = 0.1
    beta: float = 0.9
    eps: float = 1e-8
    scope: Literal["global", "tensor"] = "global"
    prediction: Literal["paper", "model"] = "paper"

    lagged = True

    def __post_init__(self) -> None:
        if self.total_steps is not None and not self.total_steps >= 1:
            raise ValueError(f"total_steps must be >= 1 or None, got {self.total_steps}")
        if not 0.0 < self.gamma <= 0.25:
            raise ValueError(f"gamma must be in (0, 0.25], got {self.gamma}")
        check_beta(self.beta)
        if not self.eps > 0:
            raise ValueError(f"eps must be > 0, got {self.eps}")
        if self.scope not in ("global", "tensor"):
            raise ValueError(f"scope must be 'global' or 'tensor', got {self.scope!r}")
        if self.prediction not in ("paper", "model"):
            raise ValueError(f"prediction must be 'paper' or 'model', got {self.prediction!r}")

    @property
    def needs(self) -> Needs:
        """The loss of every step."""
        return Needs.GRAD | Needs.LOSS

    def init(self, params: Sequence[Tensor]) -> State:
        """d = 1, P = 0; one of each a tensor with ``scope="tensor"``."""
        if self.scope == "tensor":
            radius: Tensor | list[Tensor] = [vectors.scalar_like([p], 1.0) for p in params]
            predicted: Tensor | list[Tensor] = [vectors.scalar_like([p]) for p in params]
        else:
            radius, predicted = vectors.scalar_like(params, 1.0), vectors.scalar_like(params)
        return {
            "radius": radius,
            "predicted": predicted,
            "running_loss": vectors.scalar_like(params),
            "losses_seen": vectors.scalar_like(params),
            "policy_steps": vectors.scalar_like(params),
        }

    def predict(
        self,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        solution: Solution,
        context: StepContext,
    ) -> list[Tensor]:
        """P for every tensor."""
        product = (
            solution.curvature_step
            if solution.curvature_step is not None
            else curvature.matvec(solution.step)
        )
        linear = [-x for x in vectors.dots(gradient, solution.step)]
        quadratic = vectors.dots(product, solution.step)
        lr = context.lr if context.lr is not None else [1.0] * len(linear)
        scale = cast(
            "Sequence[Tensor | float]", solution.diagnostics.get("curvature_scale", [1.0] * len(linear))
        )
        return self.predicted_from(linear, quadratic, lr, scale)

    def predicted_from(
        self,
        linear: Sequence[Tensor],
        quadratic: Sequence[Tensor],
        lr: Sequence[Tensor | float],
        scale: Sequence[Tensor | float],
    ) -> list[Tensor]:
        """P for every tensor, from ⟨g,u⟩, ⟨u,Bu⟩, η and 1+s."""
        if self.prediction == "paper":
            return [eta * (a - 0.5 * b) for eta, a, b in zip(lr, linear, quadratic, strict=True)]
        return [
            eta * (a - 0.5 * eta * k * b) for eta, a, b, k in zip(lr, linear, quadratic, scale, strict=True)
        ]

    def review(self, state: State, proposal: Proposal, loss: Tensor | None) -> Verdict:
        """ρ and d_t from ℓ_t and P_{t-1}; then remember P_t."""
        steps = cast(Tensor, state["policy_steps"]).add_(1.0)
        running, seen = cast(Tensor, state["running_loss"]), cast(Tensor, state["losses_seen"])
        per_tensor = self.scope == "tensor"
        radii = cast("list[Tensor]", state["radius"] if per_tensor else [state["radius"]])
        predictions = cast("list[Tensor]", state["predicted"] if per_tensor else [state["predicted"]])
        accepted = torch.ones((), dtype=torch.bool, device=steps.device)
        if loss is None:
            return Verdict(accepted, torch.full_like(running, float("nan")), radii[0].clone())
        loss = loss.detach().to(running.device, running.dtype)
        finite = torch.isfinite(loss)
        mean = torch.where(finite, torch.lerp(loss, running, self.beta), running)
        seen.add_(finite)
        running.copy_(mean)
        smoothed = mean / bias_correction(seen, self.beta)
        new = proposal.predicted_parts if per_tensor else [proposal.predicted_reduction]
        ratios = []
        for d, P, predicted in zip(radii, predictions, cast("list[Tensor]", new), strict=True):
            here = vectors.on(d.device, smoothed - loss, steps, finite)
            ratio, radius = self.adapted(d, P, *here)
            ratios.append(ratio)
            d.copy_(radius)
            # a prediction that overflowed counts as none
            P.copy_(torch.where(here[2], torch.nan_to_num(predicted, nan=0.0, posinf=0.0, neginf=0.0), P))
        return Verdict(
            accepted, ratios[0], radii[0].clone(), torch.where(finite, smoothed - loss, float("nan"))
        )

    def adapted(
        self, radius: Tensor, predicted: Tensor, actual_reduction: Tensor, steps: Tensor, finite: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ρ and d_t; d stays as it is where there is no finite loss or nothing was predicted."""
        exponent = (
            (steps - 1.0).div(self.total_steps).clamp(0.0, 1.0)
            if self.total_steps
            else torch.ones_like(steps)
        )
        low, high = (1.0 - self.gamma) ** exponent, 1.0 + self.gamma**exponent
        live = finite & (predicted != 0.0)
        promised = predicted.clamp(min=self.eps)
        # a quotient that would overflow saturates: d is at its bound then, whatever ρ is
        most = 0.5 * torch.finfo(actual_reduction.dtype).max
        actual = actual_reduction.clamp(-most, most)
        ratio = actual / torch.maximum(promised, actual.abs() / most)
        moved = torch.minimum(torch.maximum(ratio * radius, low), high)
        return torch.where(live, ratio, float("nan")), torch.where(live, moved, radius)

    def judge(
        self,
        state: State,
        proposal: Proposal,
        actual_reduction: Tensor,
        trial_gradient_norm: Tensor | None = None,
    ) -> Verdict:
        """The same rule for a reduction that the caller measured; nothing finite is rejected."""
        steps = cast(Tensor, state["policy_steps"]).add_(1.0)
        finite = torch.isfinite(actual_reduction)
        per_tensor = self.scope == "tensor"
        radii = cast("list[Tensor]", state["radius"] if per_tensor else [state["radius"]])
        parts = cast(
            "list[Tensor]", proposal.predicted_parts if per_tensor else [proposal.predicted_reduction]
        )
        ratios = []
        for d, predicted in zip(radii, parts, strict=True):
            ratio, radius = self.adapted(d, predicted, *vectors.on(d.device, actual_reduction, steps, finite))
            ratios.append(ratio)
            d.copy_(torch.where(finite.to(d.device), radius, torch.minimum(radius, d * (1.0 - self.gamma))))
        return Verdict(finite, ratios[0], radii[0].clone())
