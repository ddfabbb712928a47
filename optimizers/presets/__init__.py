"""Known optimizers as compositions, one small file each."""

from optimizers.presets.adahessian import AdaHessian
from optimizers.presets.adam import Adam
from optimizers.presets.adamw import AdamW
from optimizers.presets.arc import ARC
from optimizers.presets.cat import CAT
from optimizers.presets.ekfac import EKFAC
from optimizers.presets.hessian_free import HessianFree
from optimizers.presets.kfac import KFAC
from optimizers.presets.lamb import LAMB
from optimizers.presets.lars import LARS
from optimizers.presets.muon import Muon
from optimizers.presets.natural_gradient import NaturalGradient
from optimizers.presets.quasi_newton import LBFGSTrustRegion, LSR1TrustRegion
from optimizers.presets.replay import AdamWReplay
from optimizers.presets.shampoo import Shampoo
from optimizers.presets.soaa import SOAA
from optimizers.presets.soap import SOAP
from optimizers.presets.sophia import SophiaG, SophiaH
from optimizers.presets.tadam import Tadam
from optimizers.presets.trust_region_newton import TrustRegionNewton

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
    "HessianFree",
    "LBFGSTrustRegion",
    "LSR1TrustRegion",
    "Muon",
    "NaturalGradient",
    "Shampoo",
    "SophiaG",
    "SophiaH",
    "Tadam",
    "TrustRegionNewton",
]
