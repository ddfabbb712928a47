"""Hessian-free optimization (Martens 2010): conjugate gradients on the damped Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import GaussNewton
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import L2Ball, LevenbergMarquardt, SteihaugCG, TrustRegion


class HessianFree(SecondOrder):
    """Gauss-Newton products x conjugate gradients x Levenberg-Marquardt damping. One ``step(closure)`` is one trial.

    λ is multiplied by 2/3 where the reduction exceeds ¾ of the model's and by 3/2 where it falls short of ¼. Give it
    the model's outputs: ``optimizer.backward(loss, outputs)`` inside the closure, and batches large enough that the
    curvature of one says something of the next.

    Args:
        params: parameters or groups.
        lr: multiplies the step; leave it at 1, since the trial is judged.
        initial_damping: λ₀ > 0, in curvature units: it scales with the loss.
        max_iterations: Gauss-Newton products of one step at most, >= 1.
        tolerance: conjugate gradients stop at this relative residual, in (0, 1).
        rule: ``"martens"`` takes no finite step back; ``"classical"`` takes back every step that raised the loss.
        omega: ω in (0, 1), the factor of λ with Martens' rule.
        weight_decay: decoupled, λ >= 0.
        **options: of :class:`SecondOrder`.

    >>> import torch
    >>> model, x, y = torch.nn.Linear(2, 1), torch.eye(2), torch.tensor([[1.0], [-1.0]])
    >>> optimizer = HessianFree(model.parameters())
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     outputs = model(x)
    ...     loss = torch.nn.functional.mse_loss(outputs, y)
    ...     optimizer.backward(loss, outputs)
    ...     return loss
    >>> for _ in range(20):
    ...     _ = optimizer.step(closure)
    >>> bool(closure() < 1e-6)
    True

    Cost: one gradient, one forward pass and up to ``max_iterations`` Gauss-Newton products a step.
    Two things are simpler than in the paper: conjugate gradients stop by their residual, not by the model's relative
    progress, and every solve starts at zero, without a preconditioner.

    Defaults: the paper's ω; the rest suits small problems.
    References: Martens 2010, Deep learning via Hessian-free optimization, section 4.1 (the damping's rule); Schraudolph
    2002 (the products).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        initial_damping: float = 1.0,
        max_iterations: int = 50,
        tolerance: float = 1e-3,
        rule: Literal["martens", "classical"] = "martens",
        omega: float = 2 / 3,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            curvature=GaussNewton(),
            trust_region=TrustRegion(
                region=L2Ball(),
                subproblem=SteihaugCG(max_iterations=max_iterations, tolerance=tolerance),
                radius=LevenbergMarquardt(
                    initial_damping=initial_damping, rule=rule, interval=1, omega=omega
                ),
            ),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("hessian-free", HessianFree)
