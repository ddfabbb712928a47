"""A radius that never moves: the control of every ablation of policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import State
from trust_region import judgement
from trust_region.protocols import Policy, Proposal, Verdict


@dataclass(frozen=True)
class FixedRadius(Policy):
    """Δ stays as it is, and every step is accepted.

    Args:
        radius: Δ > 0, in the region's own norm; ``math.inf`` leaves the region out.
        damping: λ >= 0, in curvature units, added to B.

    >>> state = FixedRadius(2.0).init([torch.zeros(3)])
    >>> state["radius"]
    tensor(2.)

    Cost: nothing.
    """

    radius: float = 1.0
    damping: float = 0.0

    adapts = ()

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ValueError(f"radius must be > 0, got {self.radius}")
        if not self.damping >= 0:
            raise ValueError(f"damping must be >= 0, got {self.damping}")

    def init(self, params: Sequence[Tensor]) -> State:
        """Radius and damping as tensors, so that they are saved with the rest."""
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
        """Accepted, whatever came of it; only a loss that is not finite is refused."""
        return Verdict(
            accepted=torch.isfinite(actual_reduction),
            ratio=judgement.ratio(actual_reduction, proposal.predicted_reduction),
            radius=cast(Tensor, state["radius"]).clone(),
            actual_reduction=actual_reduction,
        )
