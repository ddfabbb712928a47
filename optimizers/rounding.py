"""State kept in bfloat16: widened for a step, and rounded up or down at random when it is put back.

A running mean with β = 0.999 changes by a thousandth a step, and bfloat16 has 8 bits: rounded to the nearest, the
second moment would stop moving. Rounded up with the probability of the part that is cut off, it is right on average.

Random numbers are a hash of (seed, gradients seen, tensor, element): no generator to keep, the same on every device and
by every way a step is taken, and a run that goes on from a checkpoint draws what it would have drawn.
Reference: Gupta et al. 2015, arXiv 1502.02551 (stochastic rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from curvature.protocols import TRANSIENT, Needs, State

if TYPE_CHECKING:
    from optimizers.core import Composition
    from optimizers.step_paths import Held

NARROW = torch.bfloat16
_MASK, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9


def check_state_dtype(dtype: torch.dtype | None, composition: Composition) -> None:
    """Refuse what state is not kept in, and curvature that works with its state outside the step.

    Raises:
        ValueError: naming what can be asked for.
    """
    if dtype is None:
        return
    if dtype is not NARROW:
        raise ValueError(f"state_dtype must be None (float32 or wider) or torch.bfloat16, got {dtype}")
    curvature = composition.curvature
    needs = curvature.needs | composition.trust_region.needs
    further = needs & ~(Needs.GRAD | Needs.LOSS)
    if further or any(getattr(curvature, name, False) for name in ("tracks_steps", "evaluates_gradients")):
        raise ValueError(
            f"state_dtype=torch.bfloat16 goes with compositions whose signals are gradients, got "
            f"{type(curvature).__name__} with {composition.trust_region}: leave state_dtype at None"
        )


def key_of(seed: int, count: Tensor) -> Tensor:
    """The key of one step, 0-d int64, from the gradients that the first parameter has seen."""
    return ((seed * 0x9E3779B1) & _MASK) + count.to(torch.int64) & _MASK


def mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits to 32 bits, elementwise on int64 (C. Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def rounded(x: Tensor, key: Tensor, tensor: int, entry: int) -> Tensor:
    """``x`` in bfloat16, each element rounded to one of its two neighbours with the mean that it had.

    Args:
        x: float32 or float64.
        key: of the step.
        tensor: index of the parameter.
        entry: index of the state entry: two entries share a hash.

    >>> x = torch.full((40_000,), 1.0 + 2.0**-9)  # a quarter of the way to the next bfloat16
    >>> up = rounded(x, torch.tensor(5), 0, 0) > 1.0
    >>> 0.24 < up.double().mean().item() < 0.26
    True
    """
    own = mixed((key + (tensor * _GOLDEN + (entry // 2) * 0x85EBCA6B & _MASK)) & _MASK)
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    random = mixed((own + index) & _MASK)
    random = random & 0xFFFF if entry % 2 == 0 else random >> 16
    bits = x.to(torch.float32).contiguous().view(torch.int32).to(torch.int64) & _MASK
    special = (bits & 0x7F800000) == 0x7F800000
    upper = torch.where(special, bits, (bits + random) & _MASK) >> 16
    return torch.where(upper >= 0x8000, upper - 0x10000, upper).to(torch.int16).view(NARROW)


def narrowed(state: State, params: Sequence[Tensor], dtype: torch.dtype | None) -> State:
    """``state`` with the entries that are shaped like the parameters in ``dtype``; scalars stay as they are."""
    if dtype is None:
        return state
    return {
        key: [x.to(dtype) for x in value] if key != TRANSIENT and _alike(value, params) else value
        for key, value in state.items()
    }


def _alike(value: object, params: Sequence[Tensor]) -> TypeGuard[list[Tensor]]:
    """Whether an entry holds a number for every element of the parameters; one a tensor is a count."""
    return (
        isinstance(value, list)
        and any(p.dim() > 0 for p in params)
        and all(
            x.shape == p.shape and x.is_floating_point() and 0 not in x.stride()
            for x, p in zip(value, params, strict=True)
        )
    )


def widened(held: Held) -> Held:
    """What a step can compute with: entries in bfloat16 become float32 (float64 for float64 parameters) copies."""
    if held.state_dtype is None:
        return held
    wide = [torch.promote_types(p.dtype, torch.float32) for p in held.shards]

    def copies(values: Sequence[Tensor]) -> list[Tensor]:
        return [x.to(dtype) if x.dtype == NARROW else x for x, dtype in zip(values, wide, strict=True)]

    def of(state: State) -> State:
        return {k: copies(v) if isinstance(v, list) and k != TRANSIENT else v for k, v in state.items()}

    buffers = held.momentum_buffers()
    return replace(
        held,
        curvature_state=of(held.curvature_state),
        region_state=of(held.region_state),
        buffers=copies(buffers) if buffers else [],
    )


def put_back(held: Held, wide: Held, key: Tensor) -> None:
    """Round what a step left in ``wide`` into the state; numbers of the host move over as they are."""
    entries = [(held.momentum_buffers(), wide.momentum_buffers())]
    for narrow_state, wide_state in (
        (held.curvature_state, wide.curvature_state),
        (held.region_state, wide.region_state),
    ):
        for name, value in wide_state.items():
            old = narrow_state.get(name)
            if isinstance(value, list) and isinstance(old, list):
                entries.append((old, value))
            else:
                narrow_state[name] = value
    number = 0
    for old_list, new_list in entries:
        pairs = [(k, x, y) for k, (x, y) in enumerate(zip(old_list, new_list, strict=True)) if x is not y]
        for k, x, y in pairs:
            x.copy_(rounded(y, key.to(y.device), k, number) if x.dtype == NARROW else y)
        number += bool(pairs)
