"""The step of K-FAC with formed inverses inside a KL ellipsoid of fixed size, in place.

Legend: m the running mean of gradients, c its bias correction, P the damped inverse, s = P m, so that u = s / c solves
for m̂ = m / c; η the learning rate, Δ the radius; E = η² ⟨m̂, u⟩ the step's length in the metric of P⁻¹ (the KL clip),
f = min(1, √(Δ / E)); θ ← (1-ηλ_wd) θ - η f u.

Beside the solve every element is read three times and written twice. The general path (``core.py``) writes a dozen
vectors of the same numbers, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.kronecker.gradient_rows import GradientRows
from curvature.kronecker.inverses import FactoredKroneckerOperator
from optimizers import row_solves
from optimizers.elementwise import correction
from trust_region import FixedRadius, KLBall, Proposal, TrustRegion

if TYPE_CHECKING:
    from optimizers.step_paths import Held


def suits(
    operator: object,
    trust_region: TrustRegion,
    momentum: object,
    held: Held,
    gradient: Sequence[Tensor | None],
) -> bool:
    """Whether this composition's step is the formula above, with one η and one c a block, in one precision on a CPU.

    Exact types are asked for, since a subclass may compute something else.
    """
    region = trust_region.region
    if type(operator) is not FactoredKroneckerOperator or not row_solves.suits(momentum):
        return False
    if type(region) is not KLBall or not (region.includes_lr and region.includes_damping):
        return False
    if type(trust_region.radius) is not FixedRadius or trust_region.subproblem is not None:
        return False
    means = held.momentum_buffers()
    if not means:
        return False
    plain = all(
        p.device.type == "cpu" and p.dtype == m.dtype and g is not None and g.dtype == m.dtype
        for p, g, m in zip(held.shards, gradient, means, strict=True)
    )
    if not plain or len({float(eta) for eta in held.each("lr")}) != 1:
        return False
    betas, counts = held.each("momentum"), torch.stack(held.steps).tolist()
    if any(isinstance(b, Tensor) for b in betas):
        return False
    alike = [{(betas[i], counts[i]) for i in block.block.members} for block in operator.factorblocks]
    return all(len(own) == 1 for own in alike)


def step_(
    operator: FactoredKroneckerOperator,
    momentum: object,
    held: Held,
    gradient: Sequence[Tensor],
    rows: Mapping[int, GradientRows],
) -> Callable[[], Proposal]:
    """Average the gradient and move the parameters, in place.

    Args:
        operator: B.
        momentum: how the gradient is averaged.
        held: what the optimizer holds.
        gradient: g.
        rows: g as products of rows, for some blocks.

    Returns:
        what gives the proposal that was taken.
    """
    torch._foreach_add_(held.steps, 1.0)
    means, betas, eta = held.momentum_buffers(), held.each("momentum"), float(held.each("lr")[0])
    if len(set(betas)) == 1:
        torch._foreach_lerp_(means, list(gradient), 1.0 - betas[0])
    else:
        for m, g, beta in zip(means, gradient, betas, strict=True):
            m.lerp_(g, 1.0 - beta)
    c = [correction(t, b) for t, b in zip(torch.stack(held.steps).tolist(), betas, strict=True)]
    prepared = row_solves.prepared(operator, momentum, held, gradient, means, rows, corrected=False)
    s = prepared.solve(means, cast(Tensor, held.region_state["damping"]))
    row_solves.keep(prepared, held)
    products = torch.stack(vectors.dots(means, s)).tolist()
    inner = [product / x**2 for product, x in zip(products, c, strict=True)]  # ⟨m̂, u⟩
    energy, bound = eta**2 * max(sum(inner), 0.0), float(cast(Tensor, held.region_state["radius"]))
    factor = 1.0 if energy <= bound else math.sqrt(bound / energy)
    for p, decay in zip(held.shards, held.each("weight_decay"), strict=True):
        if decay != 0.0:
            p.mul_(1.0 - eta * decay)
    if len(set(c)) == 1:
        torch._foreach_add_(held.shards, s, alpha=-eta * factor / c[0])
    else:
        for p, x, correct in zip(held.shards, s, c, strict=True):
            p.add_(x, alpha=-eta * factor / correct)
    lengths = [n / x for n, x in zip(torch.stack(torch._foreach_norm(s)).tolist(), c, strict=True)]
    like, scale = means[0], eta * factor

    def proposal() -> Proposal:
        parts = [like.new_tensor(scale * a - 0.5 * scale**2 * a) for a in inner]
        return Proposal(
            step=[],
            predicted_reduction=torch.stack(parts).sum(),
            step_norm=like.new_tensor(scale * math.hypot(*lengths)),
            on_boundary=torch.tensor(factor < 1.0),
            predicted_parts=parts,
        )

    return proposal
