"""Shampoo (arXiv 1802.09568): a root of one gradient factor a dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

import curvature
from curvature.running_mean import check_beta
from optimizers.momentum import RunningMean
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import FixedRadius, TrustRegion, Unbounded


class Shampoo(SecondOrder):
    """Gradient Kronecker factors x no region: for a matrix θ ← θ - ηλθ - η L^-¼ m̂ R^-¼.

    The factors are bias-corrected running means of GGᵀ and GᵀG (``betas[1] = 1`` sums them, as in the paper, and the
    step then falls like 1/√t by itself). With ``grafting`` every tensor's step has the length of Adam's, so that Adam's
    learning rates can be kept.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        betas: decays of the gradient's running mean, in [0, 1), and of the factors', in [0, 1].
        eps: ε > 0, added to the factors' eigenvalues.
        exponent: of each factor; ``None`` is 1/(2k), k the order of the tensor.
        weight_decay: decoupled, λ >= 0.
        grafting: take over the length of Adam's step.
        interval: steps between eigendecompositions, >= 1.
        block_size: longer dimensions are cut into blocks of this size; ``None`` cuts nothing.
        **options: of :class:`SecondOrder` (``maximize``, ``compile``).

    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = Shampoo([w], lr=1.0, grafting=False)
    >>> (w * torch.tensor([[0.0, 100.0], [1.0, 0.0]])).sum().backward()
    >>> optimizer.step()  # all singular values of the first step are 1
    >>> torch.linalg.svdvals(w.data).round(decimals=3)
    tensor([1., 1.])

    Cost: see :class:`curvature.Shampoo`.
    References: Gupta, Koren & Singer 2018, arXiv 1802.09568, algorithms 1 and 2; Anil et al. 2020, arXiv 2002.09018;
    Shi et al. 2023, arXiv 2309.06497.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        exponent: float | None = None,
        weight_decay: float = 0.0,
        *,
        grafting: bool = True,
        interval: int = 10,
        block_size: int | None = 1024,
        **options: Any,
    ) -> None:
        if len(betas) != 2:
            raise ValueError(f"betas must be a pair, got {betas!r}")
        check_beta(betas[0], "betas[0]")
        adam = curvature.EmpiricalFisherDiagonal(beta=betas[1] if betas[1] < 1.0 else 0.999)
        super().__init__(
            params,
            lr,
            curvature=curvature.Shampoo(
                beta=betas[1],
                eps=eps,
                exponent=exponent,
                interval=interval,
                block_size=block_size,
                grafting=curvature.RootDiagonal(adam) if grafting else None,
            ),
            trust_region=TrustRegion(region=Unbounded(), radius=FixedRadius()),
            momentum=RunningMean(betas[0]),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("shampoo", Shampoo)
