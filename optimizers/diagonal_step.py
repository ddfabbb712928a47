"""The step of a diagonal curvature on a CPU, block by block: Sophia's, AdaHessian's, and their like.

Legend: m the gradient's running mean, c its bias correction (1 where it has none), h the diagonal, λ the damping, r the
radius, η the learning rate; u = (m/c) / (h + λ), within a box clipped to [-r, r]; θ ← (1-ηλ_wd) θ - η u.

The general path (``core.py``) writes a dozen vectors of the parameters' size, each of which costs a CPU more than the
arithmetic. Here scratch blocks hold everything, as in ``blocked.py``, and h itself is formed a block at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from curvature.operators import DiagonalOperator, MappedDiagonal
from optimizers.blocked import Blocks
from optimizers.elementwise import correction
from optimizers.momentum import PlainMean, RunningMean
from trust_region import Box, FixedRadius, Proposal, TrustRegion, Unbounded


def suits(
    operator: object,
    trust_region: TrustRegion,
    momentum: object,
    params: Sequence[Tensor],
    gradient: Sequence[Tensor | None],
    mean: Sequence[Tensor],
    damping: object,
) -> bool:
    """Whether this composition's step is the formula above, and its tensors lie as the blocks need them.

    Exact types are asked for, since a subclass may compute something else. Every h + λ must be known to be positive:
    other curvature is the general path's to answer, or to refuse.
    """
    if not isinstance(operator, DiagonalOperator) or trust_region.subproblem is not None:
        return False
    if type(trust_region.region) not in (Unbounded, Box) or type(trust_region.radius) is not FixedRadius:
        return False
    if type(momentum) is not RunningMean and not (type(momentum) is PlainMean and not momentum.nesterov):
        return False
    base = operator.base if isinstance(operator, MappedDiagonal) else operator.values
    if len(mean) != len(params) or not any(p.numel() for p in params):
        return False
    lies = all(
        g is not None
        and p.device.type == "cpu"
        and all(x.is_contiguous() for x in (p, g, m, h))
        and g.dtype == m.dtype == h.dtype
        for p, g, m, h in zip(params, gradient, mean, base, strict=True)
    )
    if not lies:
        return False
    damping = float(cast(Tensor, damping))
    if isinstance(operator, MappedDiagonal):
        return operator.least is not None and operator.least + damping > 0
    return all(bool(h.amin() + damping > 0) for h in base if h.numel())


def step_(
    operator: DiagonalOperator,
    trust_region: TrustRegion,
    momentum: object,
    params: Sequence[Tensor],
    gradient: Sequence[Tensor],
    mean: Sequence[Tensor],
    count: Sequence[Tensor],
    options: tuple[Sequence[float], Sequence[float | Tensor], Sequence[float]],
    limits: tuple[float, float],
) -> Proposal:
    """Average the gradient and move the parameters, in place.

    Args:
        operator: of h.
        trust_region: with a box, or without a region.
        momentum: how the gradient is averaged.
        params: θ.
        gradient: g.
        mean: m.
        count: gradients seen before this one, 0-d a tensor; incremented.
        options: β, η and λ_wd of every tensor.
        limits: r and λ.
    """
    torch._foreach_add_(list(count), 1.0)
    betas, rates, decays = options
    lr = [float(eta) for eta in rates]
    corrected = type(momentum) is RunningMean
    c = [correction(float(t), b) if corrected else 1.0 for t, b in zip(count, betas, strict=True)]
    radius, damping = limits
    boxed = type(trust_region.region) is Box
    blocks = Blocks.of(params)
    change = operator.change_ if isinstance(operator, MappedDiagonal) else None
    base = operator.base if isinstance(operator, MappedDiagonal) else operator.values
    p, g, m, h = (blocks.views(x) for x in (params, gradient, mean, base))
    scratch = torch.empty(2, max(b - a for a, b in blocks.bounds), dtype=mean[0].dtype)
    linear, quadratic, norms, extremes = [], [], [], []
    for k, i in enumerate(blocks.owner):
        size = m[k].numel()
        curved, u = scratch[0, :size], scratch[1, :size]
        m[k].lerp_(g[k], 1.0 - betas[i])
        curved.copy_(h[k])
        if change is not None:
            curved = change(curved, i)
        if damping != 0.0:
            curved.add_(damping)
        torch.div(m[k], curved, out=u)
        if c[i] != 1.0:
            u.mul_(1.0 / c[i])
        squared = torch.dot(u, u) if not boxed else None
        if boxed:
            extremes += list(torch.aminmax(u))
            u.clamp_(min=-radius, max=radius)
            squared = torch.dot(u, u)
        along = torch.dot(m[k], u) / c[i]
        # Without a box (h + λ) u = m/c.
        bent = torch.dot(curved.mul_(u), u) if boxed else along
        linear.append(along)
        quadratic.append(bent - damping * cast(Tensor, squared))
        norms.append(cast(Tensor, squared) * lr[i] ** 2)
        if decays[i] != 0.0:
            p[k].mul_(1.0 - lr[i] * decays[i])
        p[k].add_(u, alpha=-lr[i])
    owner = torch.tensor(blocks.owner)
    eta = torch.tensor(lr, dtype=scratch.dtype)
    sums = torch.zeros(2, len(params), dtype=scratch.dtype)
    sums[0].index_add_(0, owner, torch.stack(linear))
    sums[1].index_add_(0, owner, torch.stack(quadratic))
    parts = eta * sums[0] - 0.5 * eta.square() * sums[1]
    outside = torch.stack(extremes).abs().amax() >= radius if boxed else torch.zeros((), dtype=torch.bool)
    return Proposal(
        step=[],
        predicted_reduction=parts.sum(),
        step_norm=torch.stack(norms).sum().sqrt(),
        on_boundary=outside,
        predicted_parts=list(parts.unbind()),
    )
