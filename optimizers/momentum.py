"""The gradient that the model is built from: the batch gradient, or a running mean of it.

Legend: g_t the batch gradient, m_t the buffer, β the decay, t the gradients a tensor has received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from curvature.running_mean import bias_correction, check_beta


@runtime_checkable
class Momentum(Protocol):
    """How gradients are averaged over steps; a frozen dataclass with the decay as ``beta``."""

    @property
    def beta(self) -> float:
        """The decay a parameter group starts with (its ``"momentum"`` entry, which schedulers may move)."""
        ...

    def average_(
        self,
        buffer: Sequence[Tensor],
        gradient: Sequence[Tensor],
        count: Sequence[Tensor],
        beta: Sequence[float | Tensor],
    ) -> list[Tensor]:
        """Take ``gradient`` into ``buffer``, in place, and return the averaged gradient.

        Args:
            buffer: m, one tensor a parameter.
            gradient: g.
            count: t, this gradient included, 0-d each.
            beta: the present decay of every tensor's group, a float or (in a compiled step) 0-d.
        """
        ...


@dataclass(frozen=True)
class RunningMean:
    """m ← βm + (1-β)g, bias-corrected: m̂ = m/(1-βᵗ) (Adam's, SOAA's; Kingma & Ba 2015, arXiv 1412.6980).

    Args:
        beta: β in [0, 1).

    >>> RunningMean(0.9).average_([torch.zeros(1)], [torch.ones(1)], [torch.ones(())], [0.9])
    [tensor([1.])]
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        check_beta(self.beta, "momentum")

    def average_(
        self,
        buffer: Sequence[Tensor],
        gradient: Sequence[Tensor],
        count: Sequence[Tensor],
        beta: Sequence[float | Tensor],
    ) -> list[Tensor]:
        """m̂."""
        _lerp_by_group(buffer, gradient, beta)
        return [m / bias_correction(t, b) for m, t, b in zip(buffer, count, beta, strict=True)]


@dataclass(frozen=True)
class RunningMeanFromSecond(RunningMean):
    """The running mean of all gradients but the first, which is averaged for its own step alone (SOAP's).

    For a curvature that finds a new basis in the second gradient and starts its second moment there: a mean that still
    holds the first gradient would be divided by a moment that does not, a step of ten times its length.

    >>> mean, m = RunningMeanFromSecond(0.5), [torch.zeros(1)]
    >>> [float(mean.average_(m, [torch.tensor([g])], [torch.tensor(t)], [0.5])[0]) for t, g in ((1.0, 8.0), (2.0, 1.0))]
    [8.0, 1.0]
    """

    def average_(
        self,
        buffer: Sequence[Tensor],
        gradient: Sequence[Tensor],
        count: Sequence[Tensor],
        beta: Sequence[float | Tensor],
    ) -> list[Tensor]:
        """m̂ over the gradients 2 to t."""
        for m, t in zip(buffer, count, strict=True):
            m.masked_fill_(t == 2.0, 0.0)
        return super().average_(buffer, gradient, [(t - 1.0).clamp(min=1.0) for t in count], beta)


@dataclass(frozen=True)
class HeavyBall:
    """m ← βm + g, not bias-corrected; with ``nesterov`` the result is g + βm (PyTorch's SGD, Polyak 1964).

    Args:
        beta: β in [0, 1).
        nesterov: look ahead by one step of the buffer.

    >>> HeavyBall(0.5, nesterov=True).average_([torch.ones(1)], [torch.ones(1)], [torch.ones(())], [0.5])
    [tensor([1.7500])]
    """

    beta: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_beta(self.beta, "momentum")

    def average_(
        self,
        buffer: Sequence[Tensor],
        gradient: Sequence[Tensor],
        count: Sequence[Tensor],
        beta: Sequence[float | Tensor],
    ) -> list[Tensor]:
        """m, or g + βm."""
        for m, g, b in zip(buffer, gradient, beta, strict=True):
            m.mul_(b).add_(g)
        if self.nesterov:
            return [torch.add(g, m * b) for m, g, b in zip(buffer, gradient, beta, strict=True)]
        return [m.clone() for m in buffer]


@dataclass(frozen=True)
class PlainMean:
    """m ← βm + (1-β)g without bias correction; with ``nesterov`` the result is (1-β)g + βm (Sophia's, Muon's mean).

    Args:
        beta: β in [0, 1).
        nesterov: look ahead by one step of the buffer.
    """

    beta: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_beta(self.beta, "momentum")

    def average_(
        self,
        buffer: Sequence[Tensor],
        gradient: Sequence[Tensor],
        count: Sequence[Tensor],
        beta: Sequence[float | Tensor],
    ) -> list[Tensor]:
        """m, or (1-β)g + βm."""
        _lerp_by_group(buffer, gradient, beta)
        if self.nesterov:
            return [torch.lerp(g, m, b) for m, g, b in zip(buffer, gradient, beta, strict=True)]
        return [m.clone() for m in buffer]


def _lerp_by_group(
    buffer: Sequence[Tensor], gradient: Sequence[Tensor], beta: Sequence[float | Tensor]
) -> None:
    """m ← m + (1-β)(g - m); one fused call where all groups have the same β."""
    if not buffer:
        return
    first = beta[0]
    if not isinstance(first, Tensor) and all(not isinstance(b, Tensor) and b == first for b in beta):
        torch._foreach_lerp_(list(buffer), list(gradient), 1.0 - first)
    else:
        for m, g, b in zip(buffer, gradient, beta, strict=True):
            m.lerp_(g, 1.0 - b)
