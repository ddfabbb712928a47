"""Layer rules by layer class: one file a kind of layer, and one line of registration."""

from __future__ import annotations

from typing import Any

from torch import nn

from curvature.kronecker.rules.base import LayerRule, ScaleRule

Rule = LayerRule | ScaleRule

_rules: dict[type[nn.Module] | str, Rule] = {}


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
    kind = type(module)
    for base in kind.__mro__:
        rule = _rules.get(base) or _rules.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule if _forward(kind) is _forward(base) else None
    return None
