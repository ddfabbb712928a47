"""What ``backward`` observed and ``step`` has not used yet: losses, statistics, living graphs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from curvature.estimate import add_statistics
from curvature.kronecker.gradient_rows import GradientRows
from curvature.loss_graph import LossGraph
from curvature.protocols import Statistics


@dataclass
class Pending:
    """Observations of the backward calls since the last step, added up.

    Args:
        loss: the sum of their losses.
        statistics: the sum of their statistics.
        graphs: their graphs, where the estimator takes products during the step.
        backwards: how many there were.
        measured: how many of them the estimator measured.
        gradient: that of the last of them, where measuring formed it; ``None`` for a parameter that it does not reach.
        diverged: whether one of them had a loss that is not finite, which an estimator of outputs does not measure.
        rows: the gradients of some blocks as products of rows, where one backward call formed them.
        knows_scale: whether the last backward call was given the GradScaler, so that its loss is not scaled.
    """

    loss: Tensor | None = None
    statistics: Statistics = field(default_factory=dict)
    graphs: list[LossGraph] = field(default_factory=list)
    backwards: int = 0
    measured: int = 0
    gradient: list[Tensor | None] | None = None
    diverged: bool = False
    rows: dict[int, GradientRows] = field(default_factory=dict)
    knows_scale: bool = False

    def add_loss(self, loss: Tensor) -> None:
        """Losses of several backward calls add up; the user divides by their number, as for gradients."""
        value = loss.detach().reshape(())
        self.loss = value.clone() if self.loss is None else self.loss + value
        self.backwards += 1

    def add_statistics(self, statistics: Statistics) -> None:
        """Statistics are additive in the loss."""
        add_statistics(self.statistics, statistics)
        self.measured += 1

    def take_gradient(self) -> list[Tensor | None] | None:
        """What measuring formed, once."""
        gradient, self.gradient = self.gradient, None
        return gradient

    def discard(self) -> None:
        """Forget everything, and let the graphs go."""
        for graph in self.graphs:
            graph.release()
        self.loss = None
        self.statistics = {}
        self.graphs = []
        self.backwards = 0
        self.measured = 0
        self.gradient = None
        self.diverged = False
        self.rows = {}
        self.knows_scale = False
