"""Whether a layer computes what its rule says: proven on the graph, once for every layer.

Legend: u a random vector at the outputs z; a, g the rows of a layer's inputs and of the gradients at its output, for u;
J the derivative of z by the layer's [W, b].

Both factors rest on one fact: Σ g [a; 1]ᵀ = Jᵀ u. A forward hook that scales an output, a ``forward`` that was replaced
on the instance, or a rule with an error leaves the uses of the weight as they are, and breaks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from curvature.gradient_sweep import Sweep
from curvature.kronecker.layout import Layout
from curvature.kronecker.measurement import BlockCalls, ScaleCalls
from curvature.kronecker.operator import gather
from curvature.kronecker.rules import BlockCall
from curvature.loss_graph import LossGraph
from curvature.probes import probe
from curvature.vectors import compute_dtype


@dataclass
class _Product:
    """Σ g [a; 1]ᵀ of one block's calls so far, and the size of its terms."""

    total: Tensor
    power: Tensor
    roundoff: float


def refuse_other_products(
    graph: LossGraph,
    layout: Layout,
    used: Sequence[BlockCalls],
    scales: Sequence[ScaleCalls],
    readers: Mapping[Node, Sequence[tuple[Node, int]]],
    name: str,
) -> set[str]:
    """Raise where the rows of a layer do not multiply to the gradient that autograd gives it.

    Args:
        graph: of one loss.
        layout: the blocks.
        used: their calls, as they were recorded.
        scales: those of layers of scales and shifts.
        readers: of the graph.
        name: of the estimator.

    Returns:
        The layers of scales and shifts of which that is so; their diagonal can be had without a rule.

    Raises:
        RuntimeError: naming the block's layer and the remedy.

    Cost: a backward pass and the weights' gradients once more.
    """
    places: list[tuple[int, int]] = []
    products: list[_Product | None] = [None] * len(used)
    shifts: list[list[Tensor | None]] = [[None] * len(s.calls) for s in scales]
    edges = []
    for b, calls in enumerate(used):
        for k, call in enumerate(calls.calls):
            edges.append(call.edge)
            places.append((b, k))
    for s, scale in enumerate(scales):
        for k, call in enumerate(scale.calls):
            edges.append(call.edge)
            places.append((len(used) + s, k))
    if not edges:
        return set()

    def take(number: int, gradient: Tensor) -> None:
        b, k = places[number]
        if b < len(used):
            products[b] = with_call(products[b], used[b], used[b].calls[k], gradient)
        else:
            shifts[b - len(used)][k] = gradient

    u = probe([graph.output], 0x50F7, 0, "gaussian")[0].to(graph.output.dtype)
    asked = sorted(
        {i for calls in used for i in calls.block.members}
        | {i for s in scales for _, i in s.layer.parameters}
    )
    found = Sweep(edges, readers).run(graph.output, u, take, [graph.params[i] for i in asked])
    direct = [torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for p in graph.params]
    for i, g in zip(asked, found, strict=True):
        if g is not None:
            direct[i] = g.to_dense() if g.is_sparse else g
    for b, calls in enumerate(used):
        if calls.block.is_transposed:
            continue  # looked at with its head
        ours = products[b]
        other = calls.block.transposed
        theirs = products[b + 1] if other is not None else None
        total = None if ours is None else ours.total
        if theirs is not None:
            total = theirs.total.mT if total is None else total + theirs.total.mT
        parts = [p for p in (ours, theirs) if p is not None]
        expected = gather(calls.block, direct)
        if total is None:
            total = torch.zeros_like(expected)
        power = sum((p.power for p in parts), torch.zeros_like(expected.sum()))
        roundoff = max((p.roundoff for p in parts), default=torch.finfo(expected.dtype).eps)
        modules = (*calls.block.modules, *(other.modules if other is not None else ()))
        if not equal(total, expected, power, roundoff):
            names = ", ".join(repr(m) for m in modules)
            raise RuntimeError(
                f"{names} does not compute what its layer rule says: the rows that {name} reads do not multiply to the "
                "gradient of its weights. A forward hook that changes its output, a replaced forward or an error in a "
                f"rule of your own does that: remove it, or pass exclude=({modules[0]!r},) to treat the layer by the "
                "exact diagonal"
            )
    doubtful = set()
    for scale, gradients in zip(scales, shifts, strict=True):
        for of, i in scale.layer.parameters:
            terms = []
            for call, x, g in zip(scale.calls, scale.normalised, gradients, strict=True):
                if g is not None:
                    g = g.reshape(call.shape).to(compute_dtype(g.dtype))
                    product = g * x.to(g.dtype) if of == scale.layer.rule.scale else g
                    terms.append(scale.layer.rule.terms(call.module, product).reshape(-1, direct[i].numel()))
            total = sum((t.sum(0) for t in terms), torch.zeros_like(direct[i]).reshape(-1))
            power = sum((t.square().sum() for t in terms), torch.zeros_like(total.sum()))
            roundoff = torch.finfo(direct[i].dtype).eps
            if not equal(total, direct[i].reshape(-1), power, roundoff):
                doubtful.add(scale.layer.module)
    return doubtful


def with_call(before: _Product | None, used: BlockCalls, call: BlockCall, gradient: Tensor) -> _Product:
    """The product with one more call in it."""
    block = used.block
    g = block.rule.gradient_rows(call.module, gradient.reshape(call.shape))
    roundoff = max(torch.finfo(x.dtype).eps for x in (gradient, *call.inputs) if x.is_floating_point())
    g = g.reshape(g.shape[0], -1, g.shape[-1]).to(compute_dtype(g.dtype))
    if before is None:
        shape = (block.dims.groups, block.dims.d_out, block.size_in)
        before = _Product(g.new_zeros(shape), g.new_zeros(()), roundoff)
    into = before.total[call.at]
    size = torch.ones((), dtype=g.dtype, device=g.device)
    if block.diagonal_input:
        index = block.rule.input_rows(call.module, call.inputs).reshape(-1)
        kept = g[0] * (index >= 0).unsqueeze(-1)
        into[0].mT.index_add_(0, index.clamp(min=0), kept)
    elif block.weight is not None:
        a = block.rule.input_rows(call.module, call.inputs)
        a = a.reshape(a.shape[0], -1, a.shape[-1]).to(g.dtype)
        d = a.shape[-1]
        into[..., :d] += g.mT @ a
        size = a.square().sum(-1) + 1
    if block.bias is not None:
        into[..., -1] += g.sum(1)
    before.power = before.power + (g.square().sum(-1) * size).sum()
    before.roundoff = max(before.roundoff, roundoff)
    return before


def equal(ours: Tensor, theirs: Tensor, power: Tensor, roundoff: float) -> bool:
    """Whether two gradients are one up to rounding, measured against what was summed."""
    tolerance = 5 * max(roundoff, torch.finfo(theirs.dtype).eps) ** 0.6
    theirs = theirs.to(ours.dtype)
    scale = torch.maximum(torch.linalg.vector_norm(theirs), power.sqrt())
    return bool(torch.linalg.vector_norm(ours - theirs) <= tolerance * scale)
