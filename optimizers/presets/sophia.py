"""Sophia-H and Sophia-G (arXiv 2305.14342): a diagonal curvature, refreshed now and then, and a box."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import CurvatureEstimator, FlooredDiagonal, HutchinsonDiagonal
from curvature.fisher_diagonal import FisherDiagonal
from curvature.hutchinson import DiagonalMode
from curvature.likelihood import Likelihood
from curvature.probes import Distribution
from optimizers.momentum import PlainMean
from optimizers.presets.soaa import check_betas
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import Box, FixedRadius, TrustRegion


class SophiaH(SecondOrder):
    """Hutchinson Hessian diagonal x box x fixed radius: θ ← θ - ηλθ - η clip(m / max(γh, ε), ρ).

    Both running means start at zero and are not bias-corrected, as in the paper. Where h is negative or small the step
    is ρ sign(m). Give it the loss's graph: ``optimizer.backward(loss)``.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        betas: decays of the gradient's running mean and of the diagonal's (over refreshes).
        gamma: γ > 0, multiplies the curvature; the paper chooses it so that 10 to 50% of the
            elements are not clipped.
        rho: ρ > 0, the radius of the box.
        eps: ε > 0.
        weight_decay: decoupled, λ >= 0.
        interval: steps between refreshes, >= 1.
        probes: Hessian-vector products a refresh, >= 1.
        distribution: of the probes.
        seed: of the probes.
        hvp: ``"reverse"``, or ``"finite-difference"`` for models without a double backward, with ``step(closure)``.
        **options: of :class:`SecondOrder`.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    >>> optimizer = SophiaH([w], lr=0.1, rho=1.0)
    >>> optimizer.backward((torch.tensor([1.0, -1.0]) * w ** 2).sum())
    >>> optimizer.step()  # both elements are clipped, the concave one to the sign of its gradient
    >>> w.data
    tensor([ 1.9000, -1.1000])

    Cost: ``probes`` Hessian-vector products every ``interval`` steps; 8 bytes a float32 parameter of state.
    Defaults: the paper's β, γ, ε and interval; its weight decay of 0.2 is left out, and η is to be set.
    Reference: Liu et al. 2023, arXiv 2305.14342, equation (6), algorithms 1 and 3.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        rho: float = 1.0,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        interval: int = 10,
        probes: int = 1,
        distribution: Distribution = "gaussian",
        seed: int = 0,
        hvp: DiagonalMode = "reverse",
        **options: Any,
    ) -> None:
        beta_1, beta_2 = check_betas(betas)
        check_sophia(gamma, rho, eps)
        h = HutchinsonDiagonal(
            beta=beta_2, probes=probes, distribution=distribution, interval=interval, seed=seed, hvp=hvp
        )
        super().__init__(
            params,
            lr,
            curvature=denominator(h, gamma, eps),
            trust_region=TrustRegion(region=Box(), radius=FixedRadius(rho)),
            momentum=PlainMean(beta_1),
            weight_decay=weight_decay,
            **options,
        )


class SophiaG(SecondOrder):
    """Sampled-label Gauss-Newton diagonal x box x fixed radius: θ ← θ - ηλθ - η clip(m / max(γh, ε), ρ).

    h is the Gauss-Newton-Bartlett estimate: squared gradients for labels drawn from the model itself. (Squares of the
    gradients that the training uses anyway, with the data's labels, would be another method: the empirical Fisher.)
    Give it the model's outputs: ``optimizer.backward(loss, outputs)``.

    Args:
        params: parameters or groups.
        lr: η >= 0.
        likelihood: what the loss is the negative logarithm of: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``.
        betas: decays of the gradient's running mean and of the diagonal's (over refreshes).
        gamma: γ > 0, multiplies the curvature.
        rho: ρ > 0, the radius of the box.
        eps: ε > 0.
        weight_decay: decoupled, λ >= 0.
        interval: steps between refreshes, >= 1.
        samples: labels drawn a refresh, >= 1.
        seed: of the labels.
        **options: of :class:`SecondOrder`.

    Cost: ``samples`` backward passes every ``interval`` steps; 8 bytes a float32 parameter of state.
    Defaults: as :class:`SophiaH`, with the paper's γ for this estimator.
    Reference: Liu et al. 2023, arXiv 2305.14342, equation (6), algorithms 2 and 3.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 6e-4,
        likelihood: Likelihood = "categorical",
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.05,
        rho: float = 1.0,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        interval: int = 10,
        samples: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        beta_1, beta_2 = check_betas(betas)
        check_sophia(gamma, rho, eps)
        h = FisherDiagonal(likelihood, samples=samples, seed=seed, interval=interval, beta=beta_2)
        super().__init__(
            params,
            lr,
            curvature=denominator(h, gamma, eps),
            trust_region=TrustRegion(region=Box(), radius=FixedRadius(rho)),
            momentum=PlainMean(beta_1),
            weight_decay=weight_decay,
            **options,
        )


def denominator(h: CurvatureEstimator, gamma: float, eps: float) -> FlooredDiagonal:
    """max(γh, ε), with h a running mean from zero."""
    return FlooredDiagonal(h, scale=gamma, floor=eps, bias_corrected=False)


def check_sophia(gamma: float, rho: float, eps: float) -> None:
    """Refuse what is not positive, by the names that a user of Sophia knows."""
    for name, value in (("gamma", gamma), ("rho", rho), ("eps", eps)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


optimizers.add("sophia-h", SophiaH)
optimizers.add("sophia-g", SophiaG)
