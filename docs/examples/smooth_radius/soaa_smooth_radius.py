"""A radius that is a smooth function of the ratio, after Hei (2003), "A self-adaptive trust region algorithm".

Legend: ρ = actual / predicted reduction, η the smallest ρ that is accepted, Δ the radius, β < 1 < M the bounds of
its factor. Δ ← R(ρ) Δ with R(ρ) = β + (M - β) σ(k (ρ - η) + c), and c such that R(η) = 1: R rises from β to M, below
η it shrinks, above η it grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from curvature import Needs
from curvature.protocols import State
from curvature.vectors import scalar_like
from trust_region import L2Ball, Policy, Proposal, SteihaugCG, TrustRegion, Verdict, judgement


@dataclass(frozen=True)
class SmoothRadius(Policy):
    """Δ ← R(ρ) Δ, with no threshold but that of acceptance.

    Args:
        initial_radius: Δ₀ > 0, in the region's norm.
        max_radius: the largest Δ.
        eta: η in [0, 1): a step with ρ <= η is taken back.
        shrink: β in (0, 1), the factor for ρ → -∞.
        grow: M > 1, the factor for ρ → ∞.
        steepness: k > 0.
    """

    initial_radius: float = 1.0
    max_radius: float = 1000.0
    eta: float = 0.1
    shrink: float = 0.25
    grow: float = 2.0
    steepness: float = 4.0

    adapts = ("radius",)

    def __post_init__(self) -> None:
        if not 0 < self.initial_radius <= self.max_radius < math.inf:
            raise ValueError(
                f"initial_radius must be in (0, max_radius = {self.max_radius}], got {self.initial_radius}"
            )
        if not 0 <= self.eta < 1:
            raise ValueError(f"eta must be in [0, 1), got {self.eta}")
        if not 0 < self.shrink < 1 < self.grow:
            raise ValueError(f"shrink must be in (0, 1) and grow > 1, got {self.shrink} and {self.grow}")
        if not self.steepness > 0:
            raise ValueError(f"steepness must be > 0, got {self.steepness}")

    @property
    def needs(self) -> Needs:
        return Needs.GRAD | Needs.LOSS | Needs.TRIAL_LOSS

    def init(self, params: Sequence[Tensor]) -> State:
        return {"radius": scalar_like(params, self.initial_radius)}

    def judge(
        self,
        state: State,
        proposal: Proposal,
        actual_reduction: Tensor,
        trial_gradient_norm: Tensor | None = None,
    ) -> Verdict:
        radius = cast(Tensor, state["radius"])
        credible = judgement.credible(proposal, actual_reduction)  # finite, and something was predicted
        actual = judgement.rounded(proposal, actual_reduction, 10.0)
        accepted = credible & judgement.above(actual, self.eta, proposal.predicted_reduction)
        ratio = judgement.ratio(actual, proposal.predicted_reduction)
        factor = torch.where(credible, self.factor(ratio), self.shrink)
        # a rejection never enlarges, whatever rounding makes of R(η) = 1; a step inside tells nothing beyond Δ
        factor = torch.where(accepted & proposal.on_boundary, factor, factor.clamp(max=1.0))
        new = (radius * factor).clamp(torch.finfo(radius.dtype).tiny, self.max_radius)
        radius.copy_(new)
        return Verdict(accepted, ratio, new, actual_reduction)

    def factor(self, ratio: Tensor) -> Tensor:
        """R(ρ)."""
        share = (1.0 - self.shrink) / (self.grow - self.shrink)
        c = math.log(share / (1.0 - share))
        width = self.grow - self.shrink
        return self.shrink + width * torch.sigmoid(self.steepness * (ratio - self.eta) + c)


def smooth_ratio(max_iterations: int | None = None, **policy: Any) -> TrustRegion:
    """A Euclidean ball, Steihaug's conjugate gradients, and the smooth radius; options go to the policy."""
    return TrustRegion(L2Ball(), SteihaugCG(max_iterations), SmoothRadius(**policy))
