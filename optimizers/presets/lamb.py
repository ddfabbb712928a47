"""LAMB (arXiv 1904.00962): Adam's direction at a length relative to each layer's weights."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import EmpiricalFisherDiagonal, RootDiagonal
from optimizers.momentum import RunningMean
from optimizers.presets.soaa import check_betas
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import FixedRadius, RelativeBall, TrustRegion


class LAMB(SecondOrder):
    """Root of the empirical Fisher diagonal x per-layer ball relative to ‖θ‖: θ_i ← θ_i - ηλθ_i - η φ(‖θ_i‖) r_i/‖r_i‖.

    r = m̂/(√v̂+ε) is Adam's step and φ(x) = min(x, cap). A tensor that is 0 (a fresh bias) moves by Adam's step itself.

    The weight decay is decoupled. The paper adds λθ to r before its length is measured; without weight decay the two
    are equal.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        betas: decays of the gradient's running mean and of its square's.
        eps: ε > 0.
        weight_decay: decoupled, λ >= 0.
        cap: the largest ‖θ‖ that is measured with, > 0; published code uses 10, ``math.inf`` leaves it out.
        **options: of :class:`SecondOrder` (``maximize``, ``compile``).

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = LAMB([w], lr=0.1)
    >>> (w * torch.tensor([1.0, 1e-3])).sum().backward()
    >>> optimizer.step()  # Adam's direction, near (1, 1), 0.1 of the norm 5 long
    >>> w.data
    tensor([2.6463, 3.6466])

    Cost: O(P) a step, 8 bytes a float32 parameter of state.
    Defaults: β and ε of the paper's experiments, no decay, no cap.
    Reference: You et al. 2019, arXiv 1904.00962, algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        cap: float = math.inf,
        **options: Any,
    ) -> None:
        beta_1, beta_2 = check_betas(betas)
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        if not cap > 0:
            raise ValueError(f"cap must be > 0, got {cap}")
        super().__init__(
            params,
            lr,
            curvature=RootDiagonal(EmpiricalFisherDiagonal(beta=beta_2)),
            trust_region=TrustRegion(
                region=RelativeBall(fill=True, floor=0.0, cap=cap), radius=FixedRadius(1.0, damping=eps)
            ),
            momentum=RunningMean(beta_1),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("lamb", LAMB)
