"""Levenberg-Marquardt: the damping λ follows the reduction ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, Needs, State
from trust_region import judgement
from trust_region.lagged import check_evaluate, evaluation_needs, exchange, memory
from trust_region.protocols import Policy, Proposal, Solution, StepContext, Verdict
from trust_region.ratio_radius import keep_unless
from trust_region.trust_region import predicted_parts, scaled_by_lr


@dataclass(frozen=True)
class LevenbergMarquardt(Policy):
    """λ falls where the model keeps its word (ρ > ¾) and rises where it does not (ρ < ¼).

    Two rules. ``"martens"`` looks every T₁ steps and multiplies λ by ω^T₁ or ω^-T₁; a step is never taken back for
    being poor, which suits minibatches (Hessian-free, K-FAC). ``"classical"`` looks at every step, takes back what
    did not reduce the loss enough, and moves λ down by 3 and up by 2 (delayed gratification). Under both rules a step
    that ends in a loss that is not finite is taken back, and λ rises by ``rejection`` at once.

    ρ compares like with like: the step that was taken (learning rate and region included), on the batch that judges
    it, so that beside momentum the promise is that of the batch's own gradient; where momentum goes against the batch
    (nothing was promised) λ stands. A learning rate below 1, or a region that cuts the step, makes almost every promise
    come true, and says nothing of the step that λ alone would have made: after such a step λ may undo a rise, but does
    not fall below ``initial_damping``. Else it would fall for ever, and steps would grow where B is flat, by its noise.

    Args:
        initial_damping: λ₀ in [min_damping, max_damping], in curvature units: it scales with the loss.
        rule: ``"martens"`` or ``"classical"``.
        interval: T₁ >= 1, steps between two looks of Martens' rule.
        omega: ω in (0, 1) of Martens' rule.
        decrease: factor in (0, 1) of the classical rule.
        increase: factor > 1 of the classical rule.
        rejection: factor > 1 after a step that could not be believed at all.
        eta: the classical rule accepts above this ρ, 0 <= eta < ¼.
        min_damping: > 0, so that λ never vanishes.
        max_damping: finite.
        radius: Δ of a region that is to hold beside the damping, such as :class:`KLBall`; it does not adapt.
        evaluate: ``"trial"`` evaluates the loss at the trial point, ``"lagged"`` waits for the next step's loss.
        rounding: units in the last place of the loss that count as noise.
        trials: ``"every"`` step is tried, so that each that ends in a loss that is not finite is taken back; ``"due"``
            saves the forward pass, and that guard, in the steps in which Martens' rule does not look.

    >>> policy = LevenbergMarquardt(initial_damping=1.0, interval=1, omega=0.5)
    >>> state = policy.init([torch.zeros(1)])
    >>> good = Proposal([torch.ones(1)], torch.tensor(1.0), torch.tensor(1.0), torch.tensor(False))
    >>> policy.judge(state, good, torch.tensor(1.0)).radius
    tensor(0.5000)

    Cost: a handful of scalars, no wait for the host.
    References: Martens & Grosse 2015, arXiv 1503.05671, section 6.5 (ω = 19/20, T₁ = 5); Martens 2010; Marquardt 1963;
    Transtrum & Sethna 2012, arXiv 1201.5885, section 3 (delayed gratification).
    """

    initial_damping: float = 1.0
    rule: Literal["martens", "classical"] = "martens"
    interval: int = 5
    omega: float = 19 / 20
    decrease: float = 1 / 3
    increase: float = 2.0
    rejection: float = 4.0
    eta: float = 1e-4
    min_damping: float = 1e-10
    max_damping: float = 1e10
    radius: float = math.inf
    evaluate: Literal["trial", "lagged"] = "trial"
    rounding: float = 10.0
    trials: Literal["every", "due"] = "every"

    adapts = ("damping",)

    def __post_init__(self) -> None:
        if self.rule not in ("martens", "classical"):
            raise ValueError(f"rule must be 'martens' or 'classical', got {self.rule!r}")
        if not 0 < self.min_damping < self.max_damping < math.inf:
            raise ValueError(
                "min_damping and max_damping must satisfy 0 < min_damping < max_damping < inf, got "
                f"{self.min_damping}, {self.max_damping}"
            )
        if not self.min_damping <= self.initial_damping <= self.max_damping:
            raise ValueError(
                f"initial_damping must be in [{self.min_damping:g}, {self.max_damping:g}], got {self.initial_damping}"
            )
        if self.interval < 1:
            raise ValueError(f"interval must be >= 1, got {self.interval}")
        for name in ("omega", "decrease"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)}")
        for name in ("increase", "rejection"):
            if not 1 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 1 and finite, got {getattr(self, name)}")
        if not 0 <= self.eta < 0.25:
            raise ValueError(f"eta must be in [0, 0.25), got {self.eta}")
        if not self.radius > 0:
            raise ValueError(f"radius must be > 0, got {self.radius}")
        if not self.rounding >= 0:
            raise ValueError(f"rounding must be >= 0, got {self.rounding}")
        check_evaluate(self.evaluate)
        if self.trials not in ("every", "due"):
            raise ValueError(f"trials must be 'every' or 'due', got {self.trials!r}")
        if self.rule == "classical" and self.evaluate == "lagged":
            raise ValueError(
                "rule='classical' takes poor steps back and needs evaluate='trial'; use rule='martens'"
            )

    @property
    def lagged(self) -> bool:  # type: ignore[override]
        """Whether the next step's loss judges this one."""
        return self.evaluate == "lagged"

    @property
    def needs(self) -> Needs:
        """The loss at the trial point, or of every step."""
        return evaluation_needs(self.evaluate)

    def init(self, params: Sequence[Tensor]) -> State:
        """λ₀, the fixed radius, and the count of steps."""
        state: State = {
            "damping": vectors.scalar_like(params, self.initial_damping),
            "radius": vectors.scalar_like(params, self.radius),
            "policy_steps": vectors.scalar_like(params),
        }
        return {**state, **memory(params)} if self.lagged else state

    def predict(
        self,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        solution: Solution,
        context: StepContext,
    ) -> list[Tensor]:
        """The model's reduction, and for the verdict: the batch's promise, and whether λ alone decided the step."""
        parts = predicted_parts(gradient, curvature, solution, context)
        solution.diagnostics["shortened"] = shortened(solution.on_boundary, context.lr)
        if not self.lagged:
            apart = momentum_share(gradient, solution.step, context)
            promised = vectors.total(parts)
            solution.diagnostics["promised"] = promised if apart is None else promised + apart.to(promised)
        return parts

    def tries(self, state: State) -> bool:
        """Whether the coming step is tried; waits for the host where not every one is."""
        if self.trials == "every" or self.rule == "classical":
            return True
        return (int(cast(Tensor, state["policy_steps"])) + 1) % self.interval == 0

    def pass_over(self, state: State) -> None:
        """Count a step that was not tried."""
        cast(Tensor, state["policy_steps"]).add_(1.0)

    def judge(
        self,
        state: State,
        proposal: Proposal,
        actual_reduction: Tensor,
        trial_gradient_norm: Tensor | None = None,
    ) -> Verdict:
        """Martens & Grosse, section 6.5, or the classical rule."""
        damping, steps = cast(Tensor, state["damping"]), cast(Tensor, state["policy_steps"])
        credible = judgement.credible(proposal, actual_reduction)
        promised = cast(Tensor, proposal.diagnostics.get("promised", proposal.predicted_reduction))
        held = cast(Tensor, proposal.diagnostics.get("shortened", proposal.on_boundary)).to(damping.device)
        proposal = replace(proposal, predicted_reduction=promised)
        actual = judgement.rounded(proposal, actual_reduction, self.rounding)
        good = judgement.above(actual, 0.75, promised) & (promised > 0)
        poor = judgement.below(actual, 0.25, promised) & (promised > 0)
        steps.add_(1.0)
        if self.rule == "martens":
            accepted = credible
            look = torch.remainder(steps, self.interval) == 0
            down, up = self.omega**self.interval, self.omega**-self.interval
        else:
            accepted = credible & judgement.above(actual, self.eta, promised)
            look = torch.ones_like(credible)
            down, up = self.decrease, self.increase
        floor = torch.where(held, damping.clamp(max=self.initial_damping), torch.zeros_like(damping))
        eased = torch.maximum(damping * down, floor)
        moved = torch.where(good, eased, torch.where(poor, damping * up, damping))
        new = torch.where(credible, torch.where(look, moved, damping), damping * self.rejection)
        new = new.clamp(self.min_damping, self.max_damping)
        damping.copy_(new)
        return Verdict(accepted, judgement.ratio(actual, promised), new, actual_reduction)

    def review(self, state: State, proposal: Proposal, loss: Tensor | None) -> Verdict:
        """The same rule for the previous step, but what was done stays done."""
        damping = cast(Tensor, state["damping"])
        before = damping.clone()
        held = cast(Tensor, proposal.diagnostics.get("shortened", proposal.on_boundary))
        previous = exchange(state, replace(proposal, on_boundary=held), loss)
        if previous is None:
            nothing = torch.full_like(before, math.nan)
            return Verdict(torch.ones((), dtype=torch.bool, device=before.device), nothing, before, nothing)
        verdict = self.judge(state, previous.proposal, previous.actual_reduction)
        return keep_unless(previous.known, verdict, damping, before)


def shortened(on_boundary: Tensor, lr: Sequence[float | Tensor] | None) -> Tensor:
    """Whether a region or a learning rate below 1 made the step shorter than the model's own, a 0-d bool."""
    held = on_boundary
    for eta in lr or ():
        if isinstance(eta, Tensor):
            held = held | (eta.reshape(()) < 1).to(held.device)
        elif eta < 1:
            return torch.ones_like(held)
    return held


def momentum_share(gradient: Sequence[Tensor], step: Sequence[Tensor], context: StepContext) -> Tensor | None:
    """(m̂ - g)ᵀp of the step p as it is taken: what the running mean m̂ promises beyond the batch's own g."""
    if context.raw_gradient is None or all(
        g is m for g, m in zip(context.raw_gradient, gradient, strict=True)
    ):
        return None
    taken = scaled_by_lr(step, context.lr)
    rows = [
        (p, m - g) for p, m, g in zip(taken, gradient, context.raw_gradient, strict=True) if g is not None
    ]
    return vectors.dot([p for p, _ in rows], [d for _, d in rows]) if rows else None
