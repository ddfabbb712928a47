"""Names for methods: what the command line, ``build`` and third-party packages look up.

A registry maps a name to a factory. Entries come from this repository and from entry points of installed
packages (groups ``soaa.curvature``, ``soaa.trust_region``, ``soaa.optimizers``), which are loaded when first asked for.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


class UnknownNameError(KeyError, ValueError):
    """A name that no entry has; the message lists the nearest ones."""

    def __str__(self) -> str:
        return str(self.args[0])


def nearest(name: str, valid: list[str]) -> str:
    """``did you mean 'x'? Valid: …``: the end of every message about an unknown name.

    >>> nearest("kfca", ["kfac", "hessian"])
    "did you mean 'kfac'? valid: hessian, kfac"
    """
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = "did you mean " + " or ".join(repr(c) for c in close) + "? " if close else ""
    return f"{hint}valid: {', '.join(sorted(valid))}"


class Registry(Generic[T]):
    """Named factories of one kind.

    Args:
        kind: what an entry is, for messages: ``"curvature"``.
        group: the entry-point group from which third-party entries come.

    >>> registry = Registry("curvature", "soaa.doctest")
    >>> registry.add("zero", lambda: 0)
    >>> registry["zero"]()
    0
    >>> registry["zeor"]
    Traceback (most recent call last):
    curvature.registry.UnknownNameError: unknown curvature 'zeor': did you mean 'zero'? valid: zero
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._entries: dict[str, T] = {}
        self._loaded = False

    def add(self, name: str, factory: T) -> None:
        """Add an entry; a name that is taken is refused, but a module that is loaded again replaces its own."""
        held = self._entries.get(name)
        if held is not None and _identity(held) != _identity(factory):
            raise ValueError(f"{self.kind} name {name!r} is already taken by {self._entries[name]!r}")
        self._entries[name] = factory

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for point in importlib.metadata.entry_points(group=self.group):
            if point.name not in self._entries:
                self.add(point.name, point.load())

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._entries:
            raise UnknownNameError(f"unknown {self.kind} {name!r}: {nearest(name, list(self._entries))}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def names(self) -> list[str]:
        """All names, sorted."""
        return list(self)


def _identity(factory: Callable[..., Any]) -> tuple[Any, Any]:
    return getattr(factory, "__module__", factory), getattr(factory, "__qualname__", factory)


estimators: Registry[Callable[..., Any]] = Registry("curvature", "soaa.curvature")
"""Curvature estimators by name."""
