"""Optimizers by name: presets, for ``build``, the command line and third-party packages."""

from __future__ import annotations

from collections.abc import Callable

from curvature.registry import Registry, estimators
from optimizers.second_order import SecondOrder
from trust_region.registry import trust_regions

optimizers: Registry[Callable[..., SecondOrder]] = Registry("optimizer", "soaa.optimizers")
"""Presets by name: called with parameters (or, with a first argument called ``model``, with the model) and options."""


def available() -> dict[str, list[str]]:
    """The names of everything that :func:`optimizers.build` composes, installed packages included.

    >>> sorted(available())
    ['curvature', 'optimizers', 'trust_region']
    >>> "soaa" in available()["optimizers"]
    True
    """
    return {
        "curvature": estimators.names(),
        "trust_region": trust_regions.names(),
        "optimizers": optimizers.names(),
    }
