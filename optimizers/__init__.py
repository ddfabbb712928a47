"""Curvature and trust regions composed into ``torch.optim`` optimizers."""

from optimizers.momentum import HeavyBall, Momentum, PlainMean, RunningMean
from optimizers.presets import LAMB, LARS, SOAA, AdaHessian, Adam, AdamW, Muon, SophiaG, SophiaH, Tadam
from optimizers.registry import available
from optimizers.second_order import SecondOrder
from optimizers.step_info import StepInfo

from optimizers.build import build  # isort: skip  (last: it looks names up in the filled registries)

__all__ = [
    "LAMB",
    "LARS",
    "SOAA",
    "AdaHessian",
    "Adam",
    "AdamW",
    "HeavyBall",
    "Momentum",
    "Muon",
    "PlainMean",
    "RunningMean",
    "SecondOrder",
    "SophiaG",
    "SophiaH",
    "StepInfo",
    "Tadam",
    "available",
    "build",
]
