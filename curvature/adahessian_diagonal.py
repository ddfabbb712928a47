"""AdaHessian's curvature: the root mean square over time of the spatially averaged Hutchinson diagonal.

Legend: h a signed Hutchinson estimate of diag(H), h̄ its average over a convolution's kernel, v the bias-corrected
running mean of h̄², k the Hessian power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from curvature.estimate import from_statistics
from curvature.hutchinson import DiagonalMode, HutchinsonDiagonal, diagonal_by_differences
from curvature.loss_graph import LossGraph
from curvature.operators import DiagonalOperator, PowerDiagonal
from curvature.probes import Distribution
from curvature.problem import Problem
from curvature.protocols import CurvatureOperator, Estimator, Needs, Observation, State, Statistics
from curvature.registry import estimators
from curvature.running_mean import running_mean_


@dataclass(frozen=True)
class AdaHessianDiagonal(Estimator):
    """diag(v^(k/2)): how large the Hessian's diagonal has been, its sign given up for stability.

    The average over space and the square are taken of the whole estimate, all probes and micro-batches together:
    absolute values taken earlier would count the probes' noise as curvature. Never negative, so it needs no region;
    where it overestimates (a diagonal that changes sign) the step is only shorter.

    Args:
        beta: β₂, decay of the running mean of squares over refreshes, in [0, 1).
        power: k in (0, 1], the Hessian power; 1 is the curvature itself.
        probes: Hessian-vector products a refresh, >= 1.
        distribution: of the probes, ``"rademacher"`` or ``"gaussian"``.
        interval: steps between refreshes, >= 1.
        spatial_average: average the estimate over each convolution kernel (dimensions after the second).
        block_size: with ``spatial_average``, average matrices too, see :class:`curvature.HutchinsonDiagonal`.
        seed: of the probes.
        hvp: ``"reverse"`` or ``"finite-difference"``, see :class:`curvature.HutchinsonDiagonal`.

    >>> import torch
    >>> from curvature import estimate
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> B = estimate(AdaHessianDiagonal(), model, torch.nn.MSELoss(), [(torch.ones(1, 1), torch.ones(1, 1))])
    >>> B.diagonal()
    [tensor([[2.]])]

    Cost: ``probes`` Hessian-vector products every ``interval`` steps; 4 bytes a float32 parameter of state.
    Reference: Yao et al. 2021, AdaHessian, arXiv 2006.00719, equations (8), (10) and (12).
    """

    beta: float = 0.999
    power: float = 1.0
    probes: int = 1
    distribution: Distribution = "rademacher"
    interval: int = 1
    spatial_average: bool = True
    seed: int = 0
    block_size: int = 1
    hvp: DiagonalMode = "reverse"

    semidefinite = True

    def __post_init__(self) -> None:
        self._hutchinson()  # checks what it takes
        if not 0.0 < self.power <= 1.0:
            raise ValueError(f"power must be in (0, 1], got {self.power}")

    def _hutchinson(self) -> HutchinsonDiagonal:
        return HutchinsonDiagonal(
            beta=self.beta,
            probes=self.probes,
            distribution=self.distribution,
            interval=self.interval,
            seed=self.seed,
            spatial_average=self.spatial_average,
            block_size=self.block_size,
            hvp=self.hvp,
        )

    @property
    def needs(self) -> Needs:
        """Those of the Hutchinson estimate."""
        return self._hutchinson().needs

    @property
    def evaluates_gradients(self) -> bool:  # type: ignore[override]
        """As the Hutchinson estimate."""
        return self._hutchinson().evaluates_gradients

    @property
    def shardable(self) -> bool:
        """As the Hutchinson estimate."""
        return self._hutchinson().shardable

    def estimate(self, problem: Problem) -> CurvatureOperator:
        """One shot over batches."""
        return (
            diagonal_by_differences(self, problem)
            if self.evaluates_gradients
            else from_statistics(self, problem)
        )

    def init(self, params: Sequence[Tensor]) -> State:
        """v = 0, and the counters of the Hutchinson estimate."""
        state = self._hutchinson().init(params)
        state["mean_square"] = state.pop("diagonal")
        return state

    def due(self, state: State) -> bool:
        """Every ``interval`` steps, beginning with the first."""
        return self._hutchinson().due(state)

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """h, signed."""
        return self._hutchinson().measure(state, graph)

    def update(self, state: State, seen: Observation) -> None:
        """v ← β₂v + (1-β₂)h̄², bias-corrected, on refresh steps."""
        measured = self._hutchinson().measured(state, seen)
        state["step"] = cast(int, state["step"]) + 1
        if measured is None:
            return
        mean, count = cast("list[Tensor]", state["mean_square"]), cast("list[Tensor]", state["count"])
        live = [i for i, g in enumerate(seen.gradient) if g is not None]
        averaged = self._hutchinson().averaged
        squares = (averaged(measured[i]).square() for i in live)  # formed one at a time, where it is needed
        running_mean_([mean[i] for i in live], squares, [count[i] for i in live], self.beta)

    def operator(self, state: State) -> DiagonalOperator:
        """diag(v^(k/2))."""
        v = cast("list[Tensor]", state["mean_square"])
        return PowerDiagonal(v, [1.0] * len(v), power=0.5 * self.power, floor=0.0)


estimators.add("adahessian-diagonal", AdaHessianDiagonal)
