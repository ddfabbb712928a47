"""The record of one step: what happened, as 0-d tensors that nobody had to wait for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import State
from trust_region import Proposal, Verdict

FIELDS = (
    "loss",
    "ratio",
    "radius",
    "damping",
    "predicted_reduction",
    "actual_reduction",
    "accepted",
    "step_norm",
    "fisher_active_fraction",
    "skipped_steps",
)
"""Names of a record's entries, in order."""


@dataclass
class StepInfo:
    """One step's telemetry, each entry a 0-d tensor on the parameters' device; NaN where it does not apply.

    Reading a value (``float(info.radius)``) waits for the device; keeping the record does not.

    Args:
        loss: the loss at θ before the step.
        ratio: ρ = actual / predicted reduction.
        radius: Δ after the step (the mean over tensors where each has its own).
        damping: λ after the step.
        predicted_reduction: what the model promised for this step.
        actual_reduction: what was measured: by the trial, or (lagged policies) for the previous step.
        accepted: whether θ moved, as a bool.
        step_norm: ‖step‖₂, weight decay excluded.
        fisher_active_fraction: the fraction of elements whose step ended inside the box, where curvature decided it.
        skipped_steps: steps skipped so far for a gradient that was not finite.

    >>> info = StepInfo(loss=torch.tensor(0.5))
    >>> float(info["loss"]), dict(info.items())["accepted"]
    (0.5, tensor(nan))
    """

    loss: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(float("nan")))
    ratio: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(float("nan")))
    radius: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(float("nan")))
    damping: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(float("nan")))
    predicted_reduction: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(float("nan")))
    actual_reduction: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(float("nan")))
    accepted: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(float("nan")))
    step_norm: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(float("nan")))
    fisher_active_fraction: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(float("nan")))
    skipped_steps: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(0.0))

    def __getitem__(self, name: str) -> Tensor:
        """The entry of that name."""
        if name not in FIELDS:
            raise KeyError(f"unknown entry {name!r}: valid: {', '.join(FIELDS)}")
        value: Tensor = getattr(self, name)
        return value

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, value) pairs, in order."""
        return ((name, self[name]) for name in FIELDS)

    def as_floats(self) -> dict[str, float]:
        """Every entry as a Python float; waits for the device."""
        return {name: float(value) for name, value in self.items()}


def of_step(
    loss: Tensor | None,
    proposal: Proposal,
    verdict: Verdict | None,
    actual: Tensor | None,
    region_state: State,
    skipped: Tensor,
) -> StepInfo:
    """The record of a step that was taken or tried.

    Args:
        loss: at θ before the step.
        proposal: what was proposed.
        verdict: the policy's word, where it has one.
        actual: the reduction that a trial measured; a lagged policy's stands in its verdict.
        region_state: the trust region's state after the step.
        skipped: steps skipped so far.
    """
    nan = torch.full_like(proposal.step_norm, float("nan"))
    if actual is None and verdict is not None:
        actual = verdict.actual_reduction
    return StepInfo(
        loss=nan if loss is None else loss,
        ratio=nan if verdict is None else verdict.ratio,
        radius=radius_of(region_state, nan),
        damping=damping_of(region_state, nan),
        predicted_reduction=proposal.predicted_reduction,
        actual_reduction=nan if actual is None else actual,
        accepted=torch.ones_like(nan, dtype=torch.bool) if verdict is None else verdict.accepted,
        step_norm=proposal.step_norm,
        fisher_active_fraction=cast(Tensor, proposal.diagnostics.get("fisher_active_fraction", nan)),
        skipped_steps=skipped.clone(),
    )


def of_skip(loss: Tensor | None, region_state: State, skipped: Tensor) -> StepInfo:
    """The record of a step that a gradient kept from being taken."""
    nan = torch.full_like(skipped, float("nan"))
    return StepInfo(
        loss=nan if loss is None else loss,
        radius=radius_of(region_state, nan),
        damping=damping_of(region_state, nan),
        accepted=torch.zeros_like(nan, dtype=torch.bool),
        skipped_steps=skipped.clone(),
    )


def radius_of(region_state: State, like: Tensor) -> Tensor:
    """Δ (or σ) as one number: the mean where every tensor has its own, NaN where there is none."""
    radius = region_state.get("radius", region_state.get("sigma"))
    if isinstance(radius, list):
        return vectors.total(radius) / len(radius)
    return radius.clone() if isinstance(radius, Tensor) else torch.full_like(like, float("nan"))


def damping_of(region_state: State, like: Tensor) -> Tensor:
    """λ, NaN where there is none."""
    damping = region_state.get("damping")
    return damping.clone() if isinstance(damping, Tensor) else torch.full_like(like, float("nan"))
