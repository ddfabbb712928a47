"""The classical radius: shrink where the model promised too much, grow where it kept its word at the boundary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import Needs, State
from trust_region import judgement
from trust_region.lagged import check_evaluate, evaluation_needs, exchange, memory
from trust_region.protocols import Policy, Proposal, Verdict


@dataclass(frozen=True)
class RatioRadius(Policy):
    """Δ follows ρ = actual / predicted reduction; a step with ρ <= η is taken back.

    With :class:`SteihaugCG` the defaults are those of ``scipy.optimize.minimize(method="trust-ncg")``: the radius is
    quartered below ρ = ¼, doubled above ¾ if the step ended on the boundary, and a step is accepted above 0.15. What
    differs: a ratio that is NaN rejects and shrinks (SciPy's radius freezes), and where both reductions are lost in
    the rounding of the loss, ρ counts as 1.

    With ``evaluate="lagged"`` no trial is evaluated and nothing is taken back: the loss of the next step judges this
    one. That costs nothing, but with minibatches the two losses are of different data.

    Args:
        initial_radius: Δ₀ in (0, max_radius], in the region's norm.
        max_radius: the largest Δ.
        eta: accept above this ρ, 0 <= eta <= shrink_below.
        shrink_below: shrink below this ρ.
        grow_above: grow above this ρ, at the boundary only.
        shrink: factor in (0, 1).
        grow: factor > 1; growth is bounded by it however large ρ is.
        evaluate: ``"trial"`` evaluates the loss at the trial point, ``"lagged"`` waits for the next step's loss.
        rounding: units in the last place of the loss that count as noise; 0 leaves SciPy's rule alone.

    >>> policy = RatioRadius(initial_radius=2.0)
    >>> state = policy.init([torch.zeros(1)])
    >>> bad = Proposal([torch.ones(1)], torch.tensor(1.0), torch.tensor(1.0), torch.tensor(True))
    >>> policy.judge(state, bad, torch.tensor(float("nan")))
    Verdict(accepted=tensor(False), ratio=tensor(nan), radius=tensor(0.5000), actual_reduction=tensor(nan))

    Cost: a handful of scalars, no wait for the host.
    Reference: Nocedal & Wright 2006, algorithm 4.1; Conn, Gould & Toint 2000, algorithm 6.1.1.
    """

    initial_radius: float = 1.0
    max_radius: float = 1000.0
    eta: float = 0.15
    shrink_below: float = 0.25
    grow_above: float = 0.75
    shrink: float = 0.25
    grow: float = 2.0
    evaluate: Literal["trial", "lagged"] = "trial"
    rounding: float = 10.0

    adapts = ("radius",)

    def __post_init__(self) -> None:
        if not 0 < self.max_radius < math.inf:
            raise ValueError(f"max_radius must be > 0 and finite, got {self.max_radius}")
        if not 0 < self.initial_radius <= self.max_radius:
            raise ValueError(
                f"initial_radius must be in (0, max_radius = {self.max_radius:g}], got {self.initial_radius}"
            )
        if not 0 <= self.eta <= self.shrink_below < self.grow_above:
            raise ValueError(
                "eta, shrink_below, grow_above must satisfy 0 <= eta <= shrink_below < grow_above, got "
                f"{self.eta}, {self.shrink_below}, {self.grow_above}"
            )
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink must be in (0, 1), got {self.shrink}")
        if not 1 < self.grow < math.inf:
            raise ValueError(f"grow must be > 1 and finite, got {self.grow}")
        if not self.rounding >= 0:
            raise ValueError(f"rounding must be >= 0, got {self.rounding}")
        check_evaluate(self.evaluate)

    @property
    def lagged(self) -> bool:  # type: ignore[override]
        """Whether the next step's loss judges this one."""
        return self.evaluate == "lagged"

    @property
    def needs(self) -> Needs:
        """The loss at the trial point, or of every step."""
        return evaluation_needs(self.evaluate)

    def init(self, params: Sequence[Tensor]) -> State:
        """Δ₀, and the memory of a lagged policy."""
        state: State = {"radius": vectors.scalar_like(params, self.initial_radius)}
        return {**state, **memory(params)} if self.lagged else state

    def judge(
        self,
        state: State,
        proposal: Proposal,
        actual_reduction: Tensor,
        trial_gradient_norm: Tensor | None = None,
    ) -> Verdict:
        """Nocedal & Wright, algorithm 4.1."""
        radius = cast(Tensor, state["radius"])
        predicted = proposal.predicted_reduction
        credible = judgement.credible(proposal, actual_reduction)
        actual = judgement.rounded(proposal, actual_reduction, self.rounding)
        accepted = credible & judgement.above(actual, self.eta, predicted)
        shrink = ~credible | judgement.below(actual, self.shrink_below, predicted)
        grow = accepted & judgement.above(actual, self.grow_above, predicted) & proposal.on_boundary
        new = torch.where(shrink, radius * self.shrink, torch.where(grow, radius * self.grow, radius))
        new = new.clamp(min=torch.finfo(radius.dtype).tiny, max=self.max_radius)
        radius.copy_(new)
        return Verdict(accepted, judgement.ratio(actual, predicted), new, actual_reduction)

    def review(self, state: State, proposal: Proposal, loss: Tensor | None) -> Verdict:
        """The same rule for the previous step, but what was done stays done."""
        radius = cast(Tensor, state["radius"])
        before = radius.clone()
        previous = exchange(state, proposal, loss)
        if previous is None:
            nothing = torch.full_like(before, math.nan)
            return Verdict(torch.ones((), dtype=torch.bool, device=before.device), nothing, before, nothing)
        verdict = self.judge(state, previous.proposal, previous.actual_reduction)
        return keep_unless(previous.known, verdict, radius, before)


def keep_unless(known: Tensor, verdict: Verdict, entry: Tensor, before: Tensor) -> Verdict:
    """Put ``entry`` back where nothing could be judged; a lagged policy accepts every step that ended finite."""
    entry.copy_(torch.where(known, entry, before))
    nothing = torch.full_like(before, math.nan)
    actual = cast(Tensor, verdict.actual_reduction)
    return Verdict(
        accepted=~known | torch.isfinite(actual),
        ratio=torch.where(known, verdict.ratio, nothing),
        radius=entry.clone(),
        actual_reduction=torch.where(known, actual, nothing),
    )
