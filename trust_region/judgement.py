"""What every policy asks of a trial: whether it can be believed, and how good it was, by products, not quotients.

Legend: a the actual reduction, q the predicted one, ρ = a / q, f the loss before the step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trust_region.protocols import Proposal


def credible(proposal: Proposal, actual_reduction: Tensor) -> Tensor:
    """Whether both reductions are finite and something was predicted (q > 0), a 0-d bool.

    Everything else, a NaN loss above all, is a rejection that shrinks the region.
    """
    predicted = proposal.predicted_reduction
    return torch.isfinite(actual_reduction) & torch.isfinite(predicted) & (predicted > 0)


def at_least(actual: Tensor, share: float, predicted: Tensor) -> Tensor:
    """ρ >= share, as a >= share · q: no quotient, so nothing overflows and 0/0 is not met."""
    return actual >= share * predicted


def above(actual: Tensor, share: float, predicted: Tensor) -> Tensor:
    """ρ > share, as a > share · q."""
    return actual > share * predicted


def below(actual: Tensor, share: float, predicted: Tensor) -> Tensor:
    """ρ < share, as a < share · q."""
    return actual < share * predicted


def ratio(actual: Tensor, predicted: Tensor) -> Tensor:
    """ρ for telemetry: a / q saturated at half the largest number, NaN where q is not > 0.

    Decisions never use it.

    >>> ratio(torch.tensor(1e30), torch.tensor(1e-30)) < torch.inf
    tensor(True)
    """
    actual, predicted = torch.as_tensor(actual), torch.as_tensor(predicted)
    dtype = torch.promote_types(actual.dtype, predicted.dtype)
    actual, predicted = actual.to(dtype), predicted.to(dtype)
    info = torch.finfo(dtype)
    safe = torch.maximum(predicted, actual.abs() / (0.5 * info.max)).clamp(min=info.tiny)
    return torch.where(predicted > 0, actual / safe, torch.full_like(predicted, math.nan))


def rounded(proposal: Proposal, actual_reduction: Tensor, multiple: float) -> Tensor:
    """The actual reduction, or the predicted one where both are lost in the rounding of the loss.

    Near a minimum a and q are smaller than the rounding error of f, so that ρ is noise and every step would be
    refused. Then ρ is taken as 1 (Conn, Gould & Toint 2000, section 17.4.2). Needs ``proposal.loss``.

    Args:
        proposal: with its loss; without one nothing changes.
        actual_reduction: a, 0-d.
        multiple: how many units in the last place of f count as rounding; 0 switches this off.
    """
    if proposal.loss is None or multiple == 0:
        return actual_reduction
    noise = multiple * torch.finfo(proposal.loss.dtype).eps * proposal.loss.abs()
    lost = (actual_reduction.abs() <= noise) & (proposal.predicted_reduction <= noise)
    return torch.where(lost, proposal.predicted_reduction.to(actual_reduction.dtype), actual_reduction)
