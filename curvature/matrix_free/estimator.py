"""What the matrix-free estimators share: the flow from living graphs, or from a problem, to an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

from torch import Tensor

from curvature.loss_graph import LossGraph
from curvature.matrix_free.operator import MatrixFreeOperator, summed
from curvature.matrix_free.snapshot import Snapshot, accumulate
from curvature.problem import Problem
from curvature.protocols import TRANSIENT, Estimator, HessianProduct, Observation, State

Memory: TypeAlias = dict[str, Any]


class MatrixFreeEstimator(Estimator):
    """An estimator whose operator multiplies on the graphs of the present step, or on a snapshot of a problem.

    A subclass says how one loss's graph multiplies (:meth:`graph_product`) and how a batch of a snapshot does
    (:meth:`snapshot_product`).
    """

    keeps_graph = True

    def init(self, params: Sequence[Tensor]) -> State:
        """Nothing: no memory, and nothing to save."""
        return {}

    def update(self, state: State, seen: Observation) -> None:
        """Keep this step's products until its end."""
        state[TRANSIENT] = MatrixFreeOperator(self.loop_product(state, seen), seen.parameters)

    def operator(self, state: State) -> MatrixFreeOperator:
        """Σ over this step's losses.

        Raises:
            RuntimeError: outside a step, where there is no loss to multiply with.
        """
        held = state.get(TRANSIENT)
        if held is None:
            name = type(self).__name__
            raise RuntimeError(
                f"{name} has products only while a step is computed: call optimizer.backward(loss) in that step, or "
                f"use curvature.estimate({name}(), model, loss_fn, batches)"
            )
        return cast(MatrixFreeOperator, held)

    def estimate(self, problem: Problem) -> MatrixFreeOperator:
        """The operator of all batches of ``problem`` at its present θ, which it keeps."""
        snapshot = self.snapshot(problem)
        memories = self.memories(snapshot)

        def product(v: Sequence[Tensor]) -> list[Tensor]:
            total: list[Tensor] | None = None
            for (share, batch), memory in zip(snapshot.weighted(), memories, strict=True):
                total = accumulate(total, self.snapshot_product(snapshot, batch, memory, v), share)
            assert total is not None  # a problem has at least one batch
            return total

        return MatrixFreeOperator(product, snapshot.params)

    def snapshot(self, problem: Problem) -> Snapshot:
        """The problem as the products see it."""
        return Snapshot(problem)

    def memories(self, snapshot: Snapshot) -> list[Memory]:
        """What is known about every batch before the first product."""
        return [{"index": index} for index in range(len(snapshot.batches))]

    def loop_product(self, state: State, seen: Observation) -> HessianProduct:
        """The product of one step of an optimizer."""
        if not seen.graphs:
            raise RuntimeError(
                f"{type(self).__name__} needs the graph of the loss: call optimizer.backward(loss, outputs) in place "
                "of loss.backward()"
            )
        return summed(
            [self.graph_product(graph, {"index": index}) for index, graph in enumerate(seen.graphs)]
        )

    def graph_product(self, graph: LossGraph, memory: Memory) -> HessianProduct:
        """v ↦ B v of one loss.

        Args:
            graph: its graph.
            memory: what was measured on this loss for an earlier product; ``index`` tells which loss it is.
        """
        raise NotImplementedError

    def snapshot_product(
        self, snapshot: Snapshot, batch: tuple[Any, Any], memory: Memory, v: Sequence[Tensor]
    ) -> list[Tensor]:
        """B v of one batch's loss."""
        return snapshot.on_graph(batch, lambda graph: self.graph_product(graph, memory)(v))
