"""Which sample a layer's rows belong to: proven on the graph, once for every use of a layer.

Legend: N samples along dim 0 of the outputs z; a row is a position of a layer. A row *feels* a sample where its
gradient is not zero when only that sample's outputs have one.

Whatever is sent back from all samples at once is right only where no row feels two of them: their terms would meet
in one product. Where rows are also counted by sample (uneven weights, ``sharing="reduce"``, EK-FAC) each must be the
row of the sample it is counted for. Shapes alone do not tell: (T, N) positions look like (N, T) ones where T = N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvature.kronecker.output_curvature import OutputCurvature
from curvature.loss_graph import LossGraph
from curvature.probes import generator

if TYPE_CHECKING:
    from curvature.kronecker.layout import Block
    from curvature.kronecker.measurement import BlockCalls, ScaleCalls
    from curvature.kronecker.rules import BlockCall


@dataclass(frozen=True)
class Rows:
    """The rows of one use of a layer.

    Args:
        edge: where their gradient is taken.
        rows: brings that gradient to rows, (N, R, d) or, where samples are not told apart, (1, R, d).
        by_sample: whether they are.
    """

    edge: GradientEdge
    rows: Callable[[Tensor], Tensor]
    by_sample: bool


def astray(graph: LossGraph, found: OutputCurvature, rows: Sequence[Rows], samples: int) -> set[int]:
    """The indices of the uses with a row that feels two samples, or another than the one it is counted for.

    Samples are divided by every bit of their number, so that any two are apart once, and each side is sent back.

    Cost: 2 ⌈log₂ N⌉ backward passes without weight gradients.
    """
    bad: set[int] = set()
    z = found.z
    numbers = torch.arange(samples, device=z.device)
    for bit in range((samples - 1).bit_length()):
        g = generator(0x5A3B, bit, z.device)
        probe = torch.randn(z.shape, generator=g, device=z.device, dtype=z.dtype)
        one = (numbers >> bit & 1).bool()
        felt: list[list[Tensor | None]] = []
        for side in (one, one.logical_not()):
            seed = probe * side.reshape(-1, *[1] * (z.dim() - 1))
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                graph.output,
                [r.edge for r in rows],
                found.layout.back(seed).to(graph.output.dtype),
                retain_graph=True,
                allow_unused=True,
            )
            felt.append(
                [
                    None if g is None else (r.rows(g) != 0).any(-1)
                    for r, g in zip(rows, gradients, strict=True)
                ]
            )
        for k, (r, here, there) in enumerate(zip(rows, *felt, strict=True)):
            if here is None or there is None:
                continue
            mixed = bool((here & there).any())
            if mixed or (r.by_sample and bool(here[~one].any() | there[one].any())):
                bad.add(k)
    return bad


@dataclass(frozen=True)
class Doubt:
    """A use whose rows are not proven yet.

    Args:
        key: under which the proof is remembered: the use, and how its rows are taken.
        rows: see there.
        others: the same by axes of the positions that may be the samples' in place of the first.
    """

    key: tuple[object, ...]
    rows: Rows
    others: dict[int, Rows] = field(default_factory=dict)


def doubts(
    used: Sequence[BlockCalls], scales: Sequence[ScaleCalls], samples: int, together: bool, by_sample: bool
) -> list[Doubt]:
    """What the proof is about.

    Args:
        used: the uses of all blocks.
        scales: those of layers of scales and shifts, whose squares are always taken by sample.
        samples: N.
        together: whether all samples are sent back at once, so that no row may feel two.
        by_sample: whether the blocks' rows are counted by sample too.
    """
    found = []
    if together or by_sample:
        for calls in used:
            for k, call in enumerate(calls.calls):
                rows = rows_of(calls.block, call, samples, by_sample)
                key = key_of(calls.block, call, k, rows)
                others = {
                    axis: rows_of(calls.block, replace(call, sample_axis=axis), samples, True)
                    for axis in other_axes(calls.block, call, samples)
                    if rows.by_sample
                }
                found.append(Doubt(key, rows, others))
    for scale in scales:
        for k, call in enumerate(scale.calls):
            found.append(
                Doubt(
                    ("scale", call.name, k, len(call.shape)),
                    Rows(call.edge, lambda g: g.reshape(samples, -1, 1), True),
                )
            )
    return found


def rows_of(block: Block, call: BlockCall, samples: int, by_sample: bool) -> Rows:
    """The rows of one use, told apart by sample where that is asked for and their number allows it."""
    groups = block.dims.groups if call.groups is None else call.groups[1] - call.groups[0]
    count = math.prod(call.shape) // (block.dims.d_out * groups)
    apart = by_sample and count % samples == 0

    def rows(gradient: Tensor) -> Tensor:
        g = call.gradient_rows(block.rule, gradient)
        return g.movedim(0, -2).reshape(samples if apart else 1, -1, g.shape[-1])

    return Rows(call.edge, rows, apart)


def other_axes(block: Block, call: BlockCall, samples: int) -> list[int]:
    """Axes of a use's positions but the first that are as long as there are samples."""
    like = torch.empty(call.shape, device="meta")
    lead = block.rule.gradient_rows(call.module, like).shape[1:-1]
    return [axis for axis in range(1, len(lead)) if lead[axis] == samples]


def key_of(block: Block, call: BlockCall, number: int, rows: Rows) -> tuple[object, ...]:
    """Under which the proof of a block's use is remembered."""
    return ("block", call.name, block.root, block.is_transposed, number, len(call.shape), rows.by_sample)


def with_axes(
    used: Sequence[BlockCalls],
    axes: Mapping[tuple[object, ...], int | None],
    samples: int,
    together: bool,
    by_sample: bool,
) -> list[BlockCalls]:
    """The uses, each with the axis of its positions that was found to be the samples'."""
    found = []
    for calls in used:
        moved = []
        for k, call in enumerate(calls.calls):
            axis = None
            if together or by_sample:
                axis = axes[key_of(calls.block, call, k, rows_of(calls.block, call, samples, by_sample))]
            moved.append(replace(call, sample_axis=axis) if axis else call)
        found.append(replace(calls, calls=tuple(moved)))
    return found


def prove(
    graph: LossGraph, found: OutputCurvature, asked: Sequence[Doubt], samples: int
) -> dict[tuple[object, ...], int | None]:
    """By key which axis of the positions is the samples': 0, another one, or ``None`` where none is.

    Cost: that of :func:`astray`, once more for every axis that is tried.
    """
    axes: dict[tuple[object, ...], int | None] = {}
    left = [(d, 0, d.rows) for d in asked]
    tried = 0
    while left:
        lost = astray(graph, found, [rows for _, _, rows in left], samples)
        again = []
        for k, (doubt, axis, _) in enumerate(left):
            axes[doubt.key] = None if k in lost else axis
            others = sorted(doubt.others)[tried : tried + 1]
            again += [(doubt, other, doubt.others[other]) for other in others if k in lost]
        left, tried = again, tried + 1
    return axes


def uneven(weights: Tensor) -> bool:
    """Whether samples or positions count differently in the loss."""
    return bool((weights - weights.mean()).abs().max() > 1e-4 * weights.abs().max())
