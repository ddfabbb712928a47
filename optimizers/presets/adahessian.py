"""AdaHessian (arXiv 2006.00719): Adam with the Hessian's diagonal in place of the squared gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import AdaHessianDiagonal
from curvature.hutchinson import DiagonalMode
from curvature.probes import Distribution
from optimizers.momentum import RunningMean
from optimizers.presets.soaa import check_betas
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import FixedRadius, TrustRegion, Unbounded


class AdaHessian(SecondOrder):
    """Hutchinson Hessian diagonal, root mean square over time x no region: θ ← θ - η m̂ / (v̂^(k/2) + ε).

    Give it the loss's graph: ``optimizer.backward(loss)`` in place of ``loss.backward()``.

    Between two refreshes v̂ stands still and counts refreshes, so that ``interval > 1`` keeps its bias correction exact.

    Args:
        params: parameters or groups.
        lr: η >= 0; the paper's 0.15 suits this curvature, which is smaller than Adam's √v̂.
        betas: decays of the gradient's running mean and of the squared diagonal's.
        eps: ε > 0, added to the root mean square: a damping in curvature units.
        hessian_power: k in (0, 1].
        weight_decay: decoupled, λ >= 0.
        probes: Hessian-vector products a refresh, >= 1.
        distribution: of the probes, ``"rademacher"`` or ``"gaussian"``.
        interval: steps between refreshes, >= 1.
        spatial_average: average the diagonal over each convolution kernel.
        seed: of the probes.
        hvp: ``"reverse"``, or ``"finite-difference"`` for models without a double backward, with ``step(closure)``.
        **options: of :class:`SecondOrder`.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    >>> optimizer = AdaHessian([w], lr=1.0, betas=(0.0, 0.999))
    >>> optimizer.backward((torch.tensor([1.0, 50.0]) * w ** 2).sum())
    >>> optimizer.step()  # a Newton step: the Hessian is diagonal
    >>> bool(w.abs().max() < 1e-6)
    True

    Cost: ``probes`` Hessian-vector products every ``interval`` steps; 8 bytes a float32 parameter of state.
    Defaults: η, β and k of the paper's experiments with images; ε is Adam's.
    Reference: Yao et al. 2021, arXiv 2006.00719, algorithm 1; equations (8), (10), (12) for the curvature.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        hessian_power: float = 1.0,
        weight_decay: float = 0.0,
        *,
        probes: int = 1,
        distribution: Distribution = "rademacher",
        interval: int = 1,
        spatial_average: bool = True,
        seed: int = 0,
        hvp: DiagonalMode = "reverse",
        **options: Any,
    ) -> None:
        beta_1, beta_2 = check_betas(betas)
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        super().__init__(
            params,
            lr,
            curvature=AdaHessianDiagonal(
                beta=beta_2,
                power=hessian_power,
                probes=probes,
                distribution=distribution,
                interval=interval,
                spatial_average=spatial_average,
                seed=seed,
                hvp=hvp,
            ),
            trust_region=TrustRegion(region=Unbounded(), radius=FixedRadius(damping=eps)),
            momentum=RunningMean(beta_1),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("adahessian", AdaHessian)
