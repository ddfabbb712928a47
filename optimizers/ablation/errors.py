"""Mistakes that the user can correct, and how they are worded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AblationError(Exception):
    """A mistake the user can correct; the command line prints it as one line and exits with code 2."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> AblationError:
    """Return the error for a name that does not exist, with the nearest names that do.

    Args:
        kind: what the name should name, such as ``"workload"``.
        name: the name that was given.
        valid: every name that exists.

    Returns:
        The error, to be raised by the caller.

    >>> str(unknown_name("workload", "digit", ["digits", "mnist"]))
    "unknown workload 'digit': did you mean 'digits'? (soaa list shows all)"
    """
    names = sorted(set(valid))
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if nearest:
        choice = " or ".join(repr(candidate) for candidate in nearest)
        return AblationError(f"unknown {kind} {name!r}: did you mean {choice}? (soaa list shows all)")
    return AblationError(f"unknown {kind} {name!r}: choose one of {', '.join(names)}")
