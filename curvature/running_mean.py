"""Running means that are bias-corrected as they are kept, so that the first update *is* the observation.

Legend: h_t = (Σ_k β^(t-k) x_k) / (Σ_k β^(t-k)), the exponentially weighted mean, by
h_t = h_{t-1} + w_t (x_t - h_{t-1}) with w_t = (1-β)/(1-βᵗ); w_1 = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from curvature import vectors


def check_beta(beta: float, name: str = "beta") -> None:
    """Refuse a decay rate outside [0, 1)."""
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {beta}")


def bias_correction(count: Tensor, beta: float | Tensor) -> Tensor:
    """1 - βᵗ without cancellation: in float32, 1 - 0.999 would already be wrong in the fifth digit.

    Args:
        count: t, updates seen, 0-d; 0 counts as 1, so that the correction is never 0.
        beta: the decay, in [0, 1), a float or 0-d.
    """
    if isinstance(beta, Tensor):  # a schedule's, inside a graph; the logarithm of 0 gives 1
        return -torch.expm1(count.clamp(min=1.0) * torch.log(beta))
    if beta == 0.0:
        return torch.ones_like(count)
    return -torch.expm1(count.clamp(min=1.0) * math.log(beta))


def bias_corrections(counts: Sequence[Tensor], beta: float) -> list[float | Tensor]:
    """1 - βᵗ of every count: numbers where the host may read them without a wait, since those cost no operations."""
    if not all(vectors.readable(t) for t in counts):
        return [bias_correction(t, beta) for t in counts]
    seen = [max(t, 1.0) for t in torch.stack(list(counts)).tolist()] if counts else []
    return [1.0 if beta == 0.0 else -math.expm1(t * math.log(beta)) for t in seen]


def running_mean_(
    means: Sequence[Tensor], values: Iterable[Tensor], counts: Sequence[Tensor], beta: float
) -> None:
    """Take ``values`` into ``means``, in place, and count them.

    Args:
        means: h, overwritten.
        values: x, shaped like ``means``.
        counts: t, 0-d, one a mean, incremented.
        beta: decay in [0, 1); 0 keeps the last value only.

    >>> h, t = [torch.zeros(1)], [torch.zeros(())]
    >>> running_mean_(h, [torch.tensor([3.0])], t, beta=0.999)
    >>> h, t
    ([tensor([3.])], [tensor(1.)])
    """
    # lerp is exact at weight 1 (it computes value - (value - mean)(1 - weight) there).
    if counts and all(vectors.readable(t) for t in counts):
        torch._foreach_add_(list(counts), 1.0)
        seen = torch.stack(list(counts)).tolist()
        corrections = cast("list[float]", bias_corrections(counts, beta))
        for mean, value, t, c in zip(means, values, seen, corrections, strict=True):
            mean.lerp_(value.to(mean.dtype), 1.0 if t <= 1.0 else (1.0 - beta) / c)
        return
    for mean, value, count in zip(means, values, counts, strict=True):
        count.add_(1.0)
        weight = torch.where(count <= 1.0, 1.0, (1.0 - beta) / bias_correction(count, beta))
        mean.lerp_(value.to(mean.dtype), weight.to(mean.dtype))


def bias_corrected(means: Sequence[Tensor], counts: Sequence[Tensor], beta: float) -> list[Tensor]:
    """mean / (1 - βᵗ): for a plain running mean that was started at zero, as Adam keeps its moments.

    Args:
        means: running means started at zero.
        counts: updates seen, 0-d, one a mean; a count of 0 gives 0, not NaN.
        beta: the decay.
    """
    return [m / bias_correction(c, beta) for m, c in zip(means, counts, strict=True)]
