"""Where state lives: one flat dictionary a parameter, as PyTorch, its checkpoints and its shards expect.

An estimator's or region's state (lists with one tensor a parameter, and values of the whole optimizer) is laid out as
``state[param]["curvature/second_moment"]``; values of the whole optimizer lie with the first parameter. Both views
hold the same tensors, so an in-place update is seen by both.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.protocols import TRANSIENT, State

SEPARATOR = "/"


def scatter(
    into: MutableMapping[Any, dict[str, Any]], prefix: str, state: State, params: Sequence[Tensor]
) -> None:
    """Lay ``state`` out over ``into[param]``."""
    for key, value in state.items():
        if key == TRANSIENT:
            continue
        name = prefix + SEPARATOR + key
        if isinstance(value, list):
            if len(value) != len(params):
                raise ValueError(
                    f"state entry {name!r} must hold one tensor a parameter ({len(params)}), got {len(value)}"
                )
            for p, x in zip(params, value, strict=True):
                into[p][name] = x
        else:
            if not isinstance(value, (Tensor, int, float)):
                raise TypeError(f"state entry {name!r} must be a tensor, int or float, got {type(value).__name__}")
            into[params[0]][name] = value


def gather(source: MutableMapping[Any, dict[str, Any]], prefix: str, params: Sequence[Tensor]) -> State:
    """The inverse of :func:`scatter`: an entry that every parameter has is a list, one of the first alone is not."""
    start = prefix + SEPARATOR
    state: State = {}
    for name, value in source[params[0]].items():
        if not name.startswith(start):
            continue
        if len(params) > 1 and name not in source[params[1]]:
            state[name[len(start) :]] = value
        else:
            state[name[len(start) :]] = [source[p][name] for p in params]
    return state


def regather(source: MutableMapping[Any, dict[str, Any]], prefix: str, template: State, params: Sequence[Tensor]) -> State:
    """:func:`gather`, with ``template`` telling which entries are lists (one parameter alone cannot)."""
    state: State = {}
    for key, value in template.items():
        name = prefix + SEPARATOR + key
        if isinstance(value, list):
            state[key] = [source[p][name] for p in params]
        else:
            state[key] = source[params[0]][name]
    return state


def extend(old: State, new: State, kept: int) -> State:
    """State for more parameters: ``new``, with the first ``kept`` parameters' entries and all whole values from ``old``."""
    merged: State = {}
    for key, value in new.items():
        if key in old and isinstance(value, list):
            held = old[key]
            merged[key] = [
                h if i < kept and h.shape == x.shape else x  # type: ignore[attr-defined]
                for i, (x, h) in enumerate(zip(value, [*held, *value[kept:]], strict=True))  # type: ignore[misc]
            ]
        else:
            merged[key] = old.get(key, value)
    return merged


def tensors(state: State) -> Iterable[Tensor]:
    """Every tensor of a state, in order."""
    for value in state.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from value


def check_matches(expected: dict[str, Any], loaded: dict[str, Any], where: str) -> None:
    """Raise a clear error unless a loaded parameter state has the entries, kinds and shapes of the present one."""
    missing, unknown = sorted(expected.keys() - loaded.keys()), sorted(loaded.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"state of {where} does not fit this optimizer: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}; "
            "was it saved by another composition?"
        )
    for name, value in expected.items():
        other = loaded[name]
        if isinstance(value, Tensor):
            if not isinstance(other, Tensor) or other.shape != value.shape:
                found = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
                raise ValueError(f"state {name!r} of {where} must have shape {tuple(value.shape)}, got {found}")
            if other.is_floating_point() != value.is_floating_point():
                raise ValueError(f"state {name!r} of {where} must be {value.dtype}, got {other.dtype}")
        elif isinstance(other, Tensor) or not isinstance(other, (int, float)):
            raise ValueError(f"state {name!r} of {where} must be a number, got {type(other).__name__}")


def restored(value: Any, loaded: Any) -> Any:
    """``loaded`` as the present state keeps it: own copy, same device and dtype (float32 state stays float32)."""
    if isinstance(value, Tensor):
        return loaded.detach().to(device=value.device, dtype=value.dtype, copy=True)
    return type(value)(loaded)


def bytes_of(state: MutableMapping[Any, dict[str, Any]]) -> int:
    """Bytes that the tensors of an optimizer's state take, shared storage once."""
    seen: dict[int, int] = {}
    for entries in state.values():
        for value in entries.values():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                seen[storage.data_ptr() or id(storage)] = storage.nbytes()
    return sum(seen.values())


def is_expanded(x: Tensor) -> bool:
    """Whether a tensor stands for a shape only (strides of 0): it takes no memory and holds no state."""
    return x.numel() > 1 and all(s == 0 for s in x.stride())


def dense_or_none(p: Tensor, index: int) -> Tensor | None:
    """A parameter's gradient, refused where it is sparse."""
    if p.grad is None:
        return None
    if p.grad.layout is not torch.strided:
        raise RuntimeError(f"parameter {index} has a sparse gradient, which second-order state cannot take: use dense ones")
    return p.grad
