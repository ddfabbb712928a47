"""Quasi-Newton trust regions: the curvature is learnt from gradients, the radius from trials."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import LBFGS, LSR1
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import L2Ball, RatioRadius, SteihaugCG, TrustRegion


class LSR1TrustRegion(SecondOrder):
    """Limited-memory SR1 x Euclidean ball by Steihaug-CG x the classical ratio. One ``step(closure)`` is one trial.

    Learns negative curvature too, which the ball turns into progress. No Hessian products: a product with B costs
    O(m P). Choose it for full batches, or batches that stay for several trials.

    Args:
        params: parameters or groups.
        lr: multiplies the step; leave it at 1, since the trial is judged.
        history: m >= 1, pairs of steps and gradient differences.
        initial_radius: Δ_0 > 0.
        max_radius: the largest Δ.
        eta: the smallest ratio that is accepted.
        max_iterations: products with B of one trial at most; ``None`` lets the residual decide.
        weight_decay: decoupled, λ >= 0.
        **options: of :class:`SecondOrder`.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    >>> optimizer = LSR1TrustRegion([w])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2
    ...     optimizer.backward(loss)
    ...     return loss
    >>> for _ in range(150):
    ...     _ = optimizer.step(closure)
    >>> bool((w - 1).abs().max() < 1e-5)
    True

    Cost: one gradient and one forward pass a trial; 8 m + 8 bytes a float32 parameter of state.
    Defaults: the radii of SciPy's trust-region methods; η at the upper end of what algorithm 6.2 allows.
    References: Conn, Gould & Toint 1991; Byrd, Khalfan & Schnabel 1996; Nocedal & Wright 2006, equation (6.24) and
    algorithm 6.2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        history: int = 10,
        initial_radius: float = 1.0,
        max_radius: float = 1000.0,
        eta: float = 1e-3,
        max_iterations: int | None = None,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            curvature=LSR1(history=history),
            trust_region=ball(initial_radius, max_radius, eta, max_iterations),
            weight_decay=weight_decay,
            **options,
        )


class LBFGSTrustRegion(SecondOrder):
    """Limited-memory BFGS x Euclidean ball by Steihaug-CG x the classical ratio. One ``step(closure)`` is one trial.

    The curvature is positive definite; where the function's own is not, pairs are skipped or pulled towards it
    (``safeguard="powell"``). Choose it for full batches, or batches that stay for several trials.

    Args:
        params: parameters or groups.
        lr: multiplies the step; leave it at 1, since the trial is judged.
        history: m >= 1, pairs of steps and gradient differences.
        initial_radius: Δ_0 > 0.
        max_radius: the largest Δ.
        eta: the smallest ratio that is accepted.
        max_iterations: products with B of one trial at most; ``None`` lets the residual decide.
        weight_decay: decoupled, λ >= 0.
        safeguard: ``"skip"`` or ``"powell"``; see :class:`curvature.LBFGS`.
        **options: of :class:`SecondOrder`.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    >>> optimizer = LBFGSTrustRegion([w])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2
    ...     optimizer.backward(loss)
    ...     return loss
    >>> for _ in range(150):
    ...     _ = optimizer.step(closure)
    >>> bool((w - 1).abs().max() < 1e-5)
    True

    Cost: one gradient and one forward pass a trial; 8 m + 8 bytes a float32 parameter of state.
    Defaults: as :class:`LSR1TrustRegion`.
    References: Byrd, Nocedal & Schnabel 1994 (the compact form; Nocedal & Wright 2006, theorem 7.4, and procedure 18.2
    for Powell's pull); Burdakov et al. 2017 (in a trust region).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        history: int = 10,
        initial_radius: float = 1.0,
        max_radius: float = 1000.0,
        eta: float = 1e-3,
        max_iterations: int | None = None,
        weight_decay: float = 0.0,
        *,
        safeguard: Literal["skip", "powell"] = "skip",
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            curvature=LBFGS(history=history, safeguard=safeguard),
            trust_region=ball(initial_radius, max_radius, eta, max_iterations),
            weight_decay=weight_decay,
            **options,
        )


def ball(initial_radius: float, max_radius: float, eta: float, max_iterations: int | None) -> TrustRegion:
    """The classical trust region."""
    return TrustRegion(
        region=L2Ball(),
        subproblem=SteihaugCG(max_iterations=max_iterations),
        radius=RatioRadius(initial_radius=initial_radius, max_radius=max_radius, eta=eta),
    )


optimizers.add("lsr1-trust-region", LSR1TrustRegion)
optimizers.add("lbfgs-trust-region", LBFGSTrustRegion)
