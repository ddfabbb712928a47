"""Running means that are bias-corrected as they are kept, so that the first update *is* the observation.

Legend: h_t = (Σ_k β^(t-k) x_k) / (Σ_k β^(t-k)), the exponentially weighted mean, by
h_t = h_{t-1} + w_t (x_t - h_{t-1}) with w_t = (1-β)/(1-βᵗ); w_1 = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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


def running_mean_(
    means: Sequence[Tensor], values: Sequence[Tensor], counts: Sequence[Tensor], beta: float
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
    for mean, value, count in zip(means, values, counts, strict=True):
        count.add_(1.0)
        weight = torch.where(count <= 1.0, 1.0, (1.0 - beta) / bias_correction(count, beta))
        # lerp is exact at weight 1 (it computes value - (value - mean)(1 - weight) there).
        mean.lerp_(value.to(mean.dtype), weight.to(mean.dtype))


def bias_corrected(means: Sequence[Tensor], counts: Sequence[Tensor], beta: float) -> list[Tensor]:
    """mean / (1 - βᵗ): for a plain running mean that was started at zero, as Adam keeps its moments.

    Args:
        means: running means started at zero.
        counts: updates seen, 0-d, one a mean; a count of 0 gives 0, not NaN.
        beta: the decay.
    """
    return [m / bias_correction(c, beta) for m, c in zip(means, counts, strict=True)]
