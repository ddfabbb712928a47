"""Backtracking: try the full radius, and a smaller one after every refusal."""

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
class Backtracking(Policy):
    """Δ returns to its start after every accepted step, and shrinks after every refused one.

    The line search of TRPO as a radius policy: nothing is remembered from one accepted step to the next. In a
    :class:`KLBall`, whose radius bounds pᵀBp, ``shrink=0.25`` halves the step.

    Args:
        radius: Δ > 0, finite, in the region's own units.
        shrink: factor in (0, 1).
        eta: accept above this ρ, 0 <= eta < 1.
        damping: λ >= 0 in curvature units, fixed.
        rounding: units in the last place of the loss that count as noise.

    >>> policy = Backtracking(radius=1.0, shrink=0.5)
    >>> state = policy.init([torch.zeros(1)])
    >>> trial = Proposal([torch.ones(1)], torch.tensor(1.0), torch.tensor(1.0), torch.tensor(True))
    >>> [float(policy.judge(state, trial, torch.tensor(a)).radius) for a in (-1.0, -1.0, 1.0)]
    [0.5, 0.25, 1.0]

    Cost: a handful of scalars, no wait for the host.
    Reference: Schulman et al. 2015, Trust region policy optimization, arXiv 1502.05477, appendix C.
    """

    radius: float = 0.01
    shrink: float = 0.25
    eta: float = 0.0
    damping: float = 0.0
    rounding: float = 10.0

    adapts = ("radius",)

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(f"radius must be > 0 and finite, got {self.radius}")
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink must be in (0, 1), got {self.shrink}")
        if not 0 <= self.eta < 1:
            raise ValueError(f"eta must be in [0, 1), got {self.eta}")
        if not self.damping >= 0:
            raise ValueError(f"damping must be >= 0, got {self.damping}")
        if not self.rounding >= 0:
            raise ValueError(f"rounding must be >= 0, got {self.rounding}")

    @property
    def needs(self) -> Needs:
        """The loss at the trial point."""
        return Needs.GRAD | Needs.LOSS | Needs.TRIAL_LOSS

    def init(self, params: Sequence[Tensor]) -> State:
        """Δ and λ."""
        return {
            "radius": vectors.scalar_like(params, self.radius),
            "damping": vectors.scalar_like(params, self.damping),
        }

    def judge(
        self,
        state: State,
        proposal: Proposal,
        actual_reduction: Tensor,
        trial_gradient_norm: Tensor | None = None,
    ) -> Verdict:
        """Shrink until the loss falls enough, then start afresh."""
        radius = cast(Tensor, state["radius"])
        predicted = proposal.predicted_reduction
        actual = judgement.rounded(proposal, actual_reduction, self.rounding)
        accepted = judgement.credible(proposal, actual_reduction) & judgement.above(
            actual, self.eta, predicted
        )
        smaller = (radius * self.shrink).clamp(min=torch.finfo(radius.dtype).tiny)
        new = torch.where(accepted, torch.full_like(radius, self.radius), smaller)
        radius.copy_(new)
        return Verdict(accepted, judgement.ratio(actual, predicted), new, actual_reduction)
