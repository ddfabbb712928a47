"""A pace for any policy: still during warm-up, and moving every k steps only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import Needs, State
from trust_region.protocols import Proposal, RadiusPolicy, StepContext, Verdict
from trust_region.ratio_radius import RatioRadius

ADAPTED = ("radius", "damping", "sigma")


@dataclass(frozen=True)
class Paced:
    """Another policy whose radius, damping or weight moves only after ``warmup`` steps, and then every ``every`` ones.

    Accepting and rejecting go on as ever. A step that is rejected also moves the radius as ever: if it did not, the
    same step would be tried, and refused, for ever.

    Args:
        policy: the policy to hold back; it still sees every step (its running means go on).
        warmup: steps at the start without adaptation, >= 0.
        every: adapt at every k-th step after that, >= 1.

    >>> policy = Paced(RatioRadius(), warmup=2)
    >>> state = policy.init([torch.zeros(1)])
    >>> good = Proposal([torch.ones(1)], torch.tensor(1.0), torch.tensor(1.0), torch.tensor(True))
    >>> [float(policy.judge(state, good, torch.tensor(1.0)).radius) for _ in range(3)]
    [1.0, 1.0, 2.0]

    Cost: a copy of a few scalars.
    """

    policy: RadiusPolicy = field(default_factory=RatioRadius)
    warmup: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup must be >= 0, got {self.warmup}")
        if self.every < 1:
            raise ValueError(f"every must be >= 1, got {self.every}")
        # optional parts of the policy show through, and are absent where it has none
        for name in ("predict", "scope", "adapts", "tries"):
            if hasattr(self.policy, name):
                object.__setattr__(self, name, getattr(self.policy, name))
        if hasattr(self.policy, "prepare"):
            object.__setattr__(self, "prepare", self._prepare)

    @property
    def lagged(self) -> bool:
        """As the policy."""
        return self.policy.lagged

    @property
    def needs(self) -> Needs:
        """As the policy."""
        return self.policy.needs

    def init(self, params: Sequence[Tensor]) -> State:
        """The policy's state and a count of steps."""
        return {**self.policy.init(params), "pace_steps": vectors.scalar_like(params)}

    def judge(
        self,
        state: State,
        proposal: Proposal,
        actual_reduction: Tensor,
        trial_gradient_norm: Tensor | None = None,
    ) -> Verdict:
        """The policy's verdict; what it adapted is put back unless it is due, or the step was rejected."""
        before = _adapted(state)
        return self._hold(
            state, before, self.policy.judge(state, proposal, actual_reduction, trial_gradient_norm)
        )

    def review(self, state: State, proposal: Proposal, loss: Tensor | None) -> Verdict:
        """As :meth:`judge`."""
        before = _adapted(state)
        return self._hold(state, before, self.policy.review(state, proposal, loss))

    def pass_over(self, state: State) -> None:
        """Counted here as there."""
        cast(Tensor, state["pace_steps"]).add_(1.0)
        self.policy.pass_over(state)  # type: ignore[attr-defined]

    def _prepare(self, state: State, context: StepContext) -> None:
        """A policy that moves its radius before the step is held there; its memory goes on."""
        before = _adapted(state)
        self.policy.prepare(state, context)  # type: ignore[attr-defined]
        due = self._due(cast(Tensor, state["pace_steps"]) + 1.0)
        _put_back(state, before, due)

    def _due(self, steps: Tensor) -> Tensor:
        return (steps > self.warmup) & (torch.remainder(steps - self.warmup - 1, self.every) == 0)

    def _hold(self, state: State, before: dict[str, list[Tensor]], verdict: Verdict) -> Verdict:
        due = self._due(cast(Tensor, state["pace_steps"]).add_(1.0))
        _put_back(state, before, due | ~verdict.accepted.to(due.device))
        adapts = getattr(self.policy, "adapts", ("radius",))
        return replace(verdict, radius=_tensors(state[adapts[0]])[0].clone())


def _put_back(state: State, before: dict[str, list[Tensor]], move: Tensor) -> None:
    for key, old in before.items():
        for now, then in zip(_tensors(state[key]), old, strict=True):
            now.copy_(torch.where(move.to(now.device), now, then))


def _tensors(entry: object) -> list[Tensor]:
    return [entry] if isinstance(entry, Tensor) else cast("list[Tensor]", entry)


def _adapted(state: State) -> dict[str, list[Tensor]]:
    return {key: vectors.copy(_tensors(state[key])) for key in ADAPTED if key in state}
