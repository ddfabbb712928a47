"""Known optimizers as compositions, one small file each."""

from optimizers.presets.adahessian import AdaHessian
from optimizers.presets.adam import Adam
from optimizers.presets.adamw import AdamW
from optimizers.presets.lamb import LAMB
from optimizers.presets.lars import LARS
from optimizers.presets.muon import Muon
from optimizers.presets.soaa import SOAA
from optimizers.presets.sophia import SophiaG, SophiaH
from optimizers.presets.tadam import Tadam

__all__ = ["LAMB", "LARS", "SOAA", "AdaHessian", "Adam", "AdamW", "Muon", "SophiaG", "SophiaH", "Tadam"]
