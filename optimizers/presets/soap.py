"""SOAP (arXiv 2409.11321): Adam in Shampoo's eigenbasis."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

import curvature
from optimizers.momentum import RunningMeanFromSecond
from optimizers.presets.soaa import check_betas
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import FixedRadius, TrustRegion, Unbounded


class SOAP(SecondOrder):
    """Adam in the eigenbasis of the gradient factors x no region: θ ← θ - ηλθ - η Q (Qᵀm̂ / (√v̂+ε)).

    The first step is Adam's, since the first basis is that of the first gradient; published code skips it. Neither mean
    goes on with that gradient, so that from the second step on this is the published code.
    In the study of the documentation (docs/results/study.md) it needs 0.47 of a tuned AdamW's steps on a character
    language model, and 0.27 with ``every_step_until=25``, in runs of 150 steps; in ones of 60 it is worse as published.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        betas: decays of the gradient's running mean and of the rotated second moment's.
        factor_beta: decay of the factors; ``None`` is ``betas[1]``.
        eps: ε > 0.
        weight_decay: decoupled, λ >= 0.
        interval: steps between refreshes of the basis, >= 1.
        max_dim: longer dimensions are not rotated; ``None`` rotates every one.
        rotate_vectors: whether biases and other vectors are rotated too.
        every_step_until: up to this step, >= 0, the basis is refreshed at every step. 0 is the published code; 25 suits
            runs of some hundred steps (docs/results/study.md).
        **options: of :class:`SecondOrder` (``maximize``, ``compile``).

    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = SOAP([w], lr=1.0)
    >>> (w * torch.tensor([[0.0, 100.0], [1.0, 0.0]])).sum().backward()
    >>> optimizer.step()
    >>> w.data.round(decimals=3).abs()
    tensor([[0., 1.],
            [1., 0.]])

    Cost: see :class:`curvature.SOAP`; 4 bytes a float32 parameter of state more.
    Reference: Vyas et al. 2024, arXiv 2409.11321, algorithms 3 and 4.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        factor_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        interval: int = 10,
        max_dim: int | None = 10_000,
        rotate_vectors: bool = False,
        every_step_until: int = 0,
        **options: Any,
    ) -> None:
        beta_1, beta_2 = check_betas(betas)
        super().__init__(
            params,
            lr,
            curvature=curvature.SOAP(
                beta=beta_2,
                factor_beta=factor_beta,
                eps=eps,
                interval=interval,
                max_dim=max_dim,
                rotate_vectors=rotate_vectors,
                every_step_until=every_step_until,
            ),
            trust_region=TrustRegion(region=Unbounded(), radius=FixedRadius()),
            momentum=RunningMeanFromSecond(beta_1),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("soap", SOAP)
