"""Known optimizers as compositions, one small file each."""

from optimizers.presets.adamw import AdamW
from optimizers.presets.soaa import SOAA
from optimizers.presets.tadam import Tadam

__all__ = ["SOAA", "AdamW", "Tadam"]
