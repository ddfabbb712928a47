"""Where state lives: one flat dictionary a parameter, as PyTorch, its checkpoints and its shards expect.

An estimator's or region's state (lists with one tensor a parameter, and values of the whole optimizer) is laid out as
``state[param]["curvature/second_moment"]``; values of the whole optimizer lie with the first parameter. Both views
hold the same tensors, so an in-place update is seen by both.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.protocols import CACHE, TRANSIENT, State
from optimizers.sharding import local, stored, stored_like

SEPARATOR = "/"


def unsaved(key: str) -> bool:
    """Whether an entry lives beside the state: for one step, or as a cache (of a part of a whole estimator, too)."""
    return key == TRANSIENT or key.rpartition(".")[2] == CACHE


def scatter(
    into: MutableMapping[Any, dict[str, Any]], prefix: str, state: State, params: Sequence[Tensor]
) -> None:
    """Lay ``state`` out over ``into[param]``."""
    for key, value in state.items():
        if unsaved(key):
            continue
        name = prefix + SEPARATOR + key
        if isinstance(value, list):
            if len(value) != len(params):
                raise ValueError(
                    f"state entry {name!r} must hold one tensor a parameter ({len(params)}), got {len(value)}"
                )
            for p, x in zip(params, value, strict=True):
                held = into[p].get(name)
                if held is None or local(held) is not x:
                    into[p][name] = stored(p, x)
        else:
            if not isinstance(value, (Tensor, int, float)):
                raise TypeError(
                    f"state entry {name!r} must be a tensor, int or float, got {type(value).__name__}"
                )
            into[params[0]][name] = value


def regather(
    source: MutableMapping[Any, dict[str, Any]], prefix: str, template: State, params: Sequence[Tensor]
) -> State:
    """The inverse of :func:`scatter`; ``template`` tells which entries are lists."""
    state: State = {}
    for key, value in template.items():
        if unsaved(key):
            continue
        name = prefix + SEPARATOR + key
        if isinstance(value, list):
            state[key] = [local(source[p][name]) for p in params]
        else:
            state[key] = source[params[0]][name]
    return state


def extend(old: State, new: State, kept: int) -> State:
    """State for more parameters: ``new``, but the first ``kept`` entries and all whole values are ``old``'s."""
    merged: State = dict(new)
    for key, held in old.items():
        fresh = new.get(key)
        if isinstance(held, list) and isinstance(fresh, list):
            same = [h if h.shape == x.shape else x for h, x in zip(held, fresh[:kept], strict=True)]
            merged[key] = same + fresh[kept:]
        elif fresh is not None:
            merged[key] = held
    return merged


def check_matches(expected: dict[str, Any], loaded: dict[str, Any], where: str) -> None:
    """Raise a clear error unless a loaded parameter state has the entries, kinds and shapes of the present one."""
    missing, unknown = sorted(expected.keys() - loaded.keys()), sorted(loaded.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"state of {where} does not fit this optimizer: missing {missing or 'nothing'}, "
            f"unknown {unknown or 'nothing'}; was it saved by another composition?"
        )
    for name, value in expected.items():
        other = loaded[name]
        if isinstance(value, Tensor):
            if value.dim() == 0 and isinstance(other, (int, float)) and not isinstance(other, bool):
                continue  # a counter that was saved as a number
            if not isinstance(other, Tensor) or other.shape != value.shape:
                found = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
                raise ValueError(
                    f"state {name!r} of {where} must have shape {tuple(value.shape)}, got {found}"
                )
            if local(other).layout is not torch.strided or local(other).is_meta:
                raise ValueError(
                    f"state {name!r} of {where} must be dense and hold values, got {other.layout} on {other.device}"
                )
            if other.is_floating_point() != value.is_floating_point():
                raise ValueError(f"state {name!r} of {where} must be {value.dtype}, got {other.dtype}")
        elif isinstance(other, bool) or not isinstance(other, (int, float)):
            raise ValueError(f"state {name!r} of {where} must be a number, got {type(other).__name__}")
    for name, value in expected.items():
        check_value(name, loaded[name], where, whole=isinstance(value, int))


POSITIVE = ("radius", "damping", "sigma")
"""Δ, λ and σ, by the last part of an entry's name."""

NUMBERS = ("predicted", "running_loss")
"""What a policy compares with the next loss, likewise."""

COUNTERS = ("step", "steps", "count", "seen", "draws")
"""What counts, likewise: ``graft_count``, ``losses_seen``."""


def check_value(name: str, value: Tensor | float, where: str, *, whole: bool = False) -> None:
    """Refuse what no run leaves behind: a NaN in a tensor, a radius or damping below zero, a counter that counts none.

    Infinity passes where an overflow may have left it; a scalar that a policy remembers may say by NaN that there is
    none.

    Args:
        name: of the entry.
        value: what was loaded.
        where: for messages.
        whole: whether the entry is a Python integer, all of which count something.
    """
    kind = name.rpartition(SEPARATOR)[2].rpartition(".")[2]
    if isinstance(value, Tensor) and value.dim() > 0:
        if value.is_floating_point() and bool(local(value.detach()).isnan().any()):
            raise ValueError(
                f"state {name!r} of {where} holds NaN: the checkpoint is damaged, take an earlier one"
            )
        return
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if kind in POSITIVE and not number >= 0.0:
        raise ValueError(f"state {name!r} of {where} must be >= 0, got {number}: the checkpoint is damaged")
    if kind in NUMBERS and number != number:
        raise ValueError(f"state {name!r} of {where} must be a number, got NaN: the checkpoint is damaged")
    counts = kind in COUNTERS or kind.rpartition("_")[2] in COUNTERS or whole
    if counts and not (0.0 <= number < float("inf")):
        raise ValueError(
            f"state {name!r} of {where} must be a count, got {number}: the checkpoint is damaged"
        )


def restored(value: Any, loaded: Any) -> Any:
    """``loaded`` as the present state keeps it: own copy, same device and dtype (float32 state stays float32)."""
    if not isinstance(value, Tensor):
        return type(value)(loaded)
    if not isinstance(loaded, Tensor):
        return torch.full_like(value, loaded)
    own = loaded.detach().to(device=value.device, dtype=value.dtype, copy=True)
    return stored_like(value, own)


def bytes_of(state: MutableMapping[Any, dict[str, Any]], *parts: State) -> int:
    """Bytes that the tensors of an optimizer's state take, and those of its parts' caches; shared storage once."""
    tensors = [value for entries in state.values() for value in entries.values() if isinstance(value, Tensor)]
    for part in parts:
        caches = [value for key, value in part.items() if key.rpartition(".")[2] == CACHE]
        tensors += [x for cache in caches for x in getattr(cache, "tensors", list)()]
    seen: dict[int, int] = {}
    for value in tensors:
        storage = local(value).untyped_storage()
        seen[storage.data_ptr() or id(storage)] = storage.nbytes()
    return sum(seen.values())


def dense_or_none(p: Tensor, index: int) -> Tensor | None:
    """A parameter's gradient, refused where it is sparse."""
    if p.grad is None:
        return None
    gradient: Tensor = local(p.grad)
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"parameter {index} has a sparse gradient, which second-order state cannot take: use dense ones"
        )
    return gradient
