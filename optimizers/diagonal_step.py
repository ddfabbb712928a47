"""The step of a diagonal curvature on a CPU, block by block: Sophia's, AdaHessian's, and their like.

Legend: m the gradient's running mean, c its bias correction (1 where it has none), h the diagonal, λ the damping, r the
radius, η the learning rate; u = (m/c) / (h + λ), within a box clipped to [-r, r]; θ ← (1-ηλ_wd) θ - η u.

The general path (``core.py``) writes a dozen vectors of the parameters' size, each of which costs a CPU more than the
arithmetic. Here scratch blocks hold everything, as in ``blocked.py``, and h itself is formed a block at a time. What
the step's record says (the predicted reduction, the step's length) takes as many passes over a block as the step
itself, so it is formed when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from curvature import AdaHessianDiagonal, FlooredDiagonal, HutchinsonDiagonal
from curvature.measured_diagonal import MeasuredDiagonal
from curvature.operators import DiagonalOperator, MappedDiagonal
from curvature.wrapped_diagonal import RootDiagonal
from optimizers.blocked import Blocks
from optimizers.compiled.native_diagonal import NativeDiagonal, Numbers
from optimizers.core import Composition
from optimizers.elementwise import correction
from optimizers.momentum import PlainMean, RunningMean
from trust_region import Box, FixedRadius, Proposal, TrustRegion, Unbounded


def has_native_pass(composition: Composition) -> bool:
    """Whether steps of this composition are one native pass, whatever its tensors: a diagonal that is never negative.

    Exact types are asked for, since a subclass may compute something else.
    """
    curvature, trust_region, momentum = composition.curvature, composition.trust_region, composition.momentum
    if type(curvature) is AdaHessianDiagonal:
        known = curvature.power == 1.0
    else:
        wraps = type(curvature) in (FlooredDiagonal, RootDiagonal)
        known = wraps and isinstance(
            curvature.estimator,  # type: ignore[attr-defined]
            (MeasuredDiagonal, HutchinsonDiagonal),
        )
    if not known or trust_region.subproblem is not None or getattr(curvature, "evaluates_gradients", False):
        return False
    if type(trust_region.region) not in (Unbounded, Box) or type(trust_region.radius) is not FixedRadius:
        return False
    averaged = type(momentum) is RunningMean or (type(momentum) is PlainMean and not momentum.nesterov)
    return averaged and momentum.beta > 0.0  # type: ignore[union-attr]


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
    native: NativeDiagonal | None = None,
) -> Callable[[], Proposal]:
    """Average the gradient and move the parameters, in place; the record of it is formed where it is asked for.

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
        native: the pass that takes it where it can; ``None`` takes it in blocks.

    Returns:
        what gives the proposal that was taken, from m and h, which stay as they are until the next step.
    """
    torch._foreach_add_(list(count), 1.0)
    betas, rates, decays = options
    lr = [float(eta) for eta in rates]
    corrected = type(momentum) is RunningMean
    times = torch.stack(list(count)).tolist() if corrected else [0.0] * len(lr)
    c = [correction(t, b) if corrected else 1.0 for t, b in zip(times, betas, strict=True)]
    radius, damping = limits
    boxed = type(trust_region.region) is Box
    if native is not None and native.serves(operator, params, mean):
        reach = radius if boxed else math.inf
        native.step_(operator, params, gradient, mean, Numbers(betas, lr, decays, c, reach, damping))
        return lambda: _proposal(_Direction(operator, Blocks.of(params), mean, c, damping), boxed, lr, radius)
    direction = _Direction(operator, Blocks.of(params), mean, c, damping)
    blocks = direction.blocks
    p, g = blocks.views(params), blocks.views(gradient)
    for k, i in enumerate(blocks.owner):
        direction.m[k].lerp_(g[k], 1.0 - betas[i])
        if decays[i] != 0.0:
            p[k].mul_(1.0 - lr[i] * decays[i])
        if boxed:
            _, u = direction.at(k)
            p[k].add_(u.clamp_(min=-radius, max=radius), alpha=-lr[i])
        else:
            p[k].addcdiv_(direction.m[k], direction.denominator(k), value=-lr[i] / c[i])
    return lambda: _proposal(direction, boxed, lr, radius)


class _Direction:
    """u = (m/c) / (h + λ), a block at a time, in scratch memory."""

    def __init__(
        self,
        operator: DiagonalOperator,
        blocks: Blocks,
        mean: Sequence[Tensor],
        c: Sequence[float],
        damping: float,
    ) -> None:
        self.put = operator.put if isinstance(operator, MappedDiagonal) else None
        base = operator.base if isinstance(operator, MappedDiagonal) else operator.values
        self.blocks, self.c, self.damping = blocks, c, damping
        self.m, self.h = blocks.views(mean), blocks.views(base)
        self.scratch = torch.empty(2, max(b - a for a, b in blocks.bounds), dtype=mean[0].dtype)

    def denominator(self, k: int) -> Tensor:
        """h + λ of a block; h itself where nothing is to be done to it."""
        h, curved = self.h[k], self.scratch[0, : self.h[k].numel()]
        if self.put is not None:
            self.put(h, self.blocks.owner[k], curved)
            return curved.add_(self.damping) if self.damping != 0.0 else curved
        return torch.add(h, self.damping, out=curved) if self.damping != 0.0 else h

    def at(self, k: int) -> tuple[Tensor, Tensor]:
        """h + λ and u of a block."""
        curved, i = self.denominator(k), self.blocks.owner[k]
        u = torch.div(self.m[k], curved, out=self.scratch[1, : curved.numel()])
        return curved, u.mul_(1.0 / self.c[i]) if self.c[i] != 1.0 else u


def _proposal(direction: _Direction, boxed: bool, lr: Sequence[float], radius: float) -> Proposal:
    """The sums over the step that was taken."""
    linear, quadratic, norms, extremes = [], [], [], []
    blocks, damping, scratch = direction.blocks, direction.damping, direction.scratch
    for k, i in enumerate(blocks.owner):
        curved, u = direction.at(k)
        if boxed:
            extremes += list(torch.aminmax(u))
            u.clamp_(min=-radius, max=radius)
        squared = torch.dot(u, u)
        along = torch.dot(direction.m[k], u) / direction.c[i]
        # Without a box (h + λ) u = m/c.
        bent = torch.dot(torch.mul(curved, u, out=scratch[0, : u.numel()]), u) if boxed else along
        linear.append(along)
        quadratic.append(bent - damping * squared)
        norms.append(squared * lr[i] ** 2)
    tensors = len(lr)
    owner = torch.tensor(blocks.owner)
    eta = torch.tensor(lr, dtype=scratch.dtype)
    sums = torch.zeros(2, tensors, dtype=scratch.dtype)
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
