"""A diagonal estimator with something done to its diagonal: Sophia's floor, LAMB's square root.

Legend: h the diagonal of the wrapped estimator, β its decay, t the refreshes seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from curvature.estimate import run
from curvature.loss_graph import LossGraph
from curvature.operators import DiagonalOperator, PowerDiagonal
from curvature.problem import Problem
from curvature.protocols import (
    CurvatureEstimator,
    CurvatureOperator,
    Needs,
    Observation,
    State,
    Statistics,
)
from curvature.running_mean import bias_corrections


class WrappedDiagonal:
    """Abstract: forwards everything to ``estimator`` but the diagonal; a subclass is a frozen dataclass with it."""

    estimator: CurvatureEstimator

    @property
    def needs(self) -> Needs:
        """As the wrapped estimator."""
        return self.estimator.needs

    @property
    def keeps_graph(self) -> bool:
        """As the wrapped estimator."""
        return bool(getattr(self.estimator, "keeps_graph", False))

    @property
    def tracks_steps(self) -> bool:
        """As the wrapped estimator."""
        return bool(getattr(self.estimator, "tracks_steps", False))

    @property
    def evaluates_gradients(self) -> bool:
        """As the wrapped estimator."""
        return bool(getattr(self.estimator, "evaluates_gradients", False))

    @property
    def shardable(self) -> bool:
        """As the wrapped estimator: what is done to its diagonal is done element by element."""
        return bool(getattr(self.estimator, "shardable", False))

    def init(self, params: Sequence[Tensor]) -> State:
        """The wrapped estimator's state."""
        return self.estimator.init(params)

    def due(self, state: State) -> bool:
        """As the wrapped estimator."""
        due = getattr(self.estimator, "due", None)
        return True if due is None else bool(due(state))

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """As the wrapped estimator."""
        measured: Statistics = self.estimator.measure(state, graph)  # type: ignore[attr-defined]
        return measured

    def update(self, state: State, seen: Observation) -> None:
        """As the wrapped estimator."""
        self.estimator.update(state, seen)

    def estimate(self, problem: Problem) -> DiagonalOperator:
        """One shot over batches, the wrapped estimator's own."""
        state = self.init(problem.params)
        for count in cast("list[Tensor]", state.get("count", [])):
            count.fill_(1.0)  # all batches are one refresh
        return self._changed(state, run(self.estimator, problem))

    def operator(self, state: State) -> DiagonalOperator:
        """The changed diagonal."""
        return self._changed(state, self.estimator.operator(state))

    def _changed(self, state: State, operator: CurvatureOperator) -> DiagonalOperator:
        if not getattr(operator, "is_diagonal", False):
            raise ValueError(
                f"{type(self).__name__} changes a diagonal, and {type(self.estimator).__name__} gives a "
                f"{type(operator).__name__}: wrap a diagonal estimator"
            )
        return self.changed(state, operator.diagonal())

    def changed(self, state: State, diagonal: list[Tensor]) -> DiagonalOperator:
        """What the subclass makes of h."""
        raise NotImplementedError


@dataclass(frozen=True)
class RootDiagonal(WrappedDiagonal):
    """diag(√h): Adam's metric, from a curvature in units of squared gradients.

    Args:
        estimator: of a diagonal that is not negative, such as :class:`EmpiricalFisherDiagonal`.

    >>> import torch
    >>> from curvature import EmpiricalFisherDiagonal
    >>> root = RootDiagonal(EmpiricalFisherDiagonal())
    >>> state = root.init([torch.zeros(2)])
    >>> root.update(state, Observation(gradient=[torch.tensor([3.0, -4.0])]))
    >>> root.operator(state).diagonal()
    [tensor([3., 4.])]

    Cost: O(P), and no state of its own.
    """

    estimator: CurvatureEstimator

    semidefinite = True

    def changed(self, state: State, diagonal: list[Tensor]) -> DiagonalOperator:
        """√h."""
        return PowerDiagonal(diagonal, [1.0] * len(diagonal), power=0.5, floor=0.0)


@dataclass(frozen=True)
class FlooredDiagonal(WrappedDiagonal):
    """diag(max(γh, ε)): Sophia's denominator, positive whatever the sign of the curvature.

    Where h is negative or small the step is m/ε, which a :class:`trust_region.Box` cuts to its radius: there the
    method is sign descent.

    Args:
        estimator: of the diagonal h.
        scale: γ > 0.
        floor: ε > 0.
        bias_corrected: ``False`` takes the correction 1/(1-βᵗ) out of h again: Sophia's running mean starts at zero
            and is used as it is, so that its first steps are longer. It goes with estimators that correct by their
            ``beta`` and keep a ``count``.

    >>> import torch
    >>> from curvature import EmpiricalFisherDiagonal
    >>> floored = FlooredDiagonal(EmpiricalFisherDiagonal(), scale=0.5, floor=1.0)
    >>> state = floored.init([torch.zeros(2)])
    >>> floored.update(state, Observation(gradient=[torch.tensor([2.0, 1.0])]))
    >>> floored.operator(state).diagonal()
    [tensor([2.0000, 1.0000])]

    Cost: O(P), and no state of its own.
    Reference: Liu et al. 2023, Sophia, arXiv 2305.14342, equation (6) and algorithm 3.
    """

    estimator: CurvatureEstimator
    scale: float = 1.0
    floor: float = 1e-12
    bias_corrected: bool = True

    semidefinite = True

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be > 0, got {self.scale}")
        if not self.floor > 0:
            raise ValueError(f"floor must be > 0, got {self.floor}")
        if not self.bias_corrected and not hasattr(self.estimator, "beta"):
            raise ValueError(f"bias_corrected=False needs an estimator with a beta, got {self.estimator!r}")

    def changed(self, state: State, diagonal: list[Tensor]) -> DiagonalOperator:
        """max(γh, ε)."""
        scales: list[float | Tensor] = [self.scale] * len(diagonal)
        if not self.bias_corrected:
            beta = cast(float, self.estimator.beta)  # type: ignore[attr-defined]
            counts = cast("list[Tensor]", state["count"])
            scales = [self.scale * c for c in bias_corrections(counts, beta)]
        return PowerDiagonal(diagonal, scales, power=1.0, floor=self.floor)
