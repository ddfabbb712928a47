"""Curvature and trust regions composed into ``torch.optim`` optimizers."""

from optimizers.momentum import HeavyBall, Momentum, PlainMean, RunningMean, RunningMeanFromSecond
from optimizers.presets import (
    ARC,
    CAT,
    EKFAC,
    KFAC,
    LAMB,
    LARS,
    SOAA,
    SOAP,
    AdaHessian,
    Adam,
    AdamW,
    AdamWReplay,
    HessianFree,
    LBFGSTrustRegion,
    LSR1TrustRegion,
    Muon,
    NaturalGradient,
    Shampoo,
    SophiaG,
    SophiaH,
    Tadam,
    TrustRegionNewton,
)
from optimizers.registry import available
from optimizers.second_order import SecondOrder
from optimizers.step_info import StepInfo

from optimizers.build import build  # isort: skip  (last: it looks names up in the filled registries)

__all__ = [
    "ARC",
    "CAT",
    "EKFAC",
    "KFAC",
    "LAMB",
    "LARS",
    "SOAA",
    "SOAP",
    "AdaHessian",
    "Adam",
    "AdamW",
    "AdamWReplay",
    "HeavyBall",
    "HessianFree",
    "LBFGSTrustRegion",
    "LSR1TrustRegion",
    "Momentum",
    "Muon",
    "NaturalGradient",
    "PlainMean",
    "RunningMean",
    "RunningMeanFromSecond",
    "SecondOrder",
    "Shampoo",
    "SophiaG",
    "SophiaH",
    "StepInfo",
    "Tadam",
    "TrustRegionNewton",
    "available",
    "build",
]
