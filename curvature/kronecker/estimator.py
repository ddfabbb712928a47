"""What K-FAC and EK-FAC share: hyperparameters, recording, factor statistics, running means, staggered inverses.

Legend: see :mod:`curvature.kronecker.factors`. State lists have one tensor a parameter; a block keeps its tensors
at its root parameter (the weight, or else the bias), and tensors without elements stand elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from curvature import vectors
from curvature.estimate import from_statistics
from curvature.kronecker import fallback, learning, measurement, sample_rows
from curvature.kronecker.factors import Sharing, sample_count
from curvature.kronecker.fisher import FISHER_KINDS, FisherKind, columns
from curvature.kronecker.layout import Block, Layout, build_layout
from curvature.kronecker.learning import held
from curvature.kronecker.live import Live, Parts, refuse_coupled_samples
from curvature.kronecker.operator import Eigenblock, KroneckerOperator
from curvature.kronecker.output_curvature import (
    LIKELIHOODS,
    OutputCurvature,
    output_curvature,
)
from curvature.kronecker.send_back import Accumulators, SendBack
from curvature.kronecker.spare import Spare
from curvature.likelihood import Likelihood
from curvature.loss_graph import LossGraph
from curvature.loss_weights import sample_weights
from curvature.problem import Evaluation, Problem
from curvature.protocols import TRANSIENT, Estimator, Needs, Observation, State, Statistics
from curvature.running_mean import check_beta
from curvature.sample_mixing import FirstInputs


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
    between_samples: Literal["refuse", "drop"] = "refuse"
    _live: Live = field(init=False, repr=False, compare=False, default_factory=Live)

    semidefinite = True
    symmetric_statistics = ("A", "G", "G_transposed")

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(
                "model must be the torch.nn.Module itself, not its parameters: its layers are observed; "
                f"got {type(self.model).__name__}"
            )
        if self.fisher not in FISHER_KINDS:
            raise ValueError(
                f"fisher must be one of {', '.join(map(repr, FISHER_KINDS))}, got {self.fisher!r}"
            )
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f"sharing must be 'expand' or 'reduce', got {self.sharing!r}")
        if self.between_samples not in ("refuse", "drop"):
            raise ValueError(f"between_samples must be 'refuse' or 'drop', got {self.between_samples!r}")
        if self.between_samples == "drop" and self.fisher == "type-2":
            raise ValueError(
                "between_samples='drop' does not go with fisher='type-2', which sends back the vectors of all samples "
                "at once, where they would meet: use fisher='mc'"
            )
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
        self._record_always()
        asks = self.fisher in ("empirical", "mc") and self.between_samples == "refuse"
        if asks and self._live.first is None:
            self._live.first = FirstInputs(self.model)
        state: State = {"step": 0, "draws": 0, "count": [vectors.scalar_like([p]) for p in params]}
        keys = (*self._keys(), *learning.TRANSPOSED_KEYS)
        sizes: dict[str, dict[int, tuple[int, ...]]] = {key: {} for key in keys}
        for block in layout.blocks:
            for key, shape in self._shapes(block).items():
                sizes[key][block.root] = shape
        for i in layout.diagonal:
            sizes["diagonal"][i] = tuple(params[i].shape)
        if all(block.transposed is None for block in layout.blocks):
            sizes = {k: v for k, v in sizes.items() if k not in learning.TRANSPOSED_KEYS}
        for key, shapes in sizes.items():
            state[key] = [
                torch.zeros(shapes.get(i, (0,)), dtype=vectors.compute_dtype(p.dtype), device=p.device)
                for i, p in enumerate(params)
            ]
        return state

    def _keys(self) -> tuple[str, ...]:
        return learning.KEYS

    def _shapes(self, block: Block) -> dict[str, tuple[int, ...]]:
        groups, d_out, d_in = block.dims.groups, block.dims.d_out, block.size_in
        shapes: dict[str, tuple[int, ...]] = {"A_values": (groups, d_in), "G_values": (groups, d_out)}
        if block.diagonal_input:
            shapes["A"] = (groups, d_in)
        else:
            shapes["A"] = shapes["A_vectors"] = (groups, d_in, d_in)
        if self.fisher != "forward-only":
            shapes["G"] = shapes["G_vectors"] = (groups, d_out, d_out)
        other = block.transposed
        if other is not None:
            shapes["G_vectors"] = (groups, d_out, d_out)
            shapes["A_transposed"] = (1, other.size_in)
            if self.fisher != "forward-only":
                shapes["G_transposed"] = (1, other.dims.d_out, other.dims.d_out)
        return shapes

    def _layout(self, params: Sequence[Tensor]) -> Layout:
        """The layout of ``params``, kept until other parameters are asked about; installs the hooks."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        build = functools.partial(build_layout, self.model, params, tuple(self.exclude), self.max_dim)
        wanted = tuple(names.get(id(p), "") for p in params)
        return self._live.layout_of(wanted, build, self.model, type(self).__name__)

    def due(self, state: State) -> bool:
        """Every ``factor_interval`` steps, beginning with the first."""
        return cast(int, state["step"]) % self.factor_interval == 0

    # -- measuring -------------------------------------------------------------------------------------------

    def estimate(self, problem: Problem) -> KroneckerOperator:
        """One shot over batches; once more where a layer turns out to be routed that was taken for another."""
        operator = self._estimated(problem)
        if self._live.proofs.routed.mistaken():
            operator = self._estimated(problem)
        return operator

    def _estimated(self, problem: Problem) -> KroneckerOperator:
        """The samples' own weights are known from the loss itself."""

        def measure(state: State, evaluation: Evaluation) -> Statistics:
            return self._measure(state, evaluation.graph, self._own_weights(problem, evaluation))

        operator = from_statistics(self, problem, measure)
        self._live.spare.clear()
        assert isinstance(operator, KroneckerOperator)
        return operator

    def _own_weights(self, problem: Problem, evaluation: Evaluation) -> Tensor | None:
        if self.fisher != "empirical":
            return None
        return sample_weights(problem.loss_fn, evaluation.outputs, evaluation.target, problem.weight_fn)

    def _record_always(self) -> None:
        if self._live.recorder is not None:
            self._live.recorder.enabled = True

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """Σ w a aᵀ, Σ w and Σ g gᵀ of every block, and the exact diagonal of what has none."""
        return self._measure(state, graph, None)

    def _measure(self, state: State, graph: LossGraph, own_weights: Tensor | None) -> Statistics:
        """Under autocast too, sums of products are formed in the precision of the state."""
        with torch.autocast(graph.loss.device.type, enabled=False):
            return self._measured(state, graph, own_weights)

    def _measured(self, state: State, graph: LossGraph, own_weights: Tensor | None) -> Statistics:
        layout, params = self._layout(graph.params), graph.params
        recorder = self._live.recorder
        assert recorder is not None
        trace = recorder.trace(graph.output)
        if not recorder.enabled and not trace.calls:
            # The forward pass ran before this step was known to be due (a state was loaded): wait for the next.
            recorder.enabled = True
            return {}
        apart = self.between_samples == "refuse"
        if apart:
            refuse_coupled_samples(self.model)
            self._live.try_model(self.model, by_labels=self.fisher == "empirical")
        modules = dict(self.model.named_modules())
        used = measurement.block_calls(layout, trace, modules, params)
        found = self._output_curvature(graph)
        samples = sample_count(found.weights)
        scales = measurement.scale_calls(layout, trace, modules, params, samples)
        self._live.proofs.name = type(self).__name__
        if self.fisher != "forward-only":  # which takes no gradient, and needs none
            scales = self._live.proofs.with_products(graph, layout, used, scales, trace)
        used = measurement.spread_over_samples(used, trace, samples)
        if apart:
            used, scales = self._proven(graph, found, used, scales, samples)
        # With an interval the memory is free between measurements, for whoever needs it then.
        spare = self._live.spare if self.factor_interval == 1 else Spare()
        statistics = self._zeros(state, layout, params, spare)
        unwritten = measurement.Unwritten(
            cast("list[Tensor]", statistics[key])[b.root]
            for key in ("A", "G")
            for b in layout.blocks
            if key == "G" or not b.diagonal_input
        )
        for calls in used:
            i, kind = calls.block.root, "_transposed" if calls.block.is_transposed else ""
            A, mass = (cast("list[Tensor]", statistics[key + kind]) for key in ("A", "mass"))
            routed = self._live.proofs.routed
            measurement.add_inputs_(A[i], mass[i], calls, found, self.sharing, unwritten, spare.room, routed)
        diagonal = cast("list[Tensor]", statistics["diagonal"])
        into = self._accumulators(state, layout, statistics)
        scaled = {i for s in scales for _, i in s.layer.parameters}
        rest = [i for i in layout.diagonal if i not in scaled]
        draw = cast(int, state["draws"])  # state, so that a resumed run goes on where it stopped
        parts = cast(Parts, state.setdefault(TRANSIENT, Parts()))
        first = parts.samples
        parts.samples += int(found.z.shape[0])
        parts.count += 1
        passes = SendBack(used, scales, trace.readers, samples, self.sharing, unwritten)
        for column in columns(self.fisher, graph, found, self.samples, self.seed, draw, own_weights, first):
            passes.add_(into, graph, column)
            if rest:
                fallback.add_squares_([diagonal[i] for i in rest], graph, [params[i] for i in rest], column)
        unwritten.fill_()
        if self.fisher == "forward-only":
            for i in layout.diagonal:
                diagonal[i].fill_(1.0)
        return statistics

    def _proven(
        self,
        graph: LossGraph,
        found: OutputCurvature,
        used: Sequence[measurement.BlockCalls],
        scales: Sequence[measurement.ScaleCalls],
        samples: int,
    ) -> tuple[list[measurement.BlockCalls], list[measurement.ScaleCalls]]:
        """The uses with the samples' axis of each, where it matters whose a row is."""
        together = self.fisher in ("type-2", "empirical") or self._live.may_mix
        by_sample = self._by_sample or self.sharing == "reduce" or sample_rows.uneven(found.weights)
        if samples == 1 or (self.fisher == "forward-only" and not by_sample):
            return list(used), list(scales)
        return self._live.proofs.with_axes(graph, found, used, scales, samples, together, by_sample)

    @property
    def _by_sample(self) -> bool:
        """Whether rows are put together by sample."""
        return False

    def _accumulators(self, state: State, layout: Layout, statistics: Statistics) -> Accumulators:
        return Accumulators(
            cast("list[Tensor]", statistics["G"]),
            cast("list[Tensor]", statistics["diagonal"]),
            cast("list[Tensor]", statistics.get("G_transposed", [])),
        )

    def _zeros(self, state: State, layout: Layout, params: Sequence[Tensor], spare: Spare) -> Statistics:
        """Sums to add to; A and G where they are matrices are only allocated (:class:`measurement.Unwritten`)."""
        shapes: dict[str, dict[int, tuple[int, ...]]] = {
            key: {b.root: self._shapes(b).get(key, (0,)) for b in layout.blocks} for key in ("A", "G")
        }
        shapes["mass"] = {b.root: (b.dims.groups,) for b in layout.blocks}
        shapes["diagonal"] = {i: tuple(params[i].shape) for i in layout.diagonal}
        pairs = [b for b in layout.blocks if b.transposed is not None]
        if pairs:
            for key in learning.TRANSPOSED_KEYS:
                shapes[key] = {b.root: self._shapes(b).get(key, (0,)) for b in pairs}
            shapes["mass_transposed"] = {b.root: (1,) for b in pairs}
        statistics: Statistics = {
            key: measurement.zeros(layout, sizes, params)
            for key, sizes in shapes.items()
            if key not in ("A", "G")
        }
        for key in ("A", "G"):
            statistics[key] = measurement.allocated(shapes[key], params, spare, key)
        for block in layout.blocks:
            if block.diagonal_input:
                cast("list[Tensor]", statistics["A"])[block.root].zero_()
        return statistics

    def _output_curvature(self, graph: LossGraph) -> OutputCurvature:
        needed = self.fisher in ("mc", "empirical")
        found = output_curvature(
            graph, self.likelihood if needed else None, blocks=not needed, proven=self._live.proven
        )
        self._live.proven = None if found.known is None else found.known.likelihood
        return found

    # -- learning --------------------------------------------------------------------------------------------

    def update(self, state: State, seen: Observation) -> None:
        """Take factors into their running means, and refresh the eigenbases whose turn it is."""
        with torch.autocast(cast("list[Tensor]", state["count"])[0].device.type, enabled=False):
            self._learn(state, seen)

    def _learn(self, state: State, seen: Observation) -> None:
        layout = self._layout_of(state, seen)
        step = cast(int, state["step"])
        new: set[int] = set()
        if seen.statistics:
            observed = {k: cast("list[Tensor]", v) for k, v in seen.statistics.items()}
            live = {i for i, g in enumerate(seen.gradient) if g is not None}
            new = self._take(state, layout, observed, live)
        self._refresh(state, learning.due_blocks(layout, step, self.inverse_interval, new))
        state["step"] = step + 1
        if state.pop(TRANSIENT, None) is not None:
            state["draws"] = cast(int, state["draws"]) + self.samples
        if self._live.recorder is not None:
            self._live.recorder.enabled = self.due(state) or self._watches(layout)

    def _watches(self, layout: Layout) -> bool:
        """Whether layers are recorded at every step, for the rows of their gradients."""
        return False

    def _take(
        self, state: State, layout: Layout, observed: dict[str, list[Tensor]], live: set[int]
    ) -> set[int]:
        return learning.take_(state, layout, observed, live, self.beta)

    def _refresh(self, state: State, blocks: Sequence[Block]) -> None:
        learning.refresh_(state, blocks)

    # -- answering -------------------------------------------------------------------------------------------

    def operator(self, state: State) -> KroneckerOperator:
        """B from the eigenbases at hand."""
        layout = self._layout_of(state, None)
        return KroneckerOperator(
            self._like(state, layout),
            layout,
            [self._eigenblock(state, b) for b in layout.blocks],
            [d.clone() for d in held(state, "diagonal")],
            self._factored,
        )

    @property
    def _factored(self) -> bool:
        return False

    def _eigenblock(self, state: State, block: Block) -> Eigenblock:
        g, a = held(state, "G_values")[block.root], held(state, "A_values")[block.root]
        Q_G, Q_A = learning.basis_of(state, block)
        return Eigenblock(block, g.unsqueeze(-1) * a.unsqueeze(-2), Q_G, Q_A, g, a)

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
