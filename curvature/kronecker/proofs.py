"""What an estimator has proven about its model's layers: each use is looked at once, and remembered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from curvature.kronecker import sample_rows
from curvature.kronecker.layout import Layout
from curvature.kronecker.measurement import BlockCalls, Routed, ScaleCalls
from curvature.kronecker.output_curvature import OutputCurvature
from curvature.kronecker.row_proof import refuse_other_products
from curvature.layer_io import Trace
from curvature.loss_graph import LossGraph


@dataclass
class Proofs:
    """The proofs of one estimator.

    Args:
        name: the estimator's class, for messages.
        products: the uses whose rows multiply to their gradients.
        other_scales: the layers of scales and shifts of which that is not so.
        routed: the modules that get some rows only.
        axes: by use, the axis of its positions that is the samples'; ``None`` where none is.
    """

    name: str = ""
    products: set[tuple[str, str, int]] = field(default_factory=set)
    other_scales: set[str] = field(default_factory=set)
    routed: Routed = field(default_factory=Routed)
    axes: dict[tuple[object, ...], int | None] = field(default_factory=dict)

    def with_products(
        self,
        graph: LossGraph,
        layout: Layout,
        used: Sequence[BlockCalls],
        scales: Sequence[ScaleCalls],
        trace: Trace,
    ) -> list[ScaleCalls]:
        """The layers of scales and shifts that compute what their rules say.

        Raises:
            RuntimeError: for a block's layer that does not.
        """

        def trained(which: Iterable[int]) -> bool:
            # a layer that is frozen at this moment has no gradient to compare
            return all(graph.params[i].requires_grad for i in which)

        blocks = [c for c in used if trained(c.block.members)]
        some = [s for s in scales if trained(i for _, i in s.layer.parameters)]
        asked = {("block", call.name, c.block.root) for c in blocks for call in c.calls}
        asked |= {("scale", s.layer.module, 0) for s in some}
        if not asked <= self.products:
            self.other_scales |= refuse_other_products(graph, layout, blocks, some, trace.readers, self.name)
            self.products |= asked
        return [s for s in scales if s.layer.module not in self.other_scales]

    def with_axes(
        self,
        graph: LossGraph,
        found: OutputCurvature,
        used: Sequence[BlockCalls],
        scales: Sequence[ScaleCalls],
        samples: int,
        together: bool,
        by_sample: bool,
    ) -> tuple[list[BlockCalls], list[ScaleCalls]]:
        """The blocks' uses with the samples' axis of each, and the layers of scales and shifts that have it first.

        Args:
            graph: of one loss.
            found: the outputs.
            used: the blocks' uses.
            scales: the layers of scales and shifts.
            samples: N.
            together: see :func:`curvature.kronecker.sample_rows.doubts`.
            by_sample: likewise.

        Raises:
            ValueError: for a block whose rows are not those of the samples.
        """
        asked = sample_rows.doubts(used, scales, samples, together, by_sample)
        new = [d for d in asked if d.key not in self.axes]
        if new:
            self.axes.update(sample_rows.prove(graph, found, new, samples))
        axes = {d.key: self.axes[d.key] for d in asked}
        lost = {key[:2] for key, axis in axes.items() if axis is None}
        for kind, name in lost:
            if kind == "block":
                raise ValueError(
                    f"a position of {name!r} belongs to several samples, or not to the sample that its place says, so "
                    f"{self.name} cannot form each sample's gradient: keep the samples in dim 0 of inputs "
                    f"and outputs, pass exclude=({name!r},) to treat the layer by the exact diagonal, or leave out "
                    "what is between samples with fisher='mc' and between_samples='drop'"
                )
        kept = [s for s in scales if ("scale", s.layer.module) not in lost]
        return sample_rows.with_axes(used, axes, samples, together, by_sample), kept
