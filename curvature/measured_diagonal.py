"""What all diagonals that are measured on a living graph share: the running mean, the interval, the operator.

Legend: x_k what refresh k measured, h the running mean of x, bias-corrected, t the refreshes seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from curvature import vectors
from curvature.operators import DiagonalOperator
from curvature.protocols import Estimator, Observation, State
from curvature.running_mean import check_beta, running_mean_


class MeasuredDiagonal(Estimator):
    """Abstract: a subclass is a frozen dataclass with ``beta`` and ``interval`` that measures ``{"diagonal": x}``."""

    beta: float
    interval: int

    def check(self) -> None:
        """Refuse a decay outside [0, 1) and an interval below 1."""
        check_beta(self.beta)
        if self.interval < 1:
            raise ValueError(f"interval must be >= 1, got {self.interval}")

    def init(self, params: Sequence[Tensor]) -> State:
        """h = 0; the counters of steps and draws are the host's, since they decide what is computed."""
        return {
            "diagonal": vectors.zeros_like(params),
            "count": [vectors.scalar_like([p]) for p in params],
            "step": 0,
            "draws": 0,
        }

    def due(self, state: State) -> bool:
        """Every ``interval`` steps, beginning with the first."""
        return cast(int, state["step"]) % self.interval == 0

    def update(self, state: State, seen: Observation) -> None:
        """Take what was measured into h on refresh steps."""
        state["step"] = cast(int, state["step"]) + 1
        if not seen.statistics:
            return
        measured = cast("list[Tensor]", seen.statistics["diagonal"])
        diagonal, count = cast("list[Tensor]", state["diagonal"]), cast("list[Tensor]", state["count"])
        live = [i for i, g in enumerate(seen.gradient) if g is not None]
        running_mean_(
            [diagonal[i] for i in live], [measured[i] for i in live], [count[i] for i in live], self.beta
        )

    def operator(self, state: State) -> DiagonalOperator:
        """diag(h)."""
        return DiagonalOperator([h.clone() for h in cast("list[Tensor]", state["diagonal"])])
