"""Vectors sent back from the outputs: G, squares and moments, formed as the backward pass meets each layer.

Legend: see :mod:`curvature.kronecker.factors` and :mod:`curvature.kronecker.fisher`. A block's sums are formed when the
gradients of all its uses are there, mostly one, and the gradients are let go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import Node

from curvature.gradient_sweep import Sweep
from curvature.kronecker import factors
from curvature.kronecker.factors import Sharing
from curvature.kronecker.fisher import Column
from curvature.kronecker.measurement import BlockCalls, ScaleCalls, Unwritten
from curvature.kronecker.moments import Held, Term
from curvature.loss_graph import LossGraph


@dataclass(frozen=True)
class Accumulators:
    """Where the gradients of one loss are added up.

    Args:
        factors: G by root parameter.
        transposed: G of the uses with exchanged sides, likewise.
        diagonal: the diagonal by parameter.
        moments: Σ_n (Q_Gᵀ ∇_n Q_A)² by root parameter, for the blocks that have eigenbases.
        bases: (Q_G, Q_A) by root parameter, ``None`` for the identity.
        held: keeps what the moments of the blocks in ``holding`` will be formed from.
        holding: roots of the blocks that have no eigenbases yet.
    """

    factors: Sequence[Tensor]
    diagonal: Sequence[Tensor]
    transposed: Sequence[Tensor] = ()
    moments: Mapping[int, Tensor] = field(default_factory=dict)
    bases: Mapping[int, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    held: Held | None = None
    holding: frozenset[int] = frozenset()

    def take(self, term: Term) -> None:
        """Add a term to its block's moments, or keep it for later."""
        root = term.block.root
        if root in self.moments:
            term.add_to_(self.moments[root], *self.bases[root])
        elif self.held is not None and root in self.holding:
            self.held.add(term)


@dataclass
class _Waiting:
    """Uses whose gradients are put together: those of a block, or of a head and the embedding tied to it, or of scales.

    Args:
        blocks: the uses of one or two blocks; none for scales.
        scale: the uses of scales and shifts.
        rows: what came so far: rows of gradients by block and call, or gradients for scales.
        missing: how many have not come.
    """

    blocks: tuple[BlockCalls, ...]
    scale: ScaleCalls | None
    rows: list[list[Tensor | None]] = field(default_factory=list)
    missing: int = 0

    def begin(self) -> None:
        """Forget what came."""
        uses: Sequence[BlockCalls | ScaleCalls] = self.blocks if self.scale is None else (self.scale,)
        self.rows = [[None] * len(some.calls) for some in uses]
        self.missing = sum(len(some.calls) for some in uses)

    def put(self, which: int, call: int, gradient: Tensor) -> None:
        """Keep the gradient of one use."""
        if self.scale is None:
            some = self.blocks[which]
            gradient = some.calls[call].gradient_rows(some.block.rule, gradient)
        self.rows[which][call] = gradient
        self.missing -= 1


class SendBack:
    """The backward passes of one loss.

    Args:
        used: the calls of all blocks.
        scales: the calls of layers of scales and shifts.
        readers: of the loss's graph, see :class:`curvature.layer_io.Trace`.
        samples: N.
        sharing: how positions become rows.
        unwritten: the factors that hold nothing yet.

    Cost: a backward pass without weight gradients for every vector, the products, and memory for the gradients of one
    block at a time.
    """

    def __init__(
        self,
        used: Sequence[BlockCalls],
        scales: Sequence[ScaleCalls],
        readers: Mapping[Node, Sequence[tuple[Node, int]]],
        samples: int,
        sharing: Sharing,
        unwritten: Unwritten,
    ) -> None:
        self._samples, self._sharing, self._unwritten = samples, sharing, unwritten
        self._waiting: list[_Waiting] = []
        for calls in used:
            head = self._waiting[-1].blocks if self._waiting else ()
            if calls.block.is_transposed and head and head[0].block.transposed is not None:
                self._waiting[-1].blocks = (*head, calls)
            else:
                self._waiting.append(_Waiting((calls,), None))
        self._waiting += [_Waiting((), scale) for scale in scales]
        self._places: list[tuple[_Waiting, int, int]] = []
        edges = []
        for waiting in self._waiting:
            uses: Sequence[BlockCalls | ScaleCalls] = (
                waiting.blocks if waiting.scale is None else (waiting.scale,)
            )
            for which, some in enumerate(uses):
                for k, call in enumerate(some.calls):
                    edges.append(call.edge)
                    self._places.append((waiting, which, k))
        self._sweep = Sweep(edges, readers) if edges else None

    def add_(self, into: Accumulators, graph: LossGraph, column: Column) -> None:
        """Add Σ g gᵀ, squares and moments of one vector sent back from the outputs.

        Args:
            into: see there.
            graph: the loss.
            column: what is sent back.
        """
        if self._sweep is None:
            return
        for waiting in self._waiting:
            waiting.begin()

        def take(number: int, gradient: Tensor) -> None:
            waiting, which, k = self._places[number]
            waiting.put(which, k, gradient)
            if not waiting.missing:
                self._finish(into, waiting)

        self._sweep.run(graph.output, column.value, take)
        for waiting in self._waiting:
            if waiting.missing:  # the vector does not reach all of them
                self._finish(into, waiting)

    def _finish(self, into: Accumulators, waiting: _Waiting) -> None:
        rows, waiting.rows = waiting.rows, []
        if waiting.scale is not None:
            waiting.scale.add_squares_(into.diagonal, rows[0])
            return
        if len(waiting.blocks) == 2:
            self._add_pair_(into, waiting.blocks, rows)
        for calls, some in zip(waiting.blocks, rows, strict=True):
            self._add_block_(into, calls, some)

    def _add_pair_(
        self, into: Accumulators, pair: Sequence[BlockCalls], rows: Sequence[Sequence[Tensor | None]]
    ) -> None:
        """The moments of a head and the embedding tied to it, whose cross terms need both."""
        (head, ours), (embedding, theirs) = (
            (
                [c for c, r in zip(some.calls, own, strict=True) if r is not None],
                [r for r in own if r is not None],
            )
            for some, own in zip(pair, rows, strict=True)
        )
        into.take(Term(pair[0].block, slice(None), head, ours, self._samples, embedding, theirs))

    def _add_block_(self, into: Accumulators, calls: BlockCalls, rows: Sequence[Tensor | None]) -> None:
        block = calls.block
        G = (into.transposed if block.is_transposed else into.factors)[block.root]
        for members in calls.by_groups():
            present = [r.to(G.dtype) for k in members if (r := rows[k]) is not None]
            at = calls.calls[members[0]].at
            if block.transposed is None and not block.is_transposed and present:
                some = [calls.calls[k] for k in members if rows[k] is not None]
                into.take(Term(block, at, some, present, self._samples))
            if not G.numel():
                continue
            if present and self._sharing == "reduce" and not block.diagonal_input:
                present = [factors.reduce_gradients(present, self._samples)]
            for g in present:
                empty = self._unwritten.begin(G, at)
                factors.gradient_factor_(G[at], g.reshape(g.shape[0], -1, g.shape[-1]), empty)
