"""Loading a ``state_dict``: everything is checked before anything is changed.

A state dict is data: dicts, tensors, numbers. It may come from an older version (entries that did not exist then take
their defaults), from another device or precision, or be damaged; a damaged one is an error and leaves no trace.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from curvature import vectors
from optimizers import state_layout
from optimizers.checks import check_group
from optimizers.sharding import local, stored

if TYPE_CHECKING:
    from optimizers.composed import Composed

LATER_ENTRIES = ("skipped_steps",)
"""State entries that a checkpoint may lack: they start as in a new optimizer."""


def checked(
    optimizer: Composed, state_dict: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]], dict[str, list[Tensor]] | None]:
    """The groups and the state that ``state_dict`` describes, as ``optimizer`` would hold them; changes nothing.

    The third part is what ranks keep divided among them (``gathered_keys`` of the curvature), or ``None``.

    Raises:
        ValueError: where groups, entries, kinds or shapes do not fit.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict must be a dict, got {type(state_dict).__name__}")
    for key, kind in (("param_groups", Sequence), ("state", Mapping)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(
                f"state_dict must hold {key!r} as a {kind.__name__.lower()}, got "
                f"{type(state_dict.get(key)).__name__}: is this an optimizer's state_dict?"
            )
    groups = checked_groups(optimizer, state_dict["param_groups"])
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    if not all(isinstance(i, (int, str)) for i in ids) or len(set(ids)) != len(ids):
        raise ValueError(f"parameters of loaded groups must be different numbers or names, got {ids[:5]}")
    saved = state_dict["state"]
    strangers = [i for i in saved if i not in set(ids)]
    if strangers:
        raise ValueError(f"loaded state belongs to parameters that no group names: {strangers[:5]}")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[Tensor, dict[str, Any]] = {}
    apart: dict[str, list[Tensor]] = {key: [] for key in getattr(optimizer.curvature, "gathered_keys", ())}
    for i, p in zip(ids, params, strict=True):
        if not isinstance(saved.get(i, {}), Mapping):
            raise ValueError(f"state of parameter {i} must be a dict, got {type(saved[i]).__name__}")
        loaded, expected = dict(saved.get(i, {})), dict(optimizer.state[p])
        if "momentum" in loaded and "momentum" not in expected:
            expected["momentum"] = stored(p, vectors.zeros_like([local(p)])[0])
        for name, fresh in (("solved_mean", vectors.zeros_like([local(p)])[0]), ("solved_damping", 0.0)):
            expected.pop(name, None)  # there while a gradient comes in rows, and nowhere else
            if name in loaded:
                expected[name] = fresh
        for name in LATER_ENTRIES:
            if name in expected:
                loaded.setdefault(name, expected[name])
        for key, found in apart.items():
            value = loaded.pop(f"curvature{state_layout.SEPARATOR}{key}", None)
            found += [value] if isinstance(value, Tensor) else []
        state_layout.check_matches(expected, loaded, f"parameter {i}")
        entries[p] = {name: state_layout.restored(value, loaded[name]) for name, value in expected.items()}
    given: dict[str, list[Tensor]] | None = apart if any(apart.values()) else None
    if apart:
        if given is not None and any(len(found) != len(params) for found in given.values()):
            raise ValueError(
                f"loaded state must hold {', '.join(map(repr, given))} for every parameter or for none"
            )
        state = state_layout.regather(entries, "curvature", optimizer._curvature_state, params)
        optimizer.curvature.check_gathered(state, given)  # type: ignore[attr-defined]
    return groups, entries, given


def checked_groups(optimizer: Composed, saved: Sequence[Any]) -> list[dict[str, Any]]:
    """The saved groups with this optimizer's parameters in them; options that they lack take their defaults."""
    present = optimizer.param_groups
    for group in saved:
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), Sequence):
            raise ValueError("every loaded parameter group must be a dict with a list 'params'")
    theirs, ours = [len(g["params"]) for g in saved], [len(g["params"]) for g in present]
    if theirs != ours:
        raise ValueError(f"loaded state dict has groups of {theirs} parameters, this optimizer of {ours}")
    groups = []
    for mine, loaded in zip(present, saved, strict=True):
        group = {**optimizer.defaults, **copy.deepcopy({k: v for k, v in loaded.items() if k != "params"})}
        group["params"] = mine["params"]
        if "param_names" in mine:
            group.setdefault("param_names", mine["param_names"])
        check_group(group, optimizer.needs)
        groups.append(group)
    return groups
