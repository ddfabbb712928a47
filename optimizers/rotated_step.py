"""The step of curvature that is diagonal in a rotated basis, in place: SOAP's.

Legend: m the gradient's running mean, c its bias correction (1 where it has none), Q the basis, d the diagonal in it, λ
the damping, η the learning rate; u = Q (Qᵀm / (d + λ)) / c; θ ← (1-ηλ_wd) θ - η u.

Beside the products with Q, which nothing can spare, every element is read and written three times. The general path
(``core.py``) writes a dozen more vectors. The record of the step is formed when it is asked for, by the products anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from curvature.operators import MappedDiagonal
from curvature.rotated_diagonal import RotatedDiagonalOperator
from curvature.tensor_blocks import along
from optimizers.elementwise import correction
from optimizers.momentum import PlainMean, RunningMean, RunningMeanFromSecond
from trust_region import FixedRadius, Proposal, TrustRegion, Unbounded


def suits(
    operator: object,
    trust_region: TrustRegion,
    momentum: object,
    params: Sequence[Tensor],
    gradient: Sequence[Tensor | None],
    mean: Sequence[Tensor],
    damping: object,
) -> bool:
    """Whether this composition's step is the formula above, and d + λ is known to be positive.

    Exact types are asked for, since a subclass may compute something else.
    """
    if type(operator) is not RotatedDiagonalOperator or not isinstance(operator.spectrum, MappedDiagonal):
        return False
    if type(trust_region.region) is not Unbounded or type(trust_region.radius) is not FixedRadius:
        return False
    if trust_region.subproblem is not None or len(mean) != len(params):
        return False
    corrected = type(momentum) in (RunningMean, RunningMeanFromSecond)
    if not corrected and not (type(momentum) is PlainMean and not momentum.nesterov):
        return False
    least = operator.spectrum.least
    return (
        all(p.device.type == "cpu" for p in params)
        and all(g is not None and g.dtype == m.dtype for g, m in zip(gradient, mean, strict=True))
        and all(m.dtype == d.dtype for m, d in zip(mean, operator.like, strict=True))
        and least is not None
        and least + float(cast(Tensor, damping)) > 0
    )


def step_(
    operator: RotatedDiagonalOperator,
    momentum: object,
    params: Sequence[Tensor],
    gradient: Sequence[Tensor],
    mean: Sequence[Tensor],
    count: Sequence[Tensor],
    options: tuple[Sequence[float], Sequence[float | Tensor], Sequence[float]],
    damping: float,
) -> Callable[[], Proposal]:
    """Average the gradient and move the parameters, in place.

    Args:
        operator: Q and d.
        momentum: how the gradient is averaged.
        params: θ.
        gradient: g.
        mean: m.
        count: gradients seen before this one, 0-d a tensor; incremented.
        options: β, η and λ_wd of every tensor.
        damping: λ.

    Returns:
        what gives the proposal that was taken, from m, Q and d, which stay as they are until the next step.
    """
    torch._foreach_add_(list(count), 1.0)
    betas, rates, decays = options
    lr = [float(eta) for eta in rates]
    corrected, anew = isinstance(momentum, RunningMean), type(momentum) is RunningMeanFromSecond
    times = torch.stack(list(count)).tolist() if corrected else [0.0] * len(lr)
    held = [max(t - 1.0, 1.0) if anew else t for t in times]  # gradients that the mean holds
    c = [correction(t, b) if corrected else 1.0 for t, b in zip(held, betas, strict=True)]
    spectrum = cast(MappedDiagonal, operator.spectrum)
    for i, (p, g, m) in enumerate(zip(params, gradient, mean, strict=True)):
        if anew and times[i] == 2.0:
            m.zero_()
        m.lerp_(g, 1.0 - betas[i])
        if decays[i] != 0.0:
            p.mul_(1.0 - lr[i] * decays[i])
        d = torch.empty_like(spectrum.base[i])
        spectrum.put(spectrum.base[i], i, d)
        if damping != 0.0:
            d.add_(damping)
        for basis, block in zip(operator.bases[i], operator.blocks[i], strict=True):
            moved, part = p[block.index], m[block.index]
            if not basis:  # nothing is rotated
                moved.addcdiv_(part, d[block.index], value=-lr[i] / c[i])
                continue
            rotated = along(part, basis, transpose=True).div_(d[block.index])
            moved.add_(along(rotated, basis), alpha=-lr[i] / c[i])
    return lambda: _proposal(operator, mean, c, lr, damping)


def _proposal(
    operator: RotatedDiagonalOperator,
    mean: Sequence[Tensor],
    c: Sequence[float],
    lr: Sequence[float],
    damping: float,
) -> Proposal:
    """The record of the step that was taken: ⟨m̂, u⟩ is uᵀ(B + λI)u."""
    averaged = [m / x for m, x in zip(mean, c, strict=True)]
    u = operator.solve(averaged, damping)
    linear = torch.stack([torch.sum(a * b) for a, b in zip(averaged, u, strict=True)])
    squared = torch.stack([torch.sum(x * x) for x in u])
    eta = torch.tensor(lr, dtype=linear.dtype)
    parts = eta * linear - 0.5 * eta.square() * (linear - damping * squared)
    return Proposal(
        step=[],
        predicted_reduction=parts.sum(),
        step_norm=(eta.square() * squared).sum().sqrt(),
        on_boundary=torch.zeros((), dtype=torch.bool),
        predicted_parts=list(parts.unbind()),
    )
