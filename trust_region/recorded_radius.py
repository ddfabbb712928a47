"""A radius that another run recorded: what an ablation needs to tell the radius from the curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import State
from trust_region import judgement
from trust_region.protocols import Policy, Proposal, StepContext, Verdict


@dataclass(frozen=True)
class RecordedRadius(Policy):
    """Δ_t as it was recorded; after its end the last one holds. Every step is accepted.

    Args:
        radii: Δ_1, Δ_2, …, each > 0 and finite: the radius that step t used. A lagged policy such as SOAA's reports
            in ``step_info.radius`` the radius of the *next* step: put its starting radius in front.

    >>> policy = RecordedRadius((1.0, 1.5))
    >>> state = policy.init([torch.zeros(1)])
    >>> for _ in range(3):
    ...     policy.prepare(state, StepContext())
    ...     print(float(state["radius"]))
    1.0
    1.5
    1.5

    Cost: 4 bytes a recorded radius.
    """

    radii: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "radii", tuple(float(r) for r in self.radii))
        if not self.radii:
            raise ValueError("radii must hold at least one radius, got none")
        for t, r in enumerate(self.radii):
            if not 0 < r < math.inf:
                raise ValueError(f"radii[{t}] must be > 0 and finite, got {r}")

    def init(self, params: Sequence[Tensor]) -> State:
        """The recording as a tensor, so that no step waits for the host."""
        like = vectors.scalar_like(params)
        return {
            "radius": torch.full_like(like, self.radii[0]),
            "recorded": torch.tensor(self.radii, dtype=like.dtype, device=like.device),
            "policy_steps": like,
        }

    def prepare(self, state: State, context: StepContext) -> None:
        """Δ_t, before the step."""
        recorded, steps = cast(Tensor, state["recorded"]), cast(Tensor, state["policy_steps"])
        index = steps.clamp(max=len(self.radii) - 1).to(torch.int64)
        cast(Tensor, state["radius"]).copy_(recorded.index_select(0, index.reshape(1)).reshape(()))
        steps.add_(1.0)

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
        )
