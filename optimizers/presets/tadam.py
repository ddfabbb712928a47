"""Tadam (Yang, Cho & Lee 2023): Adam's box around a natural-gradient step, with a radius in three levels."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import GradientVariance
from optimizers.momentum import RunningMean
from optimizers.presets.soaa import check_betas
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import RmsBox, TadamRadius, TrustRegion


class Tadam(SecondOrder):
    """Centred gradient variance, rank-one corrected x RMS-scaled box x three-level loss ratio, before the step.

    With v ← β₂v + (1-β₂)(g-m̂₋)²(β₂-β₂ᵗ)/(1-β₂ᵗ), v̂ = v/(1-β₂ᵗ), ŝ the bias-corrected mean of g² and
    F = (1 + Σ m̂²/(v̂+ε)) v̂, the step is u = d m̂/(max(d F, √ŝ)+ε); the radius d follows
    ρ = (ℓ̂₋-ℓ)/max(P,ε) with P = η(a - ½(a² + Σ v̂u²)), a = Σ m̂u. Give it the loss:
    ``optimizer.backward(loss)`` or ``step(loss=loss)``; without any loss it is a fixed-radius method, and says so once.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        total_steps: T, steps of the whole run, which sets how fast the bounds on d open; ``None``: open from the start.
        betas: decays of the gradient's (and the loss's) running mean and of its variance's.
        gamma: γ in (0, 0.5): ρ < γ shrinks d, ρ > 1-γ enlarges it.
        eps: ε > 0.
        weight_decay: decoupled, λ >= 0.
        **options: of :class:`SecondOrder` (``compile``).

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = Tadam([w], lr=0.1, total_steps=200)
    >>> for _ in range(200):
    ...     optimizer.zero_grad()
    ...     loss = (w ** 2).sum()
    ...     optimizer.backward(loss)
    ...     optimizer.step()
    >>> abs(w.item()) < 0.1
    True

    Cost: O(P) a step, 16 bytes a float32 parameter of state.
    Defaults: the paper's γ; the rest is Adam's.
    Reference: Yang, Cho & Lee 2023, Tadam: a robust stochastic gradient optimizer. The equations are those above.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        total_steps: int | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        gamma: float = 0.25,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        beta_1, beta_2 = check_betas(betas)
        super().__init__(
            params,
            lr,
            curvature=GradientVariance(betas=betas, eps=eps),
            trust_region=TrustRegion(
                region=RmsBox(eps=eps, rank_one_scale=False, beta=beta_2),
                radius=TadamRadius(total_steps=total_steps, gamma=gamma, beta=beta_1, eps=eps),
            ),
            momentum=RunningMean(beta_1),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("tadam", Tadam)
