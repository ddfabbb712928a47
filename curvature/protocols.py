"""The contracts of this package: what an estimator may ask for, what it is shown, and what it answers.

An estimator is a frozen dataclass of hyperparameters. Its state is a separate dictionary of tensors, so
that an optimizer can save, load, move and shard it. One refresh of the curvature flows like this::

    measure(state, graph)   inside ``optimizer.backward``: raw statistics of one loss, while its graph lives
         ↓                  added over micro-batches, averaged over ranks
    update(state, seen)     inside ``optimizer.step``: running means, factorisations
         ↓
    operator(state)         B at this moment: ``matvec``, ``solve``, ``diagonal``, ``to_dense``

Statistics are *additive in the loss*: the statistics of ``loss_1 + loss_2`` are the sum of theirs. That one
rule makes k micro-batches equal one large batch, and many ranks equal one, for every estimator. What is not
additive, a square above all, is formed in ``update``, of the sum. Statistics that are additive but do not grow in
proportion to the loss (:class:`curvature.FisherDiagonal`) allow for the mean over ranks by themselves, and bring an
``estimate`` of their own.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from curvature.loss_graph import LossGraph

State: TypeAlias = dict[str, "Tensor | list[Tensor] | int | float | object"]
"""What an estimator or a policy remembers.

A ``list`` holds one tensor a parameter, in the order given to ``init`` (a tensor with no elements where a
parameter has no entry); anything else (a tensor, an int, a float) belongs to the whole optimizer. The one
keys :data:`TRANSIENT` and :data:`CACHE` may hold any object; the first is dropped at the end of the step, the second
is kept from step to step, and neither is ever saved.
"""

Statistics: TypeAlias = dict[str, "Tensor | list[Tensor]"]
"""Additive raw statistics of one loss; lists hold one tensor a parameter."""

TRANSIENT = "transient"
"""Key of a state's entry that lives for one step only: products on a graph that is freed afterwards."""


CACHE = "cache"
"""Key of a state's entry that the others determine: kept from step to step, absent in a copy or after a load.

The optimizer counts its memory where it has a method ``tensors()``.
"""


class Needs(enum.Flag):
    """What an estimator or a trust-region policy must be shown; checked when the optimizer is built.

    >>> (Needs.GRAD | Needs.LOSS) & Needs.HVP
    <Needs: 0>
    """

    GRAD = enum.auto()
    """The gradient of the loss; every loop provides it."""
    LOSS = enum.auto()
    """The value of the loss, by ``step(loss=)``, ``backward(loss)`` or a closure."""
    HVP = enum.auto()
    """Products with the Hessian: ``optimizer.backward(loss)`` in place of ``loss.backward()``."""
    GGN = enum.auto()
    """Products with the Gauss-Newton matrix: ``optimizer.backward(loss, outputs)``."""
    PER_SAMPLE_GRAD = enum.auto()
    """Every sample's own gradient."""
    LAYER_IO = enum.auto()
    """Layer inputs and the gradients of layer outputs; the estimator is given the model."""
    SAMPLED_LABELS = enum.auto()
    """Gradients for labels drawn from the model's own likelihood: ``optimizer.backward(loss, outputs)``."""
    TRIAL_LOSS = enum.auto()
    """The loss at the trial point, on the same batch: ``step(closure)``."""
    TRIAL_GRADIENT = enum.auto()
    """The gradient at the trial point, on the same batch: ``step(closure)``."""

    @property
    def graph(self) -> Needs:
        """The part of these needs that only a living autograd graph can serve."""
        return self & (Needs.HVP | Needs.GGN | Needs.PER_SAMPLE_GRAD | Needs.LAYER_IO | Needs.SAMPLED_LABELS)

    @property
    def outputs(self) -> Needs:
        """The part of these needs for which the model's outputs must be given to ``backward``."""
        return self & (Needs.GGN | Needs.SAMPLED_LABELS)

    @property
    def trial(self) -> Needs:
        """The part of these needs that evaluates the loss a second time, at the trial point."""
        return self & (Needs.TRIAL_LOSS | Needs.TRIAL_GRADIENT)


