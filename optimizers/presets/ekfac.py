"""EK-FAC (arXiv 1806.03884): K-FAC's eigenbasis with eigenvalues that are measured in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

import curvature
from curvature.kronecker.fisher import FisherKind
from curvature.likelihood import Likelihood
from optimizers.presets.kfac import damped_kl_ball, trainable
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import TrustRegion


class EKFAC(SecondOrder):
    """Eigenvalue-corrected Kronecker factors x KL ellipsoid x Levenberg-Marquardt damping.

    :class:`KFAC` with another diagonal in its eigenbasis, never further from the Fisher matrix. Its bases can be
    refreshed rarely, since the eigenvalues follow at every measurement. Loops and damping are those of :class:`KFAC`.

    Args:
        model: whose layers are observed, and whose parameters that require grad are optimised.
        lr: η >= 0.
        momentum: β in [0, 1) of the gradient's bias-corrected running mean.
        initial_damping: λ₀ > 0, in curvature units.
        radius: Δ > 0, on (ηp)ᵀF(ηp).
        damping: ``"trial"`` (needs ``step(closure)``), ``"lagged"`` or ``"fixed"``.
        damping_interval: T₁ >= 1, steps between two looks at λ.
        fisher: ``"mc"``, ``"type-2"``, ``"empirical"`` or ``"forward-only"``.
        sharing: ``"expand"`` or ``"reduce"``.
        beta: decay of the running means.
        factor_interval: steps between measurements.
        inverse_interval: steps between eigendecompositions of a layer.
        weight_decay: decoupled, λ >= 0.
        likelihood: of the drawn labels; ``None`` reads it from the loss.
        seed: of the drawn labels.
        params: parameters or groups to optimise in place of the model's.
        trust_region: in place of KL ellipsoid and damping, which must then be left at their defaults.
        exclude: names of modules to treat by the diagonal.
        **options: of :class:`SecondOrder`.

    >>> import torch
    >>> model, x, y = torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1])
    >>> optimizer = EKFAC(model, lr=0.5, damping="fixed", radius=1.0, fisher="type-2")
    >>> for _ in range(30):
    ...     optimizer.zero_grad()
    ...     outputs = model(x)
    ...     loss = torch.nn.functional.cross_entropy(outputs, y)
    ...     optimizer.backward(loss, outputs)
    ...     optimizer.step()
    >>> bool(loss < 0.1)
    True

    Cost: see :class:`curvature.EKFAC`; with ``damping="trial"`` one forward pass a step more.
    Reference: George et al. 2018, arXiv 1806.03884.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        initial_damping: float = 0.03,
        radius: float = 0.1,
        damping: Literal["trial", "lagged", "fixed"] = "trial",
        damping_interval: int = 5,
        fisher: FisherKind = "mc",
        sharing: Literal["expand", "reduce"] = "expand",
        beta: float = 0.95,
        factor_interval: int = 1,
        inverse_interval: int = 20,
        weight_decay: float = 0.0,
        *,
        likelihood: Likelihood | None = None,
        seed: int = 0,
        params: ParamsT | None = None,
        trust_region: TrustRegion | None = None,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        estimator = curvature.EKFAC(
            model,
            fisher=fisher,
            sharing=sharing,
            seed=seed,
            likelihood=likelihood,
            beta=beta,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            exclude=exclude,
        )
        super().__init__(
            trainable(model) if params is None else params,
            lr,
            curvature=estimator,
            trust_region=damped_kl_ball(initial_damping, radius, damping, damping_interval, trust_region),
            momentum=momentum,
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("ekfac", EKFAC)
