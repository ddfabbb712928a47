"""AdamW with a recorded radius as its learning-rate multiplier: the control of SOAA's and Tadam's curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import EmpiricalFisherDiagonal
from optimizers.momentum import RunningMean
from optimizers.presets.soaa import check_betas
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import RecordedRadius, RmsBox, TrustRegion


class AdamWReplay(SecondOrder):
    """AdamW whose step t is multiplied by a recorded radius: θ ← θ - ηλθ - η d_t m̂/(√v̂+ε).

    SOAA and Tadam are two things at once, a curvature (the Fisher branch) and a learning rate that adapts (the radius).
    This has the second without the first: with the radii of their run, and the same data and seed, whatever
    differs is the Fisher branch's own contribution.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        radii: d_1, d_2, …, > 0: the radius that step t used; the last one holds beyond. SOAA reports in
            ``step_info.radius`` the radius of the next step, so that its recording begins with 1.
        betas: decays of the gradient's running mean and of its square's.
        eps: ε > 0.
        weight_decay: decoupled, λ >= 0.
        **options: of :class:`SecondOrder` (``maximize``, ``compile``).

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = AdamWReplay([w], lr=0.1, radii=[1.0, 2.0], weight_decay=0.0)
    >>> w.grad = torch.tensor([3.0])
    >>> for _ in range(2):
    ...     optimizer.step()
    ...     print(round(w.item(), 4))
    0.9
    0.7

    Cost: AdamW's.
    Defaults: Adam's. Reference: none; a control of this package's own.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        radii: Sequence[float] = (1.0,),
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        beta_1, beta_2 = check_betas(betas)
        super().__init__(
            params,
            lr,
            curvature=EmpiricalFisherDiagonal(beta=beta_2),
            trust_region=TrustRegion(
                region=RmsBox(eps=eps, interior=False), radius=RecordedRadius(tuple(radii))
            ),
            momentum=RunningMean(beta_1),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("adamw-replay", AdamWReplay)
