"""What K-FAC and EK-FAC share: hyperparameters, recording, factor statistics, running means, staggered inverses.

Legend: see :mod:`curvature.kronecker.factors`. State lists have one tensor a parameter; a block keeps its tensors
at its root parameter (the weight, or else the bias), and tensors without elements stand elsewhere.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from curvature import vectors
from curvature.kronecker import factors, fallback
from curvature.kronecker.eigen import eigh_many
from curvature.kronecker.factors import Sharing
from curvature.kronecker.fisher import FISHER_KINDS, FisherKind, columns
from curvature.kronecker.layout import Block, Layout, build_layout
from curvature.kronecker.operator import Eigenblock, KroneckerOperator
from curvature.kronecker.output_curvature import (
    LIKELIHOODS,
    Likelihood,
    OutputCurvature,
    output_curvature,
)
from curvature.layer_io import Call, Recorder, Trace
from curvature.loss_graph import LossGraph
from curvature.protocols import Estimator, Needs, Observation, State, Statistics
from curvature.running_mean import check_beta, running_mean_


@dataclass
class _Live:
    """What an estimator holds beside its hyperparameters: the hooks in its model, and its last layout."""

    recorder: Recorder | None = None
    layout: Layout | None = None
    said: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class KroneckerEstimator(Estimator):
    """Base of :class:`KFAC` and :class:`EKFAC`; see there."""

    model: nn.Module
    fisher: FisherKind = "type-2"
    sharing: Sharing = "expand"
    samples: int = 1
    seed: int = 0
    likelihood: Likelihood | None = None
    beta: float = 0.95
    factor_interval: int = 1
    inverse_interval: int = 1
    max_dim: int | None = 8192
    exclude: Sequence[str] = ()
    _live: _Live = field(init=False, repr=False, compare=False, default_factory=_Live)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(
                f"model must be the torch.nn.Module whose layers are observed, got {type(self.model).__name__}"
            )
        if self.fisher not in FISHER_KINDS:
            raise ValueError(
                f"fisher must be one of {', '.join(map(repr, FISHER_KINDS))}, got {self.fisher!r}"
            )
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f"sharing must be 'expand' or 'reduce', got {self.sharing!r}")
        if self.likelihood is not None and self.likelihood not in LIKELIHOODS:
            raise ValueError(
                f"likelihood must be one of {', '.join(map(repr, LIKELIHOODS))}, got {self.likelihood!r}"
            )
        check_beta(self.beta)
        for name in ("samples", "factor_interval", "inverse_interval"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if self.max_dim is not None and self.max_dim < 1:
            raise ValueError(f"max_dim must be >= 1 or None, got {self.max_dim}")
        if isinstance(self.exclude, str):
            raise TypeError(f"exclude must be a sequence of module names, got the string {self.exclude!r}")

    @property
    def needs(self) -> Needs:
        """Layer inputs and output gradients, and the model's outputs."""
        outputs = Needs.SAMPLED_LABELS if self.fisher == "mc" else Needs.GGN
        return Needs.GRAD | Needs.LAYER_IO | outputs

    # -- state -----------------------------------------------------------------------------------------------

    def init(self, params: Sequence[Tensor]) -> State:
        """Zero factors, and hooks in the model."""
        layout = self._layout(params)
        state: State = {"step": 0, "count": [vectors.scalar_like([p]) for p in params]}
        sizes: dict[str, dict[int, tuple[int, ...]]] = {key: {} for key in self._keys()}
        for block in layout.blocks:
            for key, shape in self._shapes(block).items():
                sizes[key][block.root] = shape
        for i in layout.diagonal:
            sizes["diagonal"][i] = tuple(params[i].shape)
        for key, shapes in sizes.items():
            state[key] = [
                torch.zeros(shapes.get(i, (0,)), dtype=vectors.compute_dtype(p.dtype), device=p.device)
                for i, p in enumerate(params)
            ]
        return state

    def _keys(self) -> tuple[str, ...]:
        return ("A", "G", "A_vectors", "A_values", "G_vectors", "G_values", "diagonal")

    def _shapes(self, block: Block) -> dict[str, tuple[int, ...]]:
        groups, d_out, d_in = block.dims.groups, block.dims.d_out, block.size_in
        shapes: dict[str, tuple[int, ...]] = {"A_values": (groups, d_in), "G_values": (groups, d_out)}
        if block.diagonal_input:
            shapes["A"] = (groups, d_in)
        else:
            shapes["A"] = shapes["A_vectors"] = (groups, d_in, d_in)
        if self.fisher != "forward-only":
            shapes["G"] = shapes["G_vectors"] = (groups, d_out, d_out)
        return shapes

    def _layout(self, params: Sequence[Tensor]) -> Layout:
        """The layout of ``params``, kept until other parameters are asked about; installs the hooks."""
        live = self._live
        names = {id(p): name for name, p in self.model.named_parameters()}
        if live.layout is None or live.layout.names != tuple(names.get(id(p), "") for p in params):
            live.layout = build_layout(self.model, params, tuple(self.exclude), self.max_dim)
            self._say(live.layout)
        watched = live.layout.watched
        if live.recorder is None or not set(watched) <= set(live.recorder.names):
            before = () if live.recorder is None else live.recorder.names
            live.recorder = Recorder(self.model, dict.fromkeys((*before, *watched)))
        return live.layout

    def _say(self, layout: Layout) -> None:
        new = {where: why for where, why in layout.reasons.items() if where not in self._live.said}
        self._live.said.update(new)
        quiet = {"excluded"}
        told = [f"{where}: {why}" for where, why in new.items() if why not in quiet]
        if told:
            warnings.warn(
                f"{type(self).__name__} treats these by the diagonal of the same curvature: "
                + "; ".join(told)
                + ". "
                "Exclude them to say so, or register a rule (how_to/add_layer_rule)",
                stacklevel=4,
            )

    def due(self, state: State) -> bool:
        """Every ``factor_interval`` steps, beginning with the first."""
        return cast(int, state["step"]) % self.factor_interval == 0

    # -- measuring -------------------------------------------------------------------------------------------

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """Σ w a aᵀ, Σ w and Σ g gᵀ of every block, and the exact diagonal of what has none."""
        layout = self._layout(graph.params)
        recorder = self._live.recorder
        assert recorder is not None
        trace = recorder.trace(graph.output)
        if not recorder.enabled and not trace.calls:
            # The forward pass ran before this step was known to be due (a state was loaded): wait for the next.
            recorder.enabled = True
            return {}
        check_trace(layout, trace, graph.params)
        found = self._output_curvature(graph)
        sizes: dict[str, dict[int, tuple[int, ...]]] = {
            key: {b.root: self._shapes(b).get(key, (0,)) for b in layout.blocks} for key in ("A", "G")
        }
        sizes["mass"] = {b.root: () for b in layout.blocks}
        wide = [vectors.compute_dtype(p.dtype) for p in graph.params]
        statistics: Statistics = {
            key: [
                torch.zeros(shapes.get(i, (0,)), dtype=wide[i], device=p.device)
                for i, p in enumerate(graph.params)
            ]
            for key, shapes in sizes.items()
        }
        modules = dict(self.model.named_modules())
        calls = {b.root: [c for m in b.modules for c in trace.calls.get(m, ())] for b in layout.blocks}
        for block in layout.blocks:
            if calls[block.root]:
                self._measure_inputs(statistics, block, calls[block.root], modules, found)
        self._measure_gradients(statistics, layout, calls, modules, graph, found, state)
        return statistics

    def _output_curvature(self, graph: LossGraph) -> OutputCurvature:
        needs_likelihood = self.fisher in ("mc", "empirical")
        asked = self.likelihood if needs_likelihood else None
        return output_curvature(graph, asked, blocks=not needs_likelihood)

    def _measure_inputs(
        self,
        statistics: Statistics,
        block: Block,
        calls: Sequence[Call],
        modules: dict[str, nn.Module],
        found: OutputCurvature,
    ) -> None:
        A, mass = cast("list[Tensor]", statistics["A"]), cast("list[Tensor]", statistics["mass"])
        rows, weights = [], []
        for call in calls:
            call.record.check_unchanged()
            a = block.rule.input_rows(modules[call.record.module], call.record.inputs)
            lead = positions(a, block.diagonal_input)
            w = factors.row_weights(found.weights, lead, repr(call.record.module))
            rows.append(a if block.diagonal_input else a.reshape(a.shape[0], math.prod(lead), a.shape[-1]))
            weights.append(w.reshape(-1).to(A[block.root].dtype))
        if block.diagonal_input:
            A[block.root] += factors.token_factor(rows, weights, block.dims.d_in)
            mass[block.root] += sum(w.sum() for w in weights)
            return
        if self.sharing == "reduce":
            leads = [
                positions(block.rule.input_rows(modules[c.record.module], c.record.inputs), False)
                for c in calls
            ]
            n = [
                factors.by_sample(lead, found.weights, repr(c.record.module))[0]
                for lead, c in zip(leads, calls, strict=True)
            ]
            a, c = factors.reduce_inputs(rows, weights, n[0])
            rows, weights = [a], [c]
        A[block.root] += factors.input_factor(rows, weights, block.weight is not None, block.bias is not None)
        mass[block.root] += sum(w.sum() for w in weights)

    def _measure_gradients(
        self,
        statistics: Statistics,
        layout: Layout,
        calls: dict[int, list[Call]],
        modules: dict[str, nn.Module],
        graph: LossGraph,
        found: OutputCurvature,
        state: State,
    ) -> None:
        flat = [(block, call) for block in layout.blocks for call in calls[block.root]]
        edges = [call.edge for _, call in flat]
        rest = [graph.params[i] for i in layout.diagonal]
        squares = [
            torch.zeros_like(p, dtype=vectors.compute_dtype(p.dtype), requires_grad=False) for p in rest
        ]
        for column in columns(self.fisher, graph, found, self.samples, self.seed, cast(int, state["step"])):
            gradients: Sequence[Tensor | None] = ()
            if edges:
                gradients = torch.autograd.grad(
                    graph.output, edges, column.value, retain_graph=True, allow_unused=True
                )
            rows: dict[int, list[Tensor]] = {}
            for (block, call), g in zip(flat, gradients, strict=True):
                if g is None:
                    continue
                g = block.rule.gradient_rows(modules[call.record.module], g.reshape(call.record.shape))
                rows.setdefault(block.root, []).append(g)
            for block in layout.blocks:
                if block.root in rows:
                    self._take_gradients(statistics, block, rows[block.root], calls[block.root], found)
            if rest:
                fallback.add_squares_(squares, graph, rest, column)
        if self.fisher == "forward-only":
            squares = [s.fill_(1.0) for s in squares]
        diagonal = [
            torch.zeros(0, dtype=vectors.compute_dtype(p.dtype), device=p.device) for p in graph.params
        ]
        for i, s in zip(layout.diagonal, squares, strict=True):
            diagonal[i] = s
        statistics["diagonal"] = diagonal

    def _take_gradients(
        self,
        statistics: Statistics,
        block: Block,
        rows: Sequence[Tensor],
        calls: Sequence[Call],
        found: OutputCurvature,
    ) -> None:
        G = cast("list[Tensor]", statistics["G"])[block.root]
        if self.sharing == "reduce" and not block.diagonal_input:
            n = [
                factors.by_sample(g.shape[1:-1], found.weights, repr(c.record.module))[0]
                for g, c in zip(rows, calls, strict=False)
            ]
            rows = [factors.reduce_gradients([g.to(G.dtype) for g in rows], n[0])]
        for g in rows:
            factors.gradient_factor_(G, g.reshape(g.shape[0], -1, g.shape[-1]))

    # -- learning --------------------------------------------------------------------------------------------

    def update(self, state: State, seen: Observation) -> None:
        """Take factors into their running means, and refresh the eigenbases whose turn it is."""
        layout = self._layout_of(state, seen)
        step = cast(int, state["step"])
        new: set[int] = set()
        if seen.statistics:
            observed = {k: cast("list[Tensor]", v) for k, v in seen.statistics.items()}
            live = {i for i, g in enumerate(seen.gradient) if g is not None}
            new = self._take(state, layout, observed, live)
        turn = self.turns(layout)
        due = [
            block
            for block, t in zip(layout.blocks, turn, strict=True)
            if block.root in new or (step > 0 and (step - t) % self.inverse_interval == 0)
        ]
        self._refresh(state, due)
        state["step"] = step + 1
        if self._live.recorder is not None:
            self._live.recorder.enabled = self.due(state)

    def _take(
        self, state: State, layout: Layout, observed: dict[str, list[Tensor]], live: set[int]
    ) -> set[int]:
        """Running means of A = Σ w a aᵀ / Σ w, G and the diagonal; returns the roots of blocks new to this state."""
        new = set()
        count = cast("list[Tensor]", state["count"])
        held = {k: cast("list[Tensor]", state[k]) for k in ("A", "G", "diagonal")}
        for block in layout.blocks:
            i = block.root
            if not live.intersection(block.members):
                continue
            mass = observed["mass"][i]
            A = observed["A"][i] / torch.where(mass > 0, mass, torch.ones_like(mass))
            if float(count[i]) == 0:
                new.add(i)
            ticks = count[i].clone()
            running_mean_([held["A"][i]], [A], [count[i]], self.beta)
            if held["G"][i].numel():
                running_mean_([held["G"][i]], [observed["G"][i]], [ticks], self.beta)
        for i in layout.diagonal:
            if i in live:
                running_mean_([held["diagonal"][i]], [observed["diagonal"][i]], [count[i]], self.beta)
        return new

    def turns(self, layout: Layout) -> list[int]:
        """The step (modulo ``inverse_interval``) at which each block's eigenbasis is refreshed, balanced by cost."""
        slots = self.inverse_interval
        load = [0.0] * slots
        turn = [0] * len(layout.blocks)
        costs = [
            b.dims.groups * (b.size_in**3 * (not b.diagonal_input) + b.dims.d_out**3) for b in layout.blocks
        ]
        for j in sorted(range(len(costs)), key=lambda j: -costs[j]):
            turn[j] = min(range(slots), key=load.__getitem__)
            load[turn[j]] += costs[j]
        return turn

    def _refresh(self, state: State, blocks: Sequence[Block]) -> None:
        """New eigenbases for ``blocks``."""
        s = {k: cast("list[Tensor]", state[k]) for k in self._keys()}
        work: list[tuple[str, int]] = []
        for block in blocks:
            i = block.root
            if block.diagonal_input:
                s["A_values"][i].copy_(s["A"][i])
            else:
                work.append(("A", i))
            if self.fisher == "forward-only":
                s["G_values"][i].fill_(1.0)
            else:
                work.append(("G", i))
        for (key, i), (values, basis) in zip(work, eigh_many([s[key][i] for key, i in work]), strict=True):
            s[f"{key}_values"][i].copy_(values)
            s[f"{key}_vectors"][i].copy_(basis)

    # -- answering -------------------------------------------------------------------------------------------

    def operator(self, state: State) -> KroneckerOperator:
        """B from the eigenbases at hand."""
        layout = self._layout_of(state, None)
        return KroneckerOperator(
            self._like(state, layout),
            layout,
            [self._eigenblock(state, b) for b in layout.blocks],
            cast("list[Tensor]", state["diagonal"]),
            self._factored,
        )

    @property
    def _factored(self) -> bool:
        return False

    def _eigenblock(self, state: State, block: Block) -> Eigenblock:
        s = {k: cast("list[Tensor]", state[k])[block.root] for k in self._keys()}
        values_A, values_G = s["A_values"], s["G_values"]
        return Eigenblock(
            block,
            values_G.unsqueeze(-1) * values_A.unsqueeze(-2),
            s["G_vectors"] if s["G_vectors"].numel() else None,
            s["A_vectors"] if s["A_vectors"].numel() else None,
            values_G,
            values_A,
        )

    def _like(self, state: State, layout: Layout) -> list[Tensor]:
        count = cast("list[Tensor]", state["count"])
        return [c.new_empty(()).expand(shape) for c, shape in zip(count, layout.shapes, strict=True)]

    def _layout_of(self, state: State, seen: Observation | None) -> Layout:
        if seen is not None and seen.parameters:
            return self._layout(seen.parameters)
        layout = self._live.layout
        if layout is None or len(layout.names) != len(cast("list[Any]", state["count"])):
            raise ValueError(
                f"{type(self).__name__} has not been initialised for these parameters: call init(params) first"
            )
        return layout


