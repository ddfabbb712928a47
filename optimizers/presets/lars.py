"""LARS (arXiv 1708.03888): gradient steps of a length relative to each layer's weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import Identity
from optimizers.momentum import HeavyBall
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import FixedRadius, RelativeBall, TrustRegion


class LARS(SecondOrder):
    """Identity x per-layer ball relative to ‖θ‖ x fixed radius: θ_i ← θ_i - ηλθ_i - η c ‖θ_i‖ m_i/‖m_i‖.

    Every tensor moves by the fraction ηc of its own norm; one that is 0 (a fresh bias) moves by ηm.

    Two things are composed another way than in the paper, whose step without momentum and decay this equals: momentum
    averages gradients, not scaled steps, so that the region bounds the step that is taken; and the weight decay is
    decoupled, not added to the gradient before its length is measured.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        momentum: β in [0, 1) of m ← βm + g.
        trust_coefficient: c > 0, how far a layer may move relative to its own norm, at η = 1.
        weight_decay: decoupled, λ >= 0.
        nesterov: use g + βm in place of m.
        **options: of :class:`SecondOrder` (``maximize``, ``compile``).

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = LARS([w], lr=1.0, momentum=0.0, trust_coefficient=0.1)
    >>> (1e6 * w[0]).backward()
    >>> optimizer.step()  # 0.1 of the norm 5, however large the gradient
    >>> w.data
    tensor([2.5000, 4.0000])

    Cost: O(P) a step, 4 bytes a float32 parameter of state.
    Defaults: the paper's c and β.
    Reference: You, Gitman & Ginsburg 2017, arXiv 1708.03888, equation (6) and algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        trust_coefficient: float = 1e-3,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        if not trust_coefficient > 0:
            raise ValueError(f"trust_coefficient must be > 0, got {trust_coefficient}")
        super().__init__(
            params,
            lr,
            curvature=Identity(),
            trust_region=TrustRegion(
                region=RelativeBall(fill=True, floor=0.0), radius=FixedRadius(trust_coefficient)
            ),
            momentum=HeavyBall(momentum, nesterov=nesterov),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("lars", LARS)
