"""Curvature and trust regions composed into ``torch.optim`` optimizers."""

from optimizers.momentum import HeavyBall, Momentum, PlainMean, RunningMean
from optimizers.presets import SOAA, AdamW, Tadam
from optimizers.registry import available
from optimizers.second_order import SecondOrder
from optimizers.step_info import StepInfo

from optimizers.build import build  # isort: skip  (last: it looks names up in the filled registries)

__all__ = [
    "SOAA",
    "AdamW",
    "HeavyBall",
    "Momentum",
    "PlainMean",
    "RunningMean",
    "SecondOrder",
    "StepInfo",
    "Tadam",
    "available",
    "build",
]
