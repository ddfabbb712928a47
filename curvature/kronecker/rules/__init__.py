"""Layer rules, one kind a file; importing this package registers them."""

from curvature.kronecker.rules import linear as linear
from curvature.kronecker.rules.base import Dims, LayerRule
from curvature.kronecker.rules.registry import register_rule, rule_for

__all__ = ["Dims", "LayerRule", "register_rule", "rule_for"]
