"""Natural gradient with a KL bound and backtracking, as in TRPO (arXiv 1502.05477)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature.likelihood import Likelihood
from curvature.matrix_free import Fisher
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region import Backtracking, KLBall, KLConjugateGradient, TrustRegion


class NaturalGradient(SecondOrder):
    """Fisher products x KL ellipsoid x a fixed radius with backtracking. One ``step(closure)`` is one trial.

    The step is (F+λI)⁻¹g by conjugate gradients, scaled to pᵀFp <= Δ (twice the KL divergence between the model before
    and after). A trial that does not reduce the loss is taken back, and the next one is shorter; after a trial that
    does, Δ starts afresh. Give it the model's outputs: ``optimizer.backward(loss, outputs)`` inside the closure.

    Args:
        params: parameters or groups.
        lr: multiplies the step; leave it at 1, since the trial is judged.
        radius: Δ > 0, on pᵀFp; TRPO's bound δ on the KL divergence is Δ/2.
        damping: λ >= 0, in curvature units.
        likelihood: what the loss is the negative logarithm of: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``.
        max_iterations: Fisher products of one trial at most, >= 1.
        shrink: factor of Δ after a refused trial, in (0, 1); ¼ halves the step.
        samples: labels drawn for the Fisher matrix; ``None`` takes the expectation exactly.
        seed: of the drawn labels.
        weight_decay: decoupled, λ >= 0.
        **options: of :class:`SecondOrder`.

    >>> import torch
    >>> model, x, y = torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1])
    >>> optimizer = NaturalGradient(model.parameters(), radius=0.5)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     outputs = model(x)
    ...     loss = torch.nn.functional.cross_entropy(outputs, y)
    ...     optimizer.backward(loss, outputs)
    ...     return loss
    >>> for _ in range(20):
    ...     _ = optimizer.step(closure)
    >>> bool(closure() < 0.02)
    True

    Cost: one gradient, one forward pass and up to ``max_iterations`` + 1 Fisher products a trial; no state but Δ.
    Defaults: TRPO's δ = 0.01 and its ten conjugate-gradient iterations.
    References: Schulman et al. 2015, arXiv 1502.05477, appendix C; Amari 1998; Martens 2020, arXiv 1412.1193.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        radius: float = 0.02,
        damping: float = 1e-3,
        likelihood: Likelihood = "categorical",
        max_iterations: int = 10,
        shrink: float = 0.25,
        *,
        samples: int | None = None,
        seed: int = 0,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            curvature=Fisher(likelihood, samples=samples, seed=seed),
            trust_region=TrustRegion(
                region=KLBall(),
                subproblem=KLConjugateGradient(max_iterations=max_iterations),
                radius=Backtracking(radius=radius, shrink=shrink, damping=damping),
            ),
            weight_decay=weight_decay,
            **options,
        )


optimizers.add("natural-gradient", NaturalGradient)
