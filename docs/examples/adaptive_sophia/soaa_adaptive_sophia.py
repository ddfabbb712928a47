"""Sophia's curvature (arXiv 2305.14342) in a box whose radius follows the loss: a cell of the table without a paper."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import FlooredDiagonal, HutchinsonDiagonal
from optimizers import SecondOrder
from trust_region import Box, RatioRadius, TrustRegion


class AdaptiveSophia(SecondOrder):
    """Hutchinson Hessian diagonal x box x the classical ratio, judged one step later.

    Each element moves by -η clip(m̂ / max(h, floor), Δ). Δ doubles where the loss kept what the model promised and
    the box decided the step, and shrinks to a quarter where it did not; no trial is evaluated.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        betas: decays of the gradient's running mean and of the diagonal's (over refreshes).
        radius: Δ₀ > 0, the largest change of an element at η = 1.
        max_radius: the largest Δ.
        floor: > 0, the smallest curvature, in curvature units.
        weight_decay: decoupled, λ >= 0.
        interval: steps between Hessian-vector products, >= 1.
        seed: of the probes.
        **options: of :class:`optimizers.SecondOrder`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        radius: float = 1e-3,
        max_radius: float = 1e-1,
        floor: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        interval: int = 10,
        seed: int = 0,
        **options: Any,
    ) -> None:
        h = HutchinsonDiagonal(beta=betas[1], interval=interval, seed=seed)
        policy = RatioRadius(initial_radius=radius, max_radius=max_radius, evaluate="lagged")
        super().__init__(
            params,
            lr,
            curvature=FlooredDiagonal(h, floor=floor),
            trust_region=TrustRegion(region=Box(), radius=policy),
            momentum=betas[0],
            weight_decay=weight_decay,
            **options,
        )
