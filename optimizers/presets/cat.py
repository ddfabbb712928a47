"""CAT (Hamad & Hinder 2022, arXiv 2206.10053): a consistently adaptive trust-region method."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

import trust_region
from curvature import Hessian
from curvature.matrix_free.hessian import Mode
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import Krylov, L2Ball, TrustRegion


class CAT(SecondOrder):
    """Hessian products x Euclidean ball x consistently adaptive radius. One ``step(closure)`` is one trial.

    Its ratio measures the reduction against the model's plus ½θ‖g⁺‖‖p‖, with the gradient g⁺ at the trial point: no
    constant of the problem needs to be known, and the worst case in evaluations is optimal.

    Args:
        params: parameters or groups.
        lr: multiplies the step; leave it at 1, since the trial is judged.
        initial_radius: Δ₀ > 0.
        beta: β in (0, 1), the smallest ratio after which the radius grows.
        theta: θ in [0, 1), the weight of the trial gradient.
        omega: ω > 1, factor of the radius.
        max_iterations: Hessian products of one trial at most.
        weight_decay: decoupled, λ >= 0.
        hvp: ``"reverse"``, or ``"finite-difference"`` for models without a double backward.
        **options: of :class:`SecondOrder`.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    >>> optimizer = CAT([w])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2
    ...     optimizer.backward(loss)
    ...     return loss
    >>> for _ in range(100):
    ...     _ = optimizer.step(closure)
    >>> bool((w - 1).abs().max() < 1e-6)
    True

    Cost: two gradients and k Hessian products a trial, memory k P for the Krylov basis.
    Defaults: those of the paper's experiments.
    Reference: Hamad & Hinder 2022, arXiv 2206.10053, algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        initial_radius: float = 1.0,
        beta: float = 0.1,
        theta: float = 0.1,
        omega: float = 8.0,
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
                region=L2Ball(),
                subproblem=Krylov(max_iterations=max_iterations),
                radius=trust_region.CAT(initial_radius=initial_radius, beta=beta, theta=theta, omega=omega),
            ),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("cat", CAT)
