"""The centred variance of the gradient with the mean put back as a rank-one term: Tadam's Fisher matrix.

Legend: g the batch gradient, m̂ its bias-corrected running mean, v the running mean of (g - m̂₋)², v̂ the corrected one,
s = Σ m̂²/(v̂+ε), t the gradients a tensor has received, β₁ and β₂ the decays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.operators import DiagonalOperator
from curvature.protocols import Estimator, Needs, Observation, State
from curvature.registry import estimators
from curvature.running_mean import bias_corrected, check_beta


class RankOneCorrectedDiagonal(DiagonalOperator):
    """B = (1+s) diag(v̂): the diagonal whose Newton step along m̂ is that of diag(v̂) + m̂m̂ᵀ.

    By Sherman & Morrison (diag(v̂) + m̂m̂ᵀ)⁻¹m̂ = m̂ / ((1+s) v̂) with s = m̂ᵀdiag(v̂)⁻¹m̂.

    Args:
        variance: v̂, one tensor a parameter.
        scale: 1 + s, 0-d.
    """

    def __init__(self, variance: Sequence[Tensor], scale: Tensor) -> None:
        super().__init__([v * scale.to(v.device, v.dtype) for v in variance])
        self.variance = list(variance)
        self.scale = scale


@dataclass(frozen=True)
class GradientVariance(Estimator):
    """diag(v̂) + m̂m̂ᵀ, the second moment split into a centred variance and the mean's outer product.

    Its Newton step along the mean gradient is diagonal, and that diagonal, F = (1+s) v̂, is the operator. Choose it over
    :class:`EmpiricalFisherDiagonal` where the mean gradient is large beside its noise: the raw second moment then
    counts the signal as curvature.

    Args:
        betas: β₁ of the mean, in [0, 1), and β₂ of the variance, in (0, 1).
        eps: ε > 0: v starts there, and it is added to v̂ inside s.

    >>> estimator = GradientVariance(betas=(0.0, 0.5))
    >>> state = estimator.init([torch.zeros(1)])
    >>> for g in (1.0, 3.0, 1.0, 3.0):
    ...     estimator.update(state, Observation(gradient=[torch.tensor([g])]))
    >>> estimator.operator(state).variance  # below (3 - 1)² = 4: the first weights are small
    [tensor([1.6305])]

    Cost: O(P) time; 8 bytes a float32 parameter of state, for m and v.
    Reference: Yang, Cho & Lee 2023, Tadam: a robust stochastic gradient optimizer.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    shardable = True
    semidefinite = True

    def __post_init__(self) -> None:
        check_beta(self.betas[0], "betas[0]")
        if not 0.0 < self.betas[1] < 1.0:
            raise ValueError(f"betas[1] must be in (0, 1), got {self.betas[1]}")
        if not self.eps > 0:
            raise ValueError(f"eps must be > 0, got {self.eps}")

    @property
    def needs(self) -> Needs:
        """Gradients."""
        return Needs.GRAD

    def init(self, params: Sequence[Tensor]) -> State:
        """m = 0, v = ε, t = 0."""
        return {
            "mean": vectors.zeros_like(params),
            "variance": [z + self.eps for z in vectors.zeros_like(params)],
            "count": [vectors.scalar_like([p]) for p in params],
        }

    def update(self, state: State, seen: Observation) -> None:
        """v ← β₂v + (1-β₂)(g-m̂₋)²(β₂-β₂ᵗ)/(1-β₂ᵗ), then m ← β₁m + (1-β₁)g."""
        beta_1, beta_2 = self.betas
        mean, variance, count = (cast("list[Tensor]", state[k]) for k in ("mean", "variance", "count"))
        for m, v, t, g in zip(mean, variance, count, seen.gradient, strict=True):
            if g is None:
                continue
            [m_hat] = bias_corrected([m], [t], beta_1)
            t.add_(1.0)
            log_beta = math.log(beta_2)
            # (β₂-β₂ᵗ)/(1-β₂ᵗ) without cancellation; 0 in the first step, where there is no mean to centre on
            weight = beta_2 * torch.expm1((t - 1.0) * log_beta) / torch.expm1(t * log_beta)
            deviation = g.to(m.dtype) - m_hat
            v.mul_(beta_2).add_(deviation.square_().mul_(weight), alpha=1.0 - beta_2)
            m.lerp_(g.to(m.dtype), 1.0 - beta_1)

    def operator(self, state: State) -> RankOneCorrectedDiagonal:
        """(1+s) diag(v̂)."""
        count = cast("list[Tensor]", state["count"])
        mean = bias_corrected(cast("list[Tensor]", state["mean"]), count, self.betas[0])
        variance = bias_corrected(cast("list[Tensor]", state["variance"]), count, self.betas[1])
        parts = [(m.square() / (v + self.eps)).sum() for m, v in zip(mean, variance, strict=True)]
        return RankOneCorrectedDiagonal(variance, 1.0 + vectors.total(vectors.completed(parts)))


estimators.add("gradient-variance", GradientVariance)
