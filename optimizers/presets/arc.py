"""ARC (Cartis, Gould & Toint 2011): adaptive cubic regularisation of Newton's method."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import Hessian
from curvature.matrix_free.hessian import Mode
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import AdaptiveCubic, CubicModel, TrustRegion, Unbounded


class ARC(SecondOrder):
    """Hessian products x cubic model x adaptive cubic weight σ. One ``step(closure)`` is one trial.

    The step minimises gᵀp + ½pᵀHp + (σ/3)‖p‖³ over a growing Krylov space; σ falls where the model kept its word and
    rises where it did not. Choose it, like trust-region Newton, for full-batch problems; its worst case in evaluations
    is better than that of any classical trust region, O(ε^(-3/2)).

    Args:
        params: parameters or groups.
        lr: multiplies the step; leave it at 1, since the trial is judged.
        initial_sigma: σ₀ > 0, in units of the third derivative.
        eta1: accept from this ratio.
        eta2: very successful above this ratio.
        max_iterations: Hessian products of one trial at most.
        weight_decay: decoupled, λ >= 0.
        hvp: ``"reverse"``, or ``"finite-difference"`` for models without a double backward.
        **options: of :class:`SecondOrder`.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    >>> optimizer = ARC([w])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2
    ...     optimizer.backward(loss)
    ...     return loss
    >>> for _ in range(60):
    ...     _ = optimizer.step(closure)
    >>> bool((w - 1).abs().max() < 1e-6)
    True

    Cost: one gradient, one forward pass and k Hessian products a trial, memory k P for the Krylov basis.
    Defaults: the paper's, section 7.
    Reference: Cartis, Gould & Toint 2011, Math. Program. 127, algorithm 2.1, equations (2.4) to (2.7).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        initial_sigma: float = 1.0,
        eta1: float = 0.1,
        eta2: float = 0.9,
        max_iterations: int = 100,
        weight_decay: float = 0.0,
        *,
        hvp: Mode = "reverse",
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            curvature=Hessian(hvp=hvp),
            trust_region=TrustRegion(
                region=Unbounded(),
                subproblem=CubicModel(max_iterations=max_iterations),
                radius=AdaptiveCubic(initial_sigma=initial_sigma, eta1=eta1, eta2=eta2),
            ),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("arc", ARC)
