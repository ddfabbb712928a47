"""The elementwise step on a CPU without a compiler: block by block, so that intermediate vectors stay in cache.

Fresh temporaries of a tensor's size cost a CPU more than the arithmetic: they are mapped, faulted in and streamed
through memory. Here every tensor is cut into blocks, the state is updated in place, and two scratch blocks hold
everything else. Two passes over memory: update m and v and form the sums; then step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from optimizers.elementwise import Formula, correction, predicted_parts, proposal_of
from trust_region import Proposal
from trust_region.rms_box import rank_one_scale

BLOCK = 1 << 17
"""Elements a block: scratch of half a megabyte stays in the second-level cache, and calls are few."""


@dataclass
class Blocks:
    """Views of lists of tensors, cut alike.

    Args:
        owner: which tensor each block belongs to.
        bounds: where it begins and ends in that tensor.
    """

    owner: list[int] = field(default_factory=list)
    bounds: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Blocks:
        """Cut every tensor into blocks of at most :data:`BLOCK` elements."""
        blocks = cls()
        for i, x in enumerate(tensors):
            for start in range(0, x.numel(), BLOCK):
                blocks.owner.append(i)
                blocks.bounds.append((start, min(start + BLOCK, x.numel())))
        return blocks

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The blocks of ``tensors``, which must be contiguous."""
        flat = [x.view(-1) for x in tensors]
        return [flat[i][a:b] for i, (a, b) in zip(self.owner, self.bounds, strict=True)]


@dataclass(frozen=True)
class Inputs:
    """One step's tensors, all with a gradient, contiguous, on one CPU, and what applies to each of them."""

    params: Sequence[Tensor]
    gradient: Sequence[Tensor]
    mean: Sequence[Tensor]
    second_moment: Sequence[Tensor]
    count: Sequence[float]
    beta_1: Sequence[float]
    lr: Sequence[float]
    weight_decay: Sequence[float]


def suits(params: Sequence[Tensor], gradient: Sequence[Tensor | None], state: Sequence[Tensor]) -> bool:
    """Whether the step can run block by block."""
    dtype = state[0].dtype
    return (
        any(p.numel() for p in params)
        and all(g is not None and g.is_contiguous() and g.dtype == dtype for g in gradient)
        and all(p.device.type == "cpu" and p.is_contiguous() for p in params)
        and all(x.is_contiguous() and x.dtype == dtype for x in state)
    )


def inputs_of(
    params: Sequence[Tensor],
    gradient: Sequence[Tensor | None],
    mean: Sequence[Tensor],
    second_moment: Sequence[Tensor],
    counts: Sequence[list[Tensor]],
    options: tuple[Sequence[float], Sequence[float | Tensor], Sequence[float]],
) -> Inputs | None:
    """One step's inputs, counted; ``None``, and nothing counted, where the tensors do not suit.

    Args:
        params: θ.
        gradient: g, ``None`` where a parameter has none.
        mean: m.
        second_moment: v.
        counts: of the gradients that m and v have taken in, 0-d a tensor; incremented.
        options: β₁, η and λ of every tensor.
    """
    if not suits(params, gradient, [*mean, *second_moment]):
        return None
    for count in counts:
        torch._foreach_add_(count, 1.0)
    beta_1, lr, weight_decay = options
    steps = [float(t) for t in counts[0]]
    rates = [float(eta) for eta in lr]
    return Inputs(
        params, cast("Sequence[Tensor]", gradient), mean, second_moment, steps, beta_1, rates, weight_decay
    )


def step_(formula: Formula, x: Inputs, radius: float, policy: object) -> Proposal:
    """Update the moments and move the parameters, in place.

    Args:
        formula: the composition's constants.
        x: the step's tensors; counts include this step.
        radius: d.
        policy: whose prediction is reported.
    """
    blocks = Blocks.of(x.params)
    g, m, v = blocks.views(x.gradient), blocks.views(x.mean), blocks.views(x.second_moment)
    c_1 = [correction(t, b) for t, b in zip(x.count, x.beta_1, strict=True)]
    c_2 = [correction(t, formula.beta_2) for t in x.count]
    squares, masses = [], []
    for k, i in enumerate(blocks.owner):
        m[k].lerp_(g[k], 1.0 - x.beta_1[i])
        v[k].mul_(formula.beta_2).addcmul_(g[k], g[k], value=1.0 - formula.beta_2)
        if formula.needs_sums:
            squares.append(torch.dot(m[k], m[k]) / c_1[i] ** 2)
            masses.append(v[k].sum() / c_2[i])
    size = sum(p.numel() for p in x.params)
    scale = 1.0
    if formula.needs_sums:
        mass = torch.stack(masses).sum() + formula.eps * size
        scale = float(rank_one_scale(torch.stack(squares).sum(), mass))
    return _move_(formula, x, blocks, m, v, c_1, c_2, scale, radius, policy)


def _move_(
    formula: Formula,
    x: Inputs,
    blocks: Blocks,
    m: list[Tensor],
    v: list[Tensor],
    c_1: list[float],
    c_2: list[float],
    scale: float,
    d: float,
    policy: object,
) -> Proposal:
    """The second pass: θ ← (1-ηλ)θ - ηu, with the sums that the prediction needs."""
    p = blocks.views(x.params)
    dtype = x.mean[0].dtype
    largest = max(b - a for a, b in blocks.bounds)
    scratch = torch.empty(2, largest, dtype=dtype)
    linear, quadratic, norms, inside = [], [], [], []
    for k, i in enumerate(blocks.owner):
        curved, rms = scratch[0, : m[k].numel()], scratch[1, : m[k].numel()]
        torch.mul(v[k], 1.0 / c_2[i], out=curved)
        torch.sqrt(curved, out=rms)
        if formula.interior:
            curved.mul_(d * scale)
            inside.append(torch.count_nonzero(curved > rms))
            torch.maximum(curved, rms, out=rms)
        u = torch.div(m[k], rms.add_(formula.eps), out=rms)  # times d/c₁
        factor = d / c_1[i]
        linear.append(torch.dot(m[k], u) * (factor / c_1[i]))
        quadratic.append(torch.dot(torch.mul(v[k], u, out=curved), u) * (factor * factor / c_2[i]))
        norms.append(torch.dot(u, u) * (factor * x.lr[i]) ** 2)
        if x.weight_decay[i] != 0.0:
            p[k].mul_(1.0 - x.lr[i] * x.weight_decay[i])
        p[k].add_(u, alpha=-x.lr[i] * factor)
    owner = torch.tensor(blocks.owner)
    sums = torch.zeros(2, len(x.params), dtype=dtype)
    sums[0].index_add_(0, owner, torch.stack(linear))
    sums[1].index_add_(0, owner, torch.stack(quadratic))
    parts = predicted_parts(policy, sums[0], sums[1], x.lr, scale)
    live = torch.stack(inside).sum().to(dtype) if inside else torch.zeros((), dtype=dtype)
    return proposal_of(parts, torch.stack(norms).sum(), live, sum(q.numel() for q in x.params))
