"""Layer rules by layer class: one file a kind of layer, and one line of registration.

Rules of installed packages come from the entry-point group ``soaa.layer_rules``; they are loaded when a rule is first
looked for.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from torch import nn

from curvature.kronecker.rules.base import LayerRule, ScaleRule

Rule = LayerRule | ScaleRule

_rules: dict[type[nn.Module] | str, Rule] = {}
_installed = False


def register_rule(rule: Rule) -> None:
    """Make a layer rule known to every Kronecker estimator that is built afterwards.

    Args:
        rule: an instance; its ``layers`` say for what. A later rule for the same class replaces the earlier one, so
            that a program can bring its own.

    Raises:
        ValueError: for a rule that names no layer.
    """
    if not rule.layers:
        raise ValueError(f"{type(rule).__name__}.layers must name at least one layer class, got none")
    for layer in rule.layers:
        _rules[layer] = rule


def load_installed() -> None:
    """Register the rules of installed packages, once; a layer that has a rule already keeps it.

    An entry of the group ``soaa.layer_rules`` is a rule's class, or an instance.

    Raises:
        TypeError: for an entry that is neither.
    """
    global _installed
    if _installed:
        return
    _installed = True
    for point in importlib.metadata.entry_points(group="soaa.layer_rules"):
        found = point.load()
        rule = found() if isinstance(found, type) else found
        if not isinstance(rule, (LayerRule, ScaleRule)):
            raise TypeError(
                f"entry point {point.name!r} of soaa.layer_rules must be a LayerRule or ScaleRule, got {found!r}"
            )
        for layer in rule.layers:
            _rules.setdefault(layer, rule)


def _forward(kind: type) -> Any:
    return getattr(kind, "forward", None)


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module's class, or of the class from which it inherits ``forward`` unchanged.

    >>> rule_for(nn.Linear(2, 3)).weight
    'weight'
    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> rule_for(Scaled(2, 3)) is None
    True
    """
    load_installed()
    kind = type(module)
    for base in kind.__mro__:
        rule = _rules.get(base) or _rules.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule if _forward(kind) is _forward(base) else None
    return None
