"""SOAA (SecondOrderAdaptiveAdam, arXiv 2410.02293): the reference composition."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import EmpiricalFisherDiagonal
from optimizers.momentum import RunningMean
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import RmsBox, SOAARadius, TrustRegion


class SOAA(SecondOrder):
    """Empirical Fisher diagonal x RMS-scaled box x SOAA's clipped loss ratio.

    The step is the natural-gradient step m̂/F, F = (1+s)v̂, clipped element by element to d times Adam's; the radius d
    follows the ratio of observed to predicted loss reduction, between (1-γ)^(t/T) and 1 + γ^(t/T). Give it the loss:
    ``optimizer.backward(loss)`` or ``step(loss=loss)``; without any loss it is a fixed-radius method, and says so once.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        total_steps: T, steps of the whole run, which sets how fast the bounds on d open; ``None``: open from the start.
        betas: decays of the gradient's (and the loss's) running mean and of its square's.
        gamma: γ in (0, 0.25], how far d may shrink.
        eps: ε > 0.
        weight_decay: decoupled, λ >= 0.
        scope: ``"global"`` sums over all parameters (the paper's vector form); with ``"tensor"`` every tensor has its
            own s, d and prediction.
        prediction: ``"paper"`` or ``"model"``; see :class:`trust_region.SOAARadius`.
        fisher_scale: ``"exact"``, or ``"lagged"``: the s of the step before, for which a fused step does not wait. On
            digits the loss at the end did not differ beyond its spread over seeds (``docs/results/fisher_scale``).
        maximize: refused, since the ratio compares losses: negate the loss.
        compile: see :class:`SecondOrder`.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = SOAA([w], lr=0.1, total_steps=200)
    >>> for _ in range(200):
    ...     optimizer.zero_grad()
    ...     loss = (w ** 2).sum()
    ...     optimizer.backward(loss)
    ...     optimizer.step()
    >>> abs(w.item()) < 0.05
    True

    Cost: O(P) a step, 8 bytes a float32 parameter of state.
    Defaults: the paper's β, γ and ε; η is Adam's.
    Reference: SOAA 2024, arXiv 2410.02293; its equations, in order, are in docs/explanation/soaa.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        total_steps: int | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        gamma: float = 0.1,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scope: Literal["global", "tensor"] = "global",
        *,
        prediction: Literal["paper", "model"] = "paper",
        fisher_scale: Literal["exact", "lagged"] = "exact",
        **options: Any,
    ) -> None:
        beta_1, beta_2 = check_betas(betas)
        super().__init__(
            params,
            lr,
            curvature=EmpiricalFisherDiagonal(beta=beta_2),
            trust_region=TrustRegion(
                region=RmsBox(eps=eps, scope=scope, fisher_scale=fisher_scale),
                radius=SOAARadius(
                    total_steps=total_steps,
                    gamma=gamma,
                    beta=beta_1,
                    eps=eps,
                    scope=scope,
                    prediction=prediction,
                ),
            ),
            momentum=RunningMean(beta_1),
            weight_decay=weight_decay,
            **options,
        )


def check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    """Two decays, each in [0, 1)."""
    if len(betas) != 2:
        raise ValueError(f"betas must be a pair, got {betas!r}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}")
    return betas


optimizers.add("soaa", SOAA)
