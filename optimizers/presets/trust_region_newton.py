"""Trust-region Newton with Steihaug's conjugate gradients: SciPy's ``trust-ncg`` on a torch closure."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import Hessian
from curvature.matrix_free.hessian import Mode
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import L2Ball, RatioRadius, SteihaugCG, TrustRegion


class TrustRegionNewton(SecondOrder):
    """Hessian products x Euclidean ball by Steihaug-CG x the classical ratio. One ``step(closure)`` is one trial.

    Choose it for problems whose loss is evaluated in full, with an indefinite Hessian: it follows negative curvature
    out of saddles. The iterates and radii are those of ``scipy.optimize.minimize(method="trust-ncg")``.

    Args:
        params: parameters or groups.
        lr: multiplies the step; leave it at 1, since the trial is judged.
        initial_radius: Δ_0 > 0.
        max_radius: the largest Δ.
        eta: the smallest ratio that is accepted.
        max_iterations: Hessian products of one trial at most; ``None`` lets the residual decide.
        weight_decay: decoupled, λ >= 0.
        hvp: ``"reverse"``, or ``"finite-difference"`` for models without a double backward.
        **options: of :class:`SecondOrder`.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    >>> optimizer = TrustRegionNewton([w], initial_radius=10.0)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (torch.tensor([1.0, 50.0]) * w ** 2).sum()
    ...     optimizer.backward(loss)
    ...     return loss
    >>> for _ in range(3):
    ...     _ = optimizer.step(closure)
    >>> bool(w.abs().max() < 1e-5)
    True

    Cost: one gradient, one forward pass and a few Hessian-vector products a trial; no state but the radius.
    Defaults: SciPy's.
    References: Steihaug 1983; Nocedal & Wright 2006, algorithms 4.1 and 7.2; Conn, Gould & Toint 2000.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        initial_radius: float = 1.0,
        max_radius: float = 1000.0,
        eta: float = 0.15,
        max_iterations: int | None = None,
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
                subproblem=SteihaugCG(max_iterations=max_iterations),
                radius=RatioRadius(initial_radius=initial_radius, max_radius=max_radius, eta=eta),
            ),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("trust-region-newton", TrustRegionNewton)
