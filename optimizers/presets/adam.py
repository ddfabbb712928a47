"""Adam as a composition: AdamW without weight decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimizers.presets.adamw import AdamW
from optimizers.registry import optimizers


class Adam(AdamW):
    """Empirical Fisher diagonal x the edge of the RMS-scaled box x a fixed radius of 1: θ ← θ - η m̂/(√v̂+ε).

    Equals ``torch.optim.Adam`` with ``weight_decay=0`` to rounding. Its weight decay would be added to the gradient and
    so enter the curvature; that is not offered: :class:`AdamW` decays the weights themselves.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        betas: decays of the gradient's running mean and of its square's.
        eps: ε > 0.
        **options: of :class:`SecondOrder` (``maximize``, ``compile``).

    Raises:
        ValueError: for a weight decay.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = Adam([w], lr=0.5)
    >>> (w ** 2).sum().backward()
    >>> optimizer.step()
    >>> w.data
    tensor([1.5000])

    Cost: O(P) a step, 8 bytes a float32 parameter of state.
    Defaults: the paper's.
    Reference: Kingma & Ba 2015, arXiv 1412.6980, algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        if options.pop("weight_decay", 0.0) != 0.0:
            raise ValueError("weight_decay must be 0 in Adam: use AdamW, which decays the weights themselves")
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=0.0, **options)


optimizers.add("adam", Adam)
