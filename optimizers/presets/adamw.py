"""AdamW and Adam as compositions: SOAA's limit with a fixed radius and the Fisher branch off."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import EmpiricalFisherDiagonal
from optimizers.momentum import RunningMean
from optimizers.presets.soaa import check_betas
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import FixedRadius, RmsBox, TrustRegion


class AdamW(SecondOrder):
    """Empirical Fisher diagonal x the edge of the RMS-scaled box x a fixed radius of 1: θ ← θ - ηλθ - η m̂/(√v̂+ε).

    Equals ``torch.optim.AdamW`` to rounding; it is here as the row of the table that every ablation begins with.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        betas: decays of the gradient's running mean and of its square's.
        eps: ε > 0.
        weight_decay: decoupled, λ >= 0.
        **options: of :class:`SecondOrder` (``maximize``, ``compile``).

    Cost: O(P) a step, 8 bytes a float32 parameter of state.
    Defaults: those of ``torch.optim.AdamW``.
    References: Kingma & Ba 2015, arXiv 1412.6980, algorithm 1; Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        beta_1, beta_2 = check_betas(betas)
        super().__init__(
            params,
            lr,
            curvature=EmpiricalFisherDiagonal(beta=beta_2),
            trust_region=TrustRegion(region=RmsBox(eps=eps, interior=False), radius=FixedRadius(1.0)),
            momentum=RunningMean(beta_1),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("adamw", AdamW)
