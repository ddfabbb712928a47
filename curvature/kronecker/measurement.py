"""What one loss saw of every block: the uses of its weight, and the sums over inputs.

Legend: see :mod:`curvature.kronecker.factors` and :mod:`curvature.kronecker.fisher`. Everything returned is additive in
the loss: A = Σ w a aᵀ, mass = Σ w, G = Σ g gᵀ, diagonal = Σ_n (∂/∂θ)².
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from curvature.kronecker import factors
from curvature.kronecker.factors import Sharing
from curvature.kronecker.layout import Block, Layout, ScaleLayer
from curvature.kronecker.output_curvature import OutputCurvature
from curvature.kronecker.rules import BlockCall
from curvature.kronecker.spare import Spare
from curvature.layer_io import Trace
from curvature.room import Room
from curvature.vectors import compute_dtype


@dataclass(frozen=True)
class BlockCalls:
    """Every use of a block's weight in one loss."""

    block: Block
    calls: tuple[BlockCall, ...]

    def by_groups(self) -> list[list[int]]:
        """Indices of calls that address the same groups."""
        alike: dict[tuple[int, int] | None, list[int]] = {}
        for k, call in enumerate(self.calls):
            alike.setdefault(call.groups, []).append(k)
        return list(alike.values())


@dataclass(frozen=True)
class ScaleCalls:
    """Every use of a layer of scales and shifts in one loss, with x̂ of every call."""

    layer: ScaleLayer
    calls: tuple[BlockCall, ...]
    normalised: tuple[Tensor, ...]
    samples: int

    def add_squares_(self, into: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """diagonal += Σ_n (Σ_calls Σ_positions g x̂)² for the scale, without x̂ for the shift."""
        for name, i in self.layer.parameters:
            total: Tensor | None = None
            for call, x, g in zip(self.calls, self.normalised, gradients, strict=True):
                if g is None:
                    continue
                g = g.reshape(call.shape).to(into[i].dtype)
                product = g * x.to(g.dtype) if name == self.layer.rule.scale else g
                terms = self.layer.rule.terms(call.module, product)
                part = terms.reshape(self.samples, -1, into[i].numel()).sum(1)
                total = part if total is None else total + part
            if total is not None:
                into[i].add_(total.square_().sum(0).reshape(into[i].shape))


def scale_calls(
    layout: Layout,
    trace: Trace,
    modules: Mapping[str, nn.Module],
    params: Sequence[Tensor],
    samples: int,
) -> list[ScaleCalls]:
    """The layers of scales and shifts all of whose uses were seen, with samples in dim 0; the rest falls back."""
    found = []
    for layer in layout.scales:
        module = modules[layer.module]
        recorded = trace.calls.get(layer.module, ())
        if not recorded:
            continue
        layer.rule.check_call(module, layer.module)
        calls, normalised = [], []
        for call in recorded:
            call.record.check_unchanged()
            x = call.record.argument(0, "input")
            calls.append(BlockCall(module, layer.module, (x,), call.edge, tuple(call.record.shape)))
            normalised.append(layer.rule.normalised(module, x))
        seen = all(len(trace.uses.get(id(params[i]), ())) in (0, len(calls)) for _, i in layer.parameters)
        by_sample = all(c.shape and c.shape[0] == samples for c in calls)
        if seen and by_sample:
            found.append(ScaleCalls(layer, tuple(calls), tuple(normalised), samples))
    return found


def block_calls(
    layout: Layout, trace: Trace, modules: Mapping[str, nn.Module], params: Sequence[Tensor]
) -> list[BlockCalls]:
    """The uses of every block's weight; refuses a graph in which some were not seen.

    Raises:
        RuntimeError: naming the modules and the remedy.
    """
    if trace.opaque:
        raise RuntimeError(
            f"the graph hides its layers behind {trace.opaque[0]}: use activation checkpointing with "
            "use_reentrant=False, and give the estimator the model before torch.compile"
        )
    found = []
    for block in layout.blocks:
        calls = tuple(c for name in block.modules for c in block.rule.calls(name, modules, trace))
        other = block.transposed
        exchanged: tuple[str, ...] = ()
        reversed_calls: tuple[BlockCall, ...] = ()
        if other is not None:
            exchanged = other.modules
            reversed_calls = tuple(c for m in exchanged for c in other.rule.calls(m, modules, trace))
        for i in block.members:
            uses = len(trace.uses.get(id(params[i]), ()))
            if uses not in (0, len(calls) + len(reversed_calls)):
                names = ", ".join(repr(m) for m in (*block.modules, *exchanged))
                raise RuntimeError(
                    f"parameter {layout.names[i]!r} is used {uses} times in this loss, but "
                    f"{len(calls) + len(reversed_calls)} calls of "
                    f"{names} were seen: it is used outside its module (a functional call, a hook, a forward pass "
                    "before the estimator was initialised). Call the module, or pass "
                    f"exclude=({block.modules[0]!r},) to treat it by the diagonal"
                )
        found.append(BlockCalls(block, calls))
        if other is not None:
            found.append(BlockCalls(other, reversed_calls))
    return found


@dataclass
class Routed:
    """The modules that get some rows only, as a router deals them out; found by rows that are no whole samples.

    Args:
        some: their names.
        all: names of modules that got as many rows as there are samples, which a routed one may by chance.
    """

    some: set[str] = field(default_factory=set)
    all: set[str] = field(default_factory=set)

    def look(self, name: str, weights: Tensor, lead: tuple[int, ...]) -> bool:
        """Whether the module is known to get some rows only, this call included."""
        if factors.sees_some(weights, lead):
            self.some.add(name)
        elif lead == weights.shape[:1] and weights.dim() > 1 and name not in self.some:
            self.all.add(name)
        return name in self.some

    def mistaken(self) -> bool:
        """Whether a module was taken for one that gets all samples, and turned out to be routed; forgets it."""
        found, self.all = not self.all.isdisjoint(self.some), set()
        return found


class Unwritten:
    """Which factors were allocated but hold nothing yet: writing zeros that a product then overwrites costs a pass.

    Args:
        tensors: those whose content means nothing.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._tensors = {id(x): x for x in tensors}

    def begin(self, x: Tensor, at: slice) -> bool:
        """Whether ``x[at]`` is to be overwritten by what comes now; after this call ``x`` counts as written."""
        if self._tensors.pop(id(x), None) is None:
            return False
        if at == slice(None):
            return True
        x.zero_()  # what comes now reaches only some of the groups
        return False

    def fill_(self) -> None:
        """Zeros for what nothing was written to."""
        while self._tensors:
            self._tensors.popitem()[1].zero_()


def spread_over_samples(used: Sequence[BlockCalls], trace: Trace, samples: int) -> list[BlockCalls]:
    """The same uses, those of what is one for all samples (an embedding of positions) once for every sample.

    Such an output is added to what has samples; there it has a gradient for each, and none meets another's.
    """
    found = []
    for calls in used:
        spread = []
        for call in calls.calls:
            where = trace.sum_with_samples(call.edge, call.shape, samples) if samples > 1 else None
            if where is not None:
                edge, shape = where
                own = len(shape) == len(call.shape)  # an axis of length 1 stands where the samples will
                inputs = tuple(x.expand(samples, *x.shape[own:]) for x in call.inputs[:1])
                call = replace(call, edge=edge, shape=shape, inputs=(*inputs, *call.inputs[1:]))
            spread.append(call)
        found.append(replace(calls, calls=tuple(spread)))
    return found


def add_inputs_(
    A: Tensor,
    mass: Tensor,
    used: BlockCalls,
    found: OutputCurvature,
    sharing: Sharing,
    unwritten: Unwritten,
    room: Room,
    routed: Routed,
) -> None:
    """A += Σ w a aᵀ and mass += Σ w, in place.

    Args:
        A: (groups, size_in, size_in), or its diagonal.
        mass: (groups,).
        used: the calls of one block.
        found: the weights of the outputs' positions.
        sharing: how positions become rows.
        unwritten: where A may be known to hold nothing yet.
        room: memory for weighted rows.
        routed: which modules were seen to get some rows only; those found here join them.
    """
    block = used.block
    rows, weights = [], []
    for call in used.calls:
        a = call.input_rows(block.rule)
        lead = positions(a.shape[1:] if block.diagonal_input else a.shape[1:-1])
        known = routed.look(call.name, found.weights, lead)
        w = factors.row_weights(found.weights, lead, repr(call.name), known).to(A.dtype)
        if not block.diagonal_input:
            a = a.reshape(a.shape[0], math.prod(lead), a.shape[-1])
            if sharing == "reduce":
                factors.samples_of(lead, found.weights, repr(call.name))
        rows.append(a)
        weights.append(w.reshape(-1))
    for members in used.by_groups():
        at = used.calls[members[0]].at
        some, masses = [rows[k] for k in members], [weights[k] for k in members]
        if block.diagonal_input:
            A[at] += factors.token_factor(some, masses, block.size_in)
        else:
            if sharing == "reduce":
                means, c = factors.reduce_inputs(some, masses, factors.sample_count(found.weights))
                some, masses = [means], [c]
            with_weight, with_bias = block.weight is not None, block.bias is not None
            empty = unwritten.begin(A, at)
            factors.input_factor_(A[at], some, masses, with_weight, with_bias, empty, room)
        for w in masses:
            mass[at] += w.sum()


def zeros(layout: Layout, shapes: Mapping[int, tuple[int, ...]], params: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of the given shapes, one tensor a parameter; without elements where none is given."""
    nothing: dict[tuple[torch.dtype, torch.device], Tensor] = {}  # one tensor for all places without elements
    found = []
    for i, p in enumerate(params):
        kind = compute_dtype(p.dtype), p.device
        if i in shapes:
            found.append(torch.zeros(shapes[i], dtype=kind[0], device=kind[1]))
            continue
        if kind not in nothing:
            nothing[kind] = torch.zeros((0,), dtype=kind[0], device=kind[1])
        found.append(nothing[kind])
    return found


def allocated(
    shapes: Mapping[int, tuple[int, ...]], params: Sequence[Tensor], spare: Spare, key: str
) -> list[Tensor]:
    """As :func:`zeros`, with contents that mean nothing, in memory that the last step left where there is some."""
    return [
        spare.take((key, i), shapes.get(i, (0,)), compute_dtype(p.dtype), p.device)
        for i, p in enumerate(params)
    ]


def positions(lead: Iterable[int]) -> tuple[int, ...]:
    """The shape of a layer's positions; a call without a batch is one position."""
    return tuple(lead) or (1,)
