"""Muon: the minimiser of the linear model in a spectral-norm ball."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import Identity
from optimizers.momentum import PlainMean
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import FixedRadius, SpectralBall, TrustRegion


class Muon(SecondOrder):
    """Identity x spectral-norm ball x fixed radius: every matrix moves by -η U Vᵀ, of its mean gradient U S Vᵀ.

    Equals ``torch.optim.Muon``. That one refuses whatever is not a matrix; here a convolution is a matrix (first
    dimension by the rest) and a vector moves by its normalised gradient. Publications train embeddings, heads, biases
    and norms by AdamW instead: give them to a second optimizer.

    Choose it for its steps. In the study of the documentation (short runs, five seeds) it is where tuned AdamW ends in
    0.15 of the steps on a convolutional autoencoder, 0.33 on a character language model and 0.45 on an MLP, and in
    0.27, 0.57 and 14 times the processor time: matrices that are wide for their batch cost more to orthogonalise than
    to learn from. On logistic regression it is not separated from AdamW. On a CPU without bfloat16 products give
    ``ns_dtype=None``.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        weight_decay: decoupled, λ >= 0.
        momentum: β in [0, 1) of m ← βm + (1-β)g.
        nesterov: use (1-β)g + βm in place of m.
        ns_steps: Newton-Schulz iterations, >= 1.
        adjust_lr: Muon's factor by shape: ``"original"`` is √max(1, rows/columns), ``"match_rms_adamw"`` is
            0.2 √max(rows, columns), with which learning rates of AdamW can be kept; ``None`` is 1.
        ns_dtype: in which the iterations run; ``None`` is the gradient's own.
        **options: of :class:`SecondOrder` (``maximize``, ``compile``).

    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = Muon([w], lr=1.0, momentum=0.0, ns_dtype=None)
    >>> (w * torch.tensor([[0.0, 100.0], [1.0, 0.0]])).sum().backward()
    >>> optimizer.step()
    >>> torch.linalg.svdvals(w.data).min() > 0.1  # 0.01 of the gradient's largest, before
    tensor(True)

    Cost: 15 products of the matrix's smaller side a step; 4 bytes a float32 parameter of state.
    Defaults: those of ``torch.optim.Muon``.
    References: Jordan et al. 2024, Muon (the quintic iteration); Liu et al. 2025, arXiv 2502.16982, section 2 (factors
    by shape); Bernstein & Newhouse 2024, arXiv 2409.20325, section 2 (why it is a trust region).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr: Literal["original", "match_rms_adamw"] | None = "original",
        *,
        ns_dtype: torch.dtype | None = torch.bfloat16,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            curvature=Identity(),
            trust_region=TrustRegion(
                region=SpectralBall(steps=ns_steps, dtype=ns_dtype, scale=adjust_lr), radius=FixedRadius(1.0)
            ),
            momentum=PlainMean(momentum, nesterov=nesterov),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("muon", Muon)
