"""Memory of a policy that judges a step by the loss that arrives with the next one: no trial, no rejection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import Needs, State
from trust_region.protocols import Proposal


@dataclass(frozen=True)
class Previous:
    """The previous step, and what came of it.

    Args:
        known: 0-d bool: whether there was one, with a loss before and after it.
        actual_reduction: ℓ_{t-1} - ℓ_t.
        proposal: what had been promised for it; its step itself is not kept.
    """

    known: Tensor
    actual_reduction: Tensor
    proposal: Proposal


def check_evaluate(evaluate: str) -> None:
    """Refuse anything but the two ways to learn how good a step was."""
    if evaluate not in ("trial", "lagged"):
        raise ValueError(f"evaluate must be 'trial' or 'lagged', got {evaluate!r}")


def evaluation_needs(evaluate: str) -> Needs:
    """The trial's loss, or the loss of every step."""
    return Needs.GRAD | Needs.LOSS | (Needs.TRIAL_LOSS if evaluate == "trial" else Needs.LOSS)


def memory(params: Sequence[Tensor]) -> State:
    """State entries of a lagged policy: nothing seen yet."""
    names = ("previous_known", "previous_loss", "previous_predicted", "previous_norm", "previous_boundary")
    return {name: vectors.scalar_like(params) for name in names}


def exchange(state: State, proposal: Proposal, loss: Tensor | None) -> Previous | None:
    """What the previous step achieved; then remember this one in its place.

    Without a loss the chain breaks: nothing is judged now, nor at the next step. A loss that is not finite is judged
    (as a failure of the step that led here) but not remembered.
    """
    known = cast(Tensor, state["previous_known"])
    if loss is None:
        known.zero_()
        return None
    before, predicted, norm, boundary = (
        cast(Tensor, state[name])
        for name in ("previous_loss", "previous_predicted", "previous_norm", "previous_boundary")
    )
    loss = loss.detach().to(before.device, before.dtype)
    previous = Previous(
        known=known > 0,
        actual_reduction=before - loss,
        proposal=Proposal(
            step=[],
            predicted_reduction=predicted.clone(),
            step_norm=norm.clone(),
            on_boundary=boundary > 0,
            loss=before.clone(),
        ),
    )
    known.copy_(torch.isfinite(loss))
    before.copy_(torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss)))
    predicted.copy_(proposal.predicted_reduction)
    norm.copy_(proposal.step_norm)
    boundary.copy_(proposal.on_boundary)
    return previous
