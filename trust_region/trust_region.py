"""A trust region: a shape, a solver and a radius policy held together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureEstimator, CurvatureOperator, Needs, State
from trust_region.fixed_radius import FixedRadius
from trust_region.protocols import Proposal, RadiusPolicy, Region, Solution, StepContext, Subproblem, Verdict
from trust_region.unbounded import Unbounded


@dataclass(frozen=True)
class TrustRegion:
    """How far to believe the model, and how that adapts.

    Args:
        region: the shape of the region.
        subproblem: how to find the step with a general B; ``None`` uses the region's own minimiser, which is exact
            for a diagonal B and solve-then-project otherwise.
        radius: the policy that adapts Δ, λ or σ.
        damping: λ >= 0, in curvature units, beside a policy that has none of its own: it makes a singular B solvable.

    Raises:
        ValueError: for a solver that works in the Euclidean ball only, given another region, or one ball a tensor; for
            an infinite radius beside a region that needs a finite one; in :meth:`propose` for an indefinite B that
            nothing holds back (no region, and a policy that takes every step).

    >>> import torch
    >>> from trust_region import FixedRadius, L2Ball
    >>> from curvature import DiagonalOperator
    >>> trust = TrustRegion(region=L2Ball(), radius=FixedRadius(0.5))
    >>> state = trust.init([torch.zeros(2)])
    >>> proposal = trust.propose(state, [torch.tensor([3.0, 4.0])], DiagonalOperator([torch.ones(2)]))
    >>> proposal.step
    [tensor([-0.3000, -0.4000])]
    """

    region: Region = field(default_factory=Unbounded)
    subproblem: Subproblem | None = None
    radius: RadiusPolicy = field(default_factory=FixedRadius)
    damping: float = 0.0

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"damping must be >= 0, got {self.damping}")
        policy = self.radius
        if self.damping and (hasattr(policy, "damping") or "damping" in getattr(policy, "adapts", ())):
            raise ValueError(
                f"{type(policy).__name__} has a damping of its own: give it there, not to TrustRegion"
            )
        wanted = getattr(self.subproblem, "regions", None)
        if wanted is not None and not isinstance(self.region, wanted):
            names = " or ".join(w.__name__ for w in wanted)
            raise ValueError(
                f"{type(self.subproblem).__name__} finds steps inside {names} only, got {type(self.region).__name__}"
            )
        self._check_shape()
        weight = "sigma" if getattr(self.subproblem, "weight", None) == "sigma" else None
        adapts_sigma = "sigma" in getattr(self.radius, "adapts", ())
        if weight == "sigma" and not adapts_sigma:
            name = type(self.subproblem).__name__
            raise ValueError(f"{name} needs a policy that adapts σ: use AdaptiveCubic, got {self.radius}")
        if adapts_sigma and weight != "sigma":
            raise ValueError(
                f"{type(self.radius).__name__} adapts σ: use it with CubicModel, got {self.subproblem}"
            )
        mine, theirs = getattr(self.region, "scope", None), getattr(self.radius, "scope", None)
        if theirs == "tensor" and mine != "tensor":
            raise ValueError('a radius a tensor (scope="tensor") needs a region with scope="tensor"')

    def _check_shape(self) -> None:
        """Refuse a region that the solver would take for another one, and an infinite radius where none can be."""
        region = self.region
        if self.subproblem is not None:
            name = type(self.subproblem).__name__
            if getattr(region, "scope", None) == "tensor":
                raise ValueError(
                    f"{name} finds one step inside one ball over all tensors, got {region}: leave its scope global, or "
                    "leave the solver out"
                )
            for flag, measure in (
                ("includes_lr", "before the learning rate"),
                ("includes_damping", "by B alone"),
            ):
                if getattr(region, flag, False):
                    raise ValueError(
                        f"{name} measures the step {measure}, got {region}: leave {flag} False, or leave the solver out"
                    )
        policy = getattr(self.radius, "policy", self.radius)
        if getattr(region, "finite_only", False) and getattr(policy, "radius", 1.0) == math.inf:
            raise ValueError(
                f"{type(region).__name__} needs a finite radius, and that of {type(policy).__name__} is infinite: give "
                "it a radius, or use Unbounded or L2Ball"
            )

    @property
    def needs(self) -> Needs:
        """What the three parts must be shown."""
        needs = self.region.needs | self.radius.needs
        return needs | self.subproblem.needs if self.subproblem is not None else needs

    @property
    def lagged(self) -> bool:
        """Whether the policy judges a step by the loss of the next one."""
        return self.radius.lagged

    @property
    def definite_only(self) -> str | None:
        """Why an indefinite B cannot be taken, in words; ``None`` where it can."""
        for part in (self.subproblem, self.region if self.subproblem is None else None):
            if getattr(part, "definite_only", False):
                return f"{type(part).__name__} needs positive semi-definite curvature"
        if self.takes_every_step and self.subproblem is None:
            return "without a region nothing holds its step back"
        return None

    @property
    def takes_every_step(self) -> bool:
        """Whether neither a region, a trial nor an adapted damping stands between the model and the parameters."""
        adapts = getattr(self.radius, "adapts", ())
        held = (
            self.needs & (Needs.TRIAL_LOSS | Needs.TRIAL_GRADIENT) or "damping" in adapts or "sigma" in adapts
        )
        return isinstance(self.region, Unbounded) and not held

    def init(self, params: Sequence[Tensor], estimator: CurvatureEstimator | None = None) -> State:
        """Fresh state of region and policy, one dictionary."""
        state: State = dict(self.radius.init(params))
        if self.damping:
            state["damping"] = vectors.scalar_like(params, self.damping)
        for key, value in self.region.init(params, estimator).items():
            if key in state:
                raise ValueError(f"region and radius policy both keep a state entry {key!r}")
            state[key] = value
        return state

    def propose(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        context: StepContext | None = None,
    ) -> Proposal:
        """The step to try, the learning rate included.

        Args:
            state: of this trust region.
            gradient: g or its running mean, one tensor a parameter.
            curvature: B.
            context: learning rates, parameters, the raw gradient.

        Returns:
            the step, its predicted reduction (> 0, or 0 where g = 0), its norm, whether the boundary was hit.
        """
        context = context if context is not None else StepContext()
        prepare = getattr(self.radius, "prepare", None)
        if prepare is not None:  # a lagged policy that moves the radius before the step, not after it
            prepare(state, context)
        radius = cast(
            "Tensor | list[Tensor]", state.get("radius", vectors.scalar_like(gradient, float("inf")))
        )
        damping = cast("Tensor | float", state.get("damping", 0.0))
        observe = getattr(self.region, "observe", None)
        if observe is not None:
            observe(state, context)
        if self.subproblem is not None:
            if "sigma" in state:
                radius = cast(Tensor, state["sigma"])
            solution = self.subproblem.solve(gradient, curvature, cast(Tensor, radius), damping)
        else:
            solution = self.region.minimise(state, gradient, curvature, radius, damping, context)
            if self.takes_every_step:
                refuse_uphill(solution)
        predict = getattr(self.radius, "predict", None)
        if predict is not None:
            parts = cast("list[Tensor]", predict(gradient, curvature, solution, context))
        else:
            parts = predicted_parts(gradient, curvature, solution, context)
        step = scaled_by_lr(solution.step, context.lr)
        return Proposal(
            step=step,
            predicted_reduction=vectors.total(parts),
            step_norm=vectors.norm(step),
            on_boundary=solution.on_boundary,
            predicted_parts=parts,
            solution=solution,
            diagnostics=solution.diagnostics,
            loss=context.loss,
        )

    def tries(self, state: State) -> bool:
        """Whether the coming step is tried; a policy that looks on an interval may leave the others out."""
        asked = getattr(self.radius, "tries", None)
        return True if asked is None else bool(asked(state))

    def pass_over(self, state: State) -> None:
        """Tell the policy of a step that was not tried."""
        self.radius.pass_over(state)  # type: ignore[attr-defined]

    def judge(
        self,
        state: State,
        proposal: Proposal,
        actual_reduction: Tensor,
        trial_gradient_norm: Tensor | None = None,
    ) -> Verdict:
        """Accept or reject the trial, and adapt."""
        return self.radius.judge(state, proposal, actual_reduction, trial_gradient_norm)

    def review(self, state: State, proposal: Proposal, loss: Tensor | None) -> Verdict:
        """Judge the previous step by this step's loss; for lagged policies."""
        return self.radius.review(state, proposal, loss)