def positions(rows: Tensor, diagonal_input: bool) -> tuple[int, ...]:
    """The shape of the positions of (groups, lead, d) rows, or of (groups, lead) indices; one position at least."""
    lead = tuple(rows.shape[1:] if diagonal_input else rows.shape[1:-1])
    return lead or (1,)


def check_trace(layout: Layout, trace: Trace, params: Sequence[Tensor]) -> None:
    """Refuse a graph in which a block's parameters were used where its modules did not see it.

    Raises:
        RuntimeError: naming the modules and the remedy.
    """
    if trace.opaque:
        raise RuntimeError(
            f"the graph hides its layers behind {trace.opaque[0]}: use activation checkpointing with "
            "use_reentrant=False, and give the optimizer the model before torch.compile"
        )
    for block in layout.blocks:
        calls = sum(len(trace.calls.get(m, ())) for m in block.modules)
        for i in block.members:
            uses = len(trace.uses.get(id(params[i]), ()))
            if uses not in (0, calls):
                names = ", ".join(repr(m) for m in block.modules)
                raise RuntimeError(
                    f"parameter {layout.names[i]!r} is used {uses} times in this loss, but {calls} calls of {names} "
                    "were seen: it is used outside its module (a functional call, a hook, a forward pass before the "
                    f"optimizer was built). Call the module, or pass exclude=({block.modules[0]!r},) to treat it by "
                    "the diagonal"
                )
