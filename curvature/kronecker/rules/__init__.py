"""Layer rules, one kind a file; importing this package registers them."""

from curvature.kronecker.rules import (
    conv,
    conv_transpose,
    embedding,
    hf_conv1d,
    linear,
    multihead_attention,
    norm,
)
from curvature.kronecker.rules.base import BlockCall, Dims, LayerRule, ScaleRule
from curvature.kronecker.rules.registry import register_rule, rule_for

__all__ = [
    "BlockCall",
    "Dims",
    "LayerRule",
    "ScaleRule",
    "conv",
    "conv_transpose",
    "embedding",
    "hf_conv1d",
    "linear",
    "multihead_attention",
    "norm",
    "register_rule",
    "rule_for",
]
