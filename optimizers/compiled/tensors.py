"""What the passes of an elementwise step are given and give back, whatever kernels they are made of.

Legend: see ``optimizers.elementwise``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimizers.compiled.kernels import Kind


@dataclass(frozen=True)
class Tensors:
    """What the step works on, in the order of the parameters.

    Args:
        params: θ.
        mean: m.
        second_moment: v.
        steps: gradients that every m has taken in, 0-d each.
        count: the same of v.
        group: the parameter group of every tensor.
    """

    params: Sequence[Tensor]
    mean: Sequence[Tensor]
    second_moment: Sequence[Tensor]
    steps: Sequence[Tensor]
    count: Sequence[Tensor]
    group: Sequence[int]

    def kind(self) -> Kind | None:
        """The one kind that all tensors are of, or ``None``; the gradient's dtype is the parameters'."""
        first, state = self.params[0], self.mean[0].dtype
        suited = all(
            x.device == first.device and x.is_contiguous() and x.dtype == dtype
            for tensors, dtype in (
                (self.params, first.dtype),
                (self.mean, state),
                (self.second_moment, state),
            )
            for x in tensors
        )
        if not suited or not any(p.numel() for p in self.params):
            return None
        return Kind(first.device, first.dtype, first.dtype, state)

    @property
    def size(self) -> int:
        """Elements in all."""
        return sum(p.numel() for p in self.params)

    def pointers(self) -> list[int]:
        """Where the parameters lie; a layout holds as long as they stay."""
        return [p.data_ptr() for p in self.params]


def suits(gradient: Sequence[Tensor | None], kind: Kind) -> bool:
    """Whether every tensor has a gradient of that kind."""
    dtype, device = kind.gradient, kind.device
    for g in gradient:  # asked of every tensor at every step
        if g is None or g.dtype is not dtype or g.layout is not torch.strided:
            return False
        if g.device != device or not g.is_contiguous():
            return False
    return True


@dataclass(frozen=True)
class Options:
    """The present hyperparameters, one entry a parameter group.

    Args:
        beta_1: decay of m.
        lr: η.
        weight_decay: λ.
        sign: -1 where the loss is climbed.
        unscale: 1/scale of a GradScaler, 0-d, or ``None``.
    """

    beta_1: Sequence[float]
    lr: Sequence[float | Tensor]
    weight_decay: Sequence[float]
    sign: Sequence[float]
    unscale: Tensor | None = None


@dataclass(frozen=True)
class Settled:
    """What a step predicted, 0-d each; NaN for a skipped step.

    Args:
        predicted: P.
        step_norm: ‖ηu‖₂, ``None`` where only P was formed.
        inside: the fraction of elements inside the box, likewise.
    """

    predicted: Tensor
    step_norm: Tensor | None = None
    inside: Tensor | None = None


def classes(x: Tensors) -> tuple[list[int], list[int]]:
    """The class of every tensor, and the parameter group of every class.

    Tensors of one group whose moments have taken in equally many gradients have all their numbers in common, and do
    from then on, since a step of this kind has a gradient for each. Waits for the device, when a layout is made.
    """
    counts = torch.stack([*x.steps, *x.count]).view(2, -1).t().tolist()
    keys = [(group, *seen) for group, seen in zip(x.group, counts, strict=True)]
    order = list(dict.fromkeys(keys))
    return [order.index(key) for key in keys], [key[0] for key in order]


def log(beta: float) -> float:
    """The logarithm of a decay, of 0 too."""
    return math.log(beta) if beta > 0.0 else float("-inf")
