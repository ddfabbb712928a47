"""Linear layers: the layer as it stands, y = W a + b at every position."""

from __future__ import annotations

from torch import nn

from curvature.kronecker.rules.base import LayerRule
from curvature.kronecker.rules.registry import register_rule


class LinearRule(LayerRule):
    """``torch.nn.Linear``; every axis but the last is a position."""

    layers = (nn.Linear,)


register_rule(LinearRule())
