"""Ablations: any grid of curvature and trust region on a workload, fairly compared.

>>> from optimizers.ablation import Ablation, ablate
>>> ablation = Ablation(workload="digits", optimizers=["torch-adamw", "torch-sgd"], seeds=2)
>>> [cell.label for cell in ablation.all_cells()]
['torch-adamw', 'torch-sgd']
"""

from __future__ import annotations

from optimizers.ablation.ablate import Outcome, ablate, ablate_study, read_outcome
from optimizers.ablation.cell import Cell
from optimizers.ablation.config import Ablation, RunConfig
from optimizers.ablation.config_file import read_config, read_study
from optimizers.ablation.errors import AblationError
from optimizers.ablation.report import report
from optimizers.ablation.results import Row
from optimizers.ablation.workload import TensorData, Workload

__all__ = [
    "Ablation",
    "AblationError",
    "Cell",
    "Outcome",
    "Row",
    "RunConfig",
    "TensorData",
    "Workload",
    "ablate",
    "ablate_study",
    "read_config",
    "read_outcome",
    "read_study",
    "report",
]
