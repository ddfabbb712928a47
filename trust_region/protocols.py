"""The contracts of this package: a region, a way to find the best step inside it, a policy for its radius.

Legend: g the (mean) gradient, B the curvature, p a step, m(p) = gᵀp + ½ pᵀBp the model's change, Δ the radius,
λ the damping, ρ = actual reduction / predicted reduction. A *reduction* is positive when the loss falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from curvature.protocols import CurvatureEstimator, CurvatureOperator, Needs, State


@dataclass
class StepContext:
    """What a region or policy may read beside gradient and curvature; everything is optional.

    Args:
        lr: the learning rate of every tensor, a float or a 0-d tensor each; ``None`` means 1. The step that is
            proposed already includes it.
        params: the parameters θ, to read (regions relative to ‖θ‖).
        raw_gradient: this step's gradient before momentum, ``None`` where a parameter has none.
        loss: the loss at θ, 0-d, where known.
    """

    lr: Sequence[float | Tensor] | None = None
    params: Sequence[Tensor] | None = None
    raw_gradient: Sequence[Tensor | None] | None = None
    loss: Tensor | None = None


@dataclass
class Solution:
    """What a subproblem solver found: a step at learning rate 1, and what happened on the way.

    Args:
        step: p, one tensor a parameter: θ + p is the trial point.
        on_boundary: 0-d bool: whether the region (not the model) decided the length.
        negative_curvature: 0-d bool: whether a direction d ≠ 0 with dᵀ(B+λI)d <= 0 was met; what a solver does not look
            at (for Krylov methods all that g does not excite) it does not meet. ``None``: it does not say.
        iterations: products with B of an iterative solver, evaluations of the secular equation of an exact one, 1 of a
            closed form or one ``solve``; 0 where g was seen to be 0.
        residual: ‖(B+λI)p + g‖ where the solver is iterative.
        curvature_step: B p where the solver has it already, so that no one computes it again.
        diagnostics: further scalars for telemetry.
    """

    step: list[Tensor]
    on_boundary: Tensor
    negative_curvature: Tensor | None = None
    iterations: int = 0
    residual: Tensor | None = None
    curvature_step: list[Tensor] | None = None
    diagnostics: dict[str, object] = field(default_factory=dict)


@dataclass
class Proposal:
    """A step to try: θ + step.

    Args:
        step: one tensor a parameter, the learning rate included.
        predicted_reduction: what the model promises for it, 0-d, > 0 (0 where the gradient is 0).
        step_norm: ‖step‖, 0-d, in the Euclidean norm.
        on_boundary: 0-d bool; only then may a radius grow.
        predicted_parts: the prediction of every tensor, where the policy keeps one radius a tensor.
        solution: what the subproblem solver reported.
        diagnostics: further scalars for telemetry, such as ``interior_threshold``.
        loss: the loss at θ where known, so that a policy can tell a reduction from the loss's own rounding.
    """

    step: list[Tensor]
    predicted_reduction: Tensor
    step_norm: Tensor
    on_boundary: Tensor
    predicted_parts: list[Tensor] | None = None
    solution: Solution | None = None
    diagnostics: dict[str, object] = field(default_factory=dict)
    loss: Tensor | None = None


@dataclass
class Verdict:
    """A policy's word on a step: all 0-d tensors, so that nothing waits for the host.

    Args:
        accepted: bool.
        ratio: ρ; NaN where nothing was predicted yet.
        radius: what the policy adapts, afterwards: Δ, λ or σ (for λ and σ, to shrink the region is to grow them).
        actual_reduction: what a lagged policy measured for the previous step.
    """

    accepted: Tensor
    ratio: Tensor
    radius: Tensor
    actual_reduction: Tensor | None = None


@runtime_checkable
class Region(Protocol):
    """A shape in which the model is believed: {p : ‖p‖ <= Δ} in the region's own norm; a frozen dataclass.

    ``minimise`` is exact for a diagonal B (``operator.is_diagonal``). For any other B it solves, then projects; a
    subproblem solver (Steihaug-CG, dogleg, exact) does better inside an :class:`L2Ball`. One that cannot take an
    indefinite B says so by ``definite_only = True``, and :func:`optimizers.build` refuses such a pair.
    """

    @property
    def needs(self) -> Needs:
        """Signals beyond gradient and curvature."""
        ...

    def init(self, params: Sequence[Tensor], estimator: CurvatureEstimator | None = None) -> State:
        """What the region itself remembers; mostly nothing."""
        ...

    def minimise(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        damping: Tensor | float,
        context: StepContext,
    ) -> Solution:
        """argmin of m(p) + ½λ‖p‖² over the region."""
        ...

    def project(
        self,
        state: State,
        step: Sequence[Tensor],
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """The region's point nearest to ``step`` (in the sense that the region documents)."""
        ...


@runtime_checkable
class Subproblem(Protocol):
    """A way to find a good step inside a region with a general B; a frozen dataclass.

    ``regions`` names the shapes it works in; ``definite_only = True`` says that it cannot take an indefinite B.
    """

    @property
    def needs(self) -> Needs:
        """Signals beyond gradient and curvature."""
        ...

    def solve(
        self,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor,
        damping: Tensor | float = 0.0,
    ) -> Solution:
        """A step with ‖p‖₂ <= Δ that does at least as well as the Cauchy point."""
        ...


@runtime_checkable
class RadiusPolicy(Protocol):
    """How the radius Δ, the damping λ or the cubic weight σ adapts; a frozen dataclass.

    ``init`` returns a state with the entries that it adapts: ``radius`` (0-d, or a list with one a tensor),
    ``damping`` or ``sigma``. A policy whose needs include a trial is asked to ``judge`` every trial; one with
    ``lagged = True`` is asked to ``review`` every step instead: the loss that arrives with step t tells how good
    step t - 1 was.
    """

    @property
    def lagged(self) -> bool:
        """Whether the policy reviews the previous step in place of judging a trial."""
        ...

    @property
    def needs(self) -> Needs:
        """LOSS, TRIAL_LOSS, TRIAL_GRADIENT, or only GRAD."""
        ...

    def init(self, params: Sequence[Tensor]) -> State:
        """Fresh state, 0-d tensors on the first parameter's device, float32 or wider."""
        ...

    def judge(
        self,
        state: State,
        proposal: Proposal,
        actual_reduction: Tensor,
        trial_gradient_norm: Tensor | None = None,
    ) -> Verdict:
        """Accept or reject a trial and adapt, in place. NaN or ±Inf anywhere rejects and shrinks."""
        ...

    def review(self, state: State, proposal: Proposal, loss: Tensor | None) -> Verdict:
        """Judge the previous step by the loss of this one, adapt, and remember this proposal."""
        ...


class Policy:
    """Base class of policies: no trial, no lag; inheriting is not required.

    ``shardable`` says of any part that it works on shards of parameters; a policy, which sees only numbers, does.
    """

    lagged: bool = False
    shardable: bool = True

    @property
    def needs(self) -> Needs:
        """Only the gradient."""
        return Needs.GRAD

    def review(self, state: State, proposal: Proposal, loss: Tensor | None) -> Verdict:
        """Policies without a lag have nothing to review."""
        raise NotImplementedError(f"{type(self).__name__} is not a lagged policy")
