"""The compositions whose step is one formula an element: what the fast paths take, and the numbers they share.

Legend: g the gradient, m and v the running means of g and g², c₁ and c₂ their bias corrections 1 - βᵗ, d the radius,
s = Σm̂²/Σ(v̂+ε), u the step downhill at learning rate 1, η the learning rate.

SOAA, Adam and AdamW are of this kind: beside two global sums every element's step depends on that element alone. The
general path (``core.py``) writes every intermediate vector to memory; the paths built on this file do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature import EmpiricalFisherDiagonal
from optimizers.momentum import RunningMean
from trust_region import FixedRadius, Proposal, RmsBox, SOAARadius, TrustRegion


@dataclass(frozen=True)
class Formula:
    """The constants of the step: θ ← (1-ηλ)θ - η u, u = d m̂ / (max(d (1+s) v̂, √v̂) + ε).

    Args:
        beta_2: decay of v.
        eps: ε.
        interior: whether the first branch of the maximum exists (Adam's does not).
        rank_one_scale: whether s is formed, or 0.
        lags: whether the step takes the s of the step before.
    """

    beta_2: float
    eps: float
    interior: bool
    rank_one_scale: bool
    lags: bool = False

    @property
    def needs_sums(self) -> bool:
        """Whether the step of an element waits for sums over all of them."""
        return self.interior and self.rank_one_scale and not self.lags


def formula_of(curvature: object, trust_region: TrustRegion, momentum: object) -> Formula | None:
    """The formula of a composition, or ``None`` where it is not of this kind.

    Exact types are asked for, since a subclass may compute something else.
    """
    region, policy = trust_region.region, trust_region.radius
    if type(curvature) is not EmpiricalFisherDiagonal or curvature.samples != "batch":
        return None
    if type(region) is not RmsBox or region.scope != "global" or trust_region.subproblem is not None:
        return None
    if type(policy) is FixedRadius and policy.damping != 0.0:
        return None
    if type(policy) not in (FixedRadius, SOAARadius) or type(momentum) is not RunningMean:
        return None
    return Formula(curvature.beta, region.eps, region.interior, region.rank_one_scale, region.lags)


def correction(count: float, beta: float) -> float:
    """1 - βᵗ, on the host."""
    return 1.0 if beta == 0.0 else -math.expm1(count * math.log(beta))


def predicted_parts(
    policy: object, linear: Tensor, quadratic: Tensor, lr: Sequence[float | Tensor], scale: Any
) -> list[Tensor]:
    """The predicted reduction of every tensor from ⟨m̂,u⟩ and ⟨v̂,u²⟩, by the policy's own rule."""
    rows = list(zip(lr, linear.unbind(), quadratic.unbind(), strict=True))
    if isinstance(policy, SOAARadius):
        return policy.predicted_from([r[1] for r in rows], [r[2] for r in rows], lr, [scale] * len(rows))
    return [eta * a - 0.5 * eta * eta * b for eta, a, b in rows]


PREDICTIONS = ("model without s", "paper", "model")
"""What q is in the predicted reduction η⟨m̂,u⟩ - q⟨v̂,u²⟩: ½η², ½η or ½η²(1+s)."""


def prediction_of(policy: object) -> int:
    """Which of :data:`PREDICTIONS` a policy divides by."""
    if not isinstance(policy, SOAARadius):
        return 0
    return 1 if policy.prediction == "paper" else 2


def quadratic_weight(policy: object, lr: Tensor, scale: Tensor | float) -> Tensor:
    """q of the predicted reduction that :func:`predicted_parts` gives, for every η."""
    return (0.5 * lr * lr, 0.5 * lr, 0.5 * lr * lr * scale)[prediction_of(policy)]


def proposal_of(parts: list[Tensor], squared_norm: Tensor, inside: Tensor, size: int) -> Proposal:
    """The record of a step that was taken without being written down."""
    fraction = inside / max(size, 1)
    return Proposal(
        step=[],
        predicted_reduction=torch.stack(parts).sum(),
        step_norm=squared_norm.sqrt(),
        on_boundary=fraction < 1.0,
        predicted_parts=parts,
        diagnostics={"fisher_active_fraction": fraction},
    )
