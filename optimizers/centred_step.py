"""Tadam's step on a CPU, block by block: a centred variance with a rank-one correction, in a box of gradients' size.

Legend: g the gradient, m its mean and v its variance (the curvature's), M the momentum, b the box's second moment, each
with its bias correction c = 1 - βᵗ; s = Σ m̂²/(v̂+ε); d the radius, η the learning rate;
u = -d M̂ / (max(d(1+s)v̂, √b̂) + ε); θ ← (1-ηλ)θ + ηu; a_i = -Σ M̂u and b_i = Σ v̂u² over tensor i, a = Σ a_i;
P = Σ_i η(a_i - ½(b_i + a_i a)).

Two passes, as in ``blocked.py``: take g into the state and form s; then, when the policy has looked at the loss, move.
The general path (``core.py``) writes ten vectors of the parameters' size for it. Scratch blocks hold everything here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from curvature import GradientVariance
from optimizers.blocked import Blocks, weighted
from optimizers.core import Composition
from optimizers.elementwise import correction
from optimizers.momentum import RunningMean
from trust_region import Proposal, RmsBox, StepContext, TadamRadius

if TYPE_CHECKING:
    from optimizers.step_paths import Held


def suits(composition: Composition, held: Held, gradient: Sequence[Tensor | None]) -> bool:
    """Whether this composition's step is the formula above, and its tensors lie as the blocks need them.

    Exact types are asked for, since a subclass may compute something else.
    """
    trust_region = composition.trust_region
    region = trust_region.region
    if type(composition.curvature) is not GradientVariance or type(composition.momentum) is not RunningMean:
        return False
    if (
        type(region) is not RmsBox
        or type(trust_region.radius) is not TadamRadius
        or trust_region.subproblem is not None
    ):
        return False
    if (
        region.rank_one_scale
        or not region.interior
        or region.scope != "global"
        or "damping" in held.region_state
    ):
        return False
    means = held.momentum_buffers()
    if len(means) != len(held.shards) or not any(p.numel() for p in held.shards):
        return False
    if len({m.dtype for m in means}) > 1:  # sums over all tensors, and scratch, have one precision
        return False
    lists = (means, *(_state(held, name) for name in ("mean", "variance", "box_second_moment")))
    return all(
        g is not None
        and p.device.type == "cpu"
        and p.is_contiguous()
        and g.is_contiguous()
        and all(x.is_contiguous() and x.dtype == g.dtype for x in kept)
        for p, g, *kept in zip(held.shards, gradient, *lists, strict=True)
    )


def _state(held: Held, name: str) -> list[Tensor]:
    state = held.region_state if name.startswith("box") else held.curvature_state
    return cast("list[Tensor]", state[name])


def step_(composition: Composition, held: Held, gradient: Sequence[Tensor], loss: Tensor | None) -> Proposal:
    """Take g into the state, let the policy see ℓ, and move the parameters, in place.

    Returns:
        the record of the step that was taken, for the policy's review.
    """
    curvature = cast(GradientVariance, composition.curvature)
    region, policy = cast(RmsBox, composition.trust_region.region), composition.trust_region.radius
    means = held.momentum_buffers()
    blocks = Blocks.of(held.shards)
    names = ("mean", "variance", "box_second_moment")
    m, v, b = (blocks.views(_state(held, name)) for name in names)
    p, g, M = (blocks.views(x) for x in (held.shards, gradient, means))
    scratch = torch.empty(2, max(stop - start for start, stop in blocks.bounds), dtype=means[0].dtype)
    (beta_1, beta_2), eps = curvature.betas, curvature.eps
    counted = [*held.steps, *_state(held, "count"), *_state(held, "box_count")]
    torch._foreach_add_(counted, 1.0)
    of_mean, of_curvature, of_box = torch.stack(counted).double().view(3, -1).tolist()
    betas = held.each("momentum")

    sums, weights = [], []
    for k, i in enumerate(blocks.owner):
        t, x = of_curvature[i], scratch[0, : g[k].numel()]
        torch.add(g[k], m[k], alpha=-1.0 / correction(max(t - 1.0, 1.0), beta_1), out=x)
        # (β₂-β₂ᵗ)/(1-β₂ᵗ): 0 in the first step, where there is no mean to centre on
        weight = beta_2 * correction(t - 1.0, beta_2) / correction(t, beta_2)
        v[k].mul_(beta_2).addcmul_(x, x, value=(1.0 - beta_2) * weight)
        m[k].lerp_(g[k], 1.0 - beta_1)
        M[k].lerp_(g[k], 1.0 - betas[i])
        b[k].mul_(region.beta).addcmul_(g[k], g[k], value=1.0 - region.beta)
        torch.mul(v[k], 1.0 / correction(t, beta_2), out=x).add_(eps)
        sums.append(torch.dot(m[k], torch.div(m[k], x, out=x)))
        weights.append(correction(t, beta_1) ** -2)
    scale = 1.0 + float(weighted(sums, weights))

    lr, decay = [float(eta) for eta in held.each("lr")], held.each("weight_decay")
    policy.prepare(held.region_state, StepContext(loss=loss))  # type: ignore[attr-defined]
    d = float(cast(Tensor, held.region_state["radius"]))
    linear, spread, norms, along, across = [], [], [], [], []
    inside = torch.zeros((), dtype=torch.int64)
    for k, i in enumerate(blocks.owner):
        size = g[k].numel()
        x, u = scratch[0, :size], scratch[1, :size]
        c_mean, c_v = correction(of_mean[i], betas[i]), correction(of_curvature[i], beta_2)
        torch.mul(b[k], 1.0 / correction(of_box[i], region.beta), out=x).sqrt_()
        torch.mul(v[k], d * scale / c_v, out=u)
        inside += torch.count_nonzero(u > x)
        torch.maximum(u, x, out=x).add_(region.eps)
        torch.div(M[k], x, out=u).mul_(-d / c_mean)
        if decay[i] != 0.0:
            p[k].mul_(1.0 - lr[i] * decay[i])
        p[k].add_(u, alpha=lr[i])
        linear.append(torch.dot(M[k], u))
        along.append(-1.0 / c_mean)
        norms.append(torch.dot(u, u))
        spread.append(torch.dot(torch.mul(v[k], u, out=x), u))
        across.append(1.0 / c_v)
    return _proposal(blocks, lr, (linear, along), (spread, across), norms, inside, scratch.dtype)


def _proposal(
    blocks: Blocks,
    lr: Sequence[float],
    linear: tuple[list[Tensor], list[float]],
    spread: tuple[list[Tensor], list[float]],
    norms: list[Tensor],
    inside: Tensor,
    dtype: torch.dtype,
) -> Proposal:
    """P and what else the record says, from the sums over blocks."""
    owner = torch.tensor(blocks.owner)
    a, b = (
        torch.zeros(len(lr), dtype=torch.float64).index_add_(
            0, owner, torch.stack(sums).double() * torch.tensor(weights, dtype=torch.float64)
        )
        for sums, weights in (linear, spread)
    )
    eta = torch.tensor(lr, dtype=torch.float64)
    parts = (eta * (a - 0.5 * (b + a * a.sum()))).to(dtype)
    squared = weighted(norms, [lr[i] ** 2 for i in blocks.owner])
    size = sum(stop - start for start, stop in blocks.bounds)
    fraction = inside.to(dtype) / size
    return Proposal(
        step=[],
        predicted_reduction=parts.sum(),
        step_norm=torch.as_tensor(math.sqrt(float(squared)), dtype=dtype),
        on_boundary=fraction < 1.0,
        predicted_parts=list(parts.unbind()),
        diagnostics={"fisher_active_fraction": fraction},
    )