@dataclass
class Observation:
    """What an estimator sees of one step: the loss, its gradient, and only what it asked for.

    Args:
        gradient: one tensor a parameter, shaped like it, float32 or wider; ``None`` where the parameter got
            no gradient in this step, and then the estimator leaves that parameter's state alone.
        loss: the loss at θ before the step, a 0-d tensor, or ``None`` if the caller gave none.
        batch_size: samples behind the gradient where known.
        statistics: what ``measure`` returned, added over micro-batches and averaged over ranks; empty on
            steps where nothing was measured.
        graphs: the living graphs of this step's losses, for an estimator with ``keeps_graph = True``.
        parameters: the parameters themselves, to read.
        step_change: θ_t - θ_{t-1} of the last accepted step where the estimator set
            ``tracks_steps = True`` (quasi-Newton pairs), else ``None``.
        gradient_at: shift ↦ the gradient of this step's whole loss at θ + shift, in the closure loop, on the same
            batch and with the random state and buffers put back (finite differences); else ``None``.
    """

    gradient: Sequence[Tensor | None]
    loss: Tensor | None = None
    batch_size: int | None = None
    statistics: Statistics = field(default_factory=dict)
    graphs: Sequence[LossGraph] = ()
    parameters: Sequence[Tensor] = ()
    step_change: Sequence[Tensor] | None = None
    gradient_at: Callable[[Sequence[Tensor]], list[Tensor]] | None = None


@runtime_checkable
class CurvatureOperator(Protocol):
    """B at this moment, at the θ where it was observed. Vectors are lists of tensors shaped like the parameters."""

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """B v."""
        ...

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        """(B + λI)⁻¹ v.

        Args:
            v: the right-hand side.
            damping: λ >= 0, in curvature units: it scales with the loss.

        Raises:
            curvature.SingularCurvatureError: where B + λI is singular and the host can know it.
            NotImplementedError: where this curvature has no solve; use a subproblem that needs only ``matvec``.
        """
        ...

    def diagonal(self) -> list[Tensor]:
        """The diagonal of B, shaped like the parameters."""
        ...

    def to_dense(self) -> Tensor:
        """B as a (P, P) matrix, P the number of parameters' elements; for small problems and tests."""
        ...


@runtime_checkable
class CurvatureEstimator(Protocol):
    """A way to estimate curvature: a frozen dataclass of hyperparameters.

    Optional parts, found by name; :class:`curvature.Estimator` supplies each default:

    - ``measure(state, graph) -> Statistics``: additive statistics of one loss, for needs that only a living
      graph can serve (:attr:`Needs.graph`). It must leave the graph alive and ``.grad`` alone.
    - ``due(state) -> bool``: whether the coming step measures (an interval); host knowledge only.
    - ``keeps_graph``: the operator takes products while the step is computed, so the graphs must live till then.
    - ``evaluates_gradients``: ``seen.gradient_at`` is wanted in the closure loop (finite differences).
    - ``tracks_steps``: ``seen.step_change`` is wanted (quasi-Newton pairs).
    - ``tracks_second_moment``: ``operator(state).diagonal()`` is the running mean of squared gradients, so that
      :class:`trust_region.RmsBox` need not keep its own.
    - ``gathered_keys``: entries of the state that ranks keep divided among them and ``state_dict()`` lacks. They come
      with ``gather(state)``, all of them, asked for by every rank; ``check_gathered(state, given)``, which refuses a
      loaded state that lacks what it needs (``given`` is then ``None``); and ``take_gathered(state, given)``.
    - ``watch(loss, outputs, params)``: what to watch in the backward pass that follows, or ``None``: a context manager
      whose ``found(params)`` gives gradients as products of rows (``curvature.kronecker.gradient_rows``).
    - ``semidefinite``: whether every operator is positive semi-definite, so that :func:`optimizers.build` can refuse a
      region that needs it; ``None`` where nobody says, and then the first step finds out.
    """

    @property
    def needs(self) -> Needs:
        """What this estimator must be shown; checked when the optimizer is built."""
        ...

    def init(self, params: Sequence[Tensor]) -> State:
        """Fresh state for ``params``, on their devices, float32 or wider."""
        ...

    def update(self, state: State, seen: Observation) -> None:
        """Take one step's observation into ``state``, in place.

        After the first update the operator must equal the observation itself (running means are bias-corrected).
        """
        ...

    def operator(self, state: State) -> CurvatureOperator:
        """B at this moment."""
        ...


class Estimator:
    """Base class that supplies the optional parts of :class:`CurvatureEstimator`; inheriting is not required."""

    keeps_graph: bool = False
    evaluates_gradients: bool = False
    tracks_steps: bool = False
    tracks_second_moment: bool = False
    semidefinite: bool | None = None
    symmetric_statistics: tuple[str, ...] = ()
    """Names of statistics whose matrices, (groups, n, n), are symmetric: ranks send each other half of them."""

    def due(self, state: State) -> bool:
        """Whether the coming step measures; estimators with an interval override it."""
        return True

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """Additive statistics of one loss; estimators whose needs include a living graph override it."""
        return {}


class SingularCurvatureError(ArithmeticError):
    """(B + λI)⁻¹ v was asked for where B + λI has no inverse; a larger damping is the remedy."""


HessianProduct: TypeAlias = Callable[[Sequence[Tensor]], "list[Tensor]"]
"""v ↦ H v on lists of tensors shaped like the parameters."""