def refuse_uphill(solution: Solution) -> None:
    """Raise where a step without a region goes uphill and nothing would judge it; an accelerator is not waited for."""
    negative = solution.negative_curvature
    if negative is None or not vectors.readable(negative):
        return
    if bool(negative):
        raise ValueError(
            "the curvature is indefinite, and without a region its step goes uphill: use a region (Box, L2Ball with "
            "SteihaugCG), a policy that judges the step, a larger damping, or a curvature that is not negative"
        )


def scaled_by_lr(step: Sequence[Tensor], lr: Sequence[float | Tensor] | None) -> list[Tensor]:
    """η_i p_i for every tensor; p_i itself where η_i is the number 1."""
    if lr is None:
        return list(step)
    return [
        p * eta.to(p.device, p.dtype) if isinstance(eta, Tensor) else p if eta == 1.0 else p * eta
        for p, eta in zip(step, lr, strict=True)
    ]


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two learning rates are known to be equal, without reading a tensor."""
    return a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)


def predicted_parts(
    gradient: Sequence[Tensor], curvature: CurvatureOperator, solution: Solution, context: StepContext
) -> list[Tensor]:
    """-(gᵀp + ½ pᵀBp) of the step as it will be taken, its share for every tensor; their sum is the prediction.

    The product B p of the solver is reused where every tensor has the same learning rate η, or B joins no tensors:
    B(ηp) = ηBp.
    """
    product = solution.curvature_step
    same = context.lr is None or all(_same(eta, context.lr[0]) for eta in context.lr[1:])
    same = same or getattr(curvature, "is_diagonal", False)
    if product is None or not same:
        step = scaled_by_lr(solution.step, context.lr)
        linear, quadratic = vectors.dots(gradient, step), vectors.dots(curvature.matvec(step), step)
        return [-(a + 0.5 * b) for a, b in zip(linear, quadratic, strict=True)]
    linear, quadratic = vectors.dots(gradient, solution.step), vectors.dots(product, solution.step)
    rates = [1.0] * len(linear) if context.lr is None else context.lr
    found = []
    for a, b, rate in zip(linear, quadratic, rates, strict=True):
        eta = rate.to(a.device, a.dtype) if isinstance(rate, Tensor) else rate
        found.append(-(eta * a + 0.5 * eta**2 * b))
    return found
