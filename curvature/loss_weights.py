"""By how much a batch counts: the total weight that a loss divides by, so that several batches equal one.

Legend: ω_b the share of batch b in the loss of all batches, W_b the total weight of batch b.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from curvature.problem import Problem


def batch_shares(problem: Problem, weight_fn: Callable[[Any], Any] | None) -> Sequence[float | Tensor]:
    """ω_b for every batch of ``problem``: W_b / Σ W for a loss that is a weighted mean, 1 for one that is a sum.

    Raises:
        ValueError: where the loss does not tell its weight and ``weight_fn`` was not given.
    """
    if len(problem.batches) == 1:
        return [1.0]
    if weight_fn is None:
        raise ValueError(
            "the weight of this loss is not known, so several batches cannot be combined: pass "
            "weight_fn(target), the total weight of a batch (unmasked tokens, or the sum of class weights)"
        )
    weights = [float(weight_fn(target)) for _, target in problem.batches]
    total = sum(weights)
    if not total > 0:
        raise ValueError(f"weight_fn must give a total weight > 0, got {total}")
    return [w / total for w in weights]
