"""The consistently adaptive trust region (CAT) of Hamad & Hinder.

Legend: d the step, M(d) = -q the model's change, f⁺ and ∇f⁺ loss and gradient at the trial point, r the radius.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import Needs, State
from trust_region import judgement
from trust_region.protocols import Policy, Proposal, Verdict


@dataclass(frozen=True)
class CAT(Policy):
    """r = ω‖d‖ if ρ̂ >= β, else ‖d‖/ω, with ρ̂ = (f - f⁺) / (-M(d) + (θ/2) ‖∇f⁺‖ ‖d‖).

    The added term asks for more reduction where the trial point is still steep. With it the method needs the optimal
    O(ε^{-3/2}) steps, without knowing how fast the Hessian changes. Any step that does not increase the loss is taken.
    Each trial costs a gradient at the trial point; after acceptance that is the next step's gradient.

    Args:
        initial_radius: r₁ in (0, max_radius].
        beta: β in (0, 1).
        theta: θ in [0, 1) with βθ < 1 - β.
        omega: ω > 1.
        max_radius: the largest r; the paper has none.
        rounding: units in the last place of the loss that count as noise.

    Raises:
        ValueError: in ``judge``, without the gradient norm at the trial point.

    >>> policy = CAT()
    >>> state = policy.init([torch.zeros(1)])
    >>> trial = Proposal([torch.ones(1)], torch.tensor(1.0), torch.tensor(0.5), torch.tensor(False))
    >>> policy.judge(state, trial, torch.tensor(1.0), torch.tensor(0.0)).radius
    tensor(4.)

    Cost: a handful of scalars, no wait for the host.
    Reference: Hamad & Hinder 2022, A consistently adaptive trust-region method, arXiv 2206.10053, algorithm 1; the
    constants are those of its experiments (β = θ = 0.1, ω = 8, r₁ = 1).
    """

    initial_radius: float = 1.0
    beta: float = 0.1
    theta: float = 0.1
    omega: float = 8.0
    max_radius: float = 1e10
    rounding: float = 10.0

    adapts = ("radius",)

    def __post_init__(self) -> None:
        if not 0 < self.max_radius < math.inf:
            raise ValueError(f"max_radius must be > 0 and finite, got {self.max_radius}")
        if not 0 < self.initial_radius <= self.max_radius:
            raise ValueError(
                f"initial_radius must be in (0, max_radius = {self.max_radius:g}], got {self.initial_radius}"
            )
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must be in (0, 1), got {self.beta}")
        if not 0 <= self.theta < 1 or not self.beta * self.theta < 1 - self.beta:
            raise ValueError(
                f"theta must be in [0, 1) with beta * theta < 1 - beta, got {self.theta} (beta {self.beta})"
            )
        if not 1 < self.omega < math.inf:
            raise ValueError(f"omega must be > 1 and finite, got {self.omega}")
        if not self.rounding >= 0:
            raise ValueError(f"rounding must be >= 0, got {self.rounding}")

    @property
    def needs(self) -> Needs:
        """Loss and gradient at the trial point."""
        return Needs.GRAD | Needs.LOSS | Needs.TRIAL_LOSS | Needs.TRIAL_GRADIENT

    def init(self, params: Sequence[Tensor]) -> State:
        """r₁."""
        return {"radius": vectors.scalar_like(params, self.initial_radius)}

    def judge(
        self,
        state: State,
        proposal: Proposal,
        actual_reduction: Tensor,
        trial_gradient_norm: Tensor | None = None,
    ) -> Verdict:
        """Algorithm 1; the comparison with β is by products."""
        if trial_gradient_norm is None:
            raise ValueError(
                "trial_gradient_norm must be given: CAT's ratio needs the gradient at the trial point; use a closure "
                "that computes gradients (step(closure) with optimizer.backward(loss) in it)"
            )
        radius = cast(Tensor, state["radius"])
        norm, predicted = proposal.step_norm.to(radius.dtype), proposal.predicted_reduction
        credible = judgement.credible(proposal, actual_reduction) & torch.isfinite(trial_gradient_norm)
        actual = judgement.rounded(proposal, actual_reduction, self.rounding)
        promised = predicted + 0.5 * self.theta * trial_gradient_norm * norm
        accepted = credible & (actual >= 0)
        grow = accepted & judgement.at_least(actual, self.beta, promised)
        # a step that overflowed or vanished has no length to measure from
        length = torch.where(torch.isfinite(norm) & (norm > 0), torch.minimum(norm, radius), radius)
        new = torch.where(grow, self.omega * length, length / self.omega)
        new = new.clamp(min=torch.finfo(radius.dtype).tiny, max=self.max_radius)
        radius.copy_(new)
        return Verdict(accepted, judgement.ratio(actual, promised), new, actual_reduction)
