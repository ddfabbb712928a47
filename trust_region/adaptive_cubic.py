"""Adaptive cubic regularisation (ARC): the weight σ of the cubic term follows the reduction ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, Needs, State
from trust_region import judgement
from trust_region.protocols import Policy, Proposal, Solution, StepContext, Verdict
from trust_region.trust_region import predicted_parts


@dataclass(frozen=True)
class AdaptiveCubic(Policy):
    """σ falls to ‖g‖ after a very successful step (ρ > η₂), stands after a successful one, doubles otherwise.

    Goes with :class:`CubicModel`. The prediction includes the cubic term, as the paper's ρ does.

    Args:
        initial_sigma: σ₀ in [min_sigma, max_sigma].
        eta1: accept from this ρ, in (0, eta2].
        eta2: very successful above this ρ, < 1.
        increase: factor > 1 after an unsuccessful step.
        min_sigma: > 0, so that σ never vanishes.
        max_sigma: finite.
        rounding: units in the last place of the loss that count as noise.

    After a trial whose loss is not finite σ becomes at least ‖g‖/‖p‖², where the cubic term outweighs the gradient,
    so that a tiny σ does not need hundreds of rejections to be felt.

    >>> policy = AdaptiveCubic()
    >>> state = policy.init([torch.zeros(1)])
    >>> poor = Proposal([torch.ones(1)], torch.tensor(1.0), torch.tensor(1.0), torch.tensor(True))
    >>> policy.judge(state, poor, torch.tensor(0.0)).radius
    tensor(2.)

    Cost: O(P) for the prediction, a handful of scalars.
    Reference: Cartis, Gould & Toint 2011, part I, algorithm 2.1 and section 7 (η₁ = 0.1, η₂ = 0.9, σ₀ = 1).
    """

    initial_sigma: float = 1.0
    eta1: float = 0.1
    eta2: float = 0.9
    increase: float = 2.0
    min_sigma: float = 1e-16
    max_sigma: float = 1e16
    rounding: float = 10.0

    adapts = ("sigma",)

    def __post_init__(self) -> None:
        if not 0 < self.min_sigma < self.max_sigma < math.inf:
            raise ValueError(
                "min_sigma and max_sigma must satisfy 0 < min_sigma < max_sigma < inf, got "
                f"{self.min_sigma}, {self.max_sigma}"
            )
        if not self.min_sigma <= self.initial_sigma <= self.max_sigma:
            raise ValueError(
                f"initial_sigma must be in [{self.min_sigma:g}, {self.max_sigma:g}], got {self.initial_sigma}"
            )
        if not 0 < self.eta1 <= self.eta2 < 1:
            raise ValueError(f"eta1, eta2 must satisfy 0 < eta1 <= eta2 < 1, got {self.eta1}, {self.eta2}")
        if not 1 < self.increase < math.inf:
            raise ValueError(f"increase must be > 1 and finite, got {self.increase}")
        if not self.rounding >= 0:
            raise ValueError(f"rounding must be >= 0, got {self.rounding}")

    @property
    def needs(self) -> Needs:
        """The loss at the trial point."""
        return Needs.GRAD | Needs.LOSS | Needs.TRIAL_LOSS

    def init(self, params: Sequence[Tensor]) -> State:
        """σ₀."""
        return {"sigma": vectors.scalar_like(params, self.initial_sigma)}

    def predict(
        self,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        solution: Solution,
        context: StepContext,
    ) -> list[Tensor]:
        """-(gᵀp + ½pᵀBp + (σ/3)‖p‖³), the cubic term shared out by ‖p_i‖²."""
        parts = predicted_parts(gradient, curvature, solution, context)
        sigma = cast(float, solution.diagnostics.get("sigma", 0.0))
        lr = context.lr if context.lr is not None else [1.0] * len(parts)
        norms = [torch.linalg.vector_norm(p) * eta for p, eta in zip(solution.step, lr, strict=True)]
        whole = vectors.norm([n.reshape(1) for n in norms])
        return [a - sigma / 3 * whole.to(n.device) * n**2 for a, n in zip(parts, norms, strict=True)]

    def judge(
        self,
        state: State,
        proposal: Proposal,
        actual_reduction: Tensor,
        trial_gradient_norm: Tensor | None = None,
    ) -> Verdict:
        """Algorithm 2.1, equation (2.6), with the update of section 7."""
        sigma = cast(Tensor, state["sigma"])
        predicted = proposal.predicted_reduction
        credible = judgement.credible(proposal, actual_reduction)
        actual = judgement.rounded(proposal, actual_reduction, self.rounding)
        accepted = credible & judgement.at_least(actual, self.eta1, predicted)
        very = accepted & judgement.above(actual, self.eta2, predicted)
        norm_g = torch.as_tensor(
            cast("float | Tensor", proposal.diagnostics.get("gradient_norm", math.nan)),
            dtype=sigma.dtype,
            device=sigma.device,
        )
        # without ‖g‖ (a solver that does not report it) σ is halved instead
        eased = torch.minimum(sigma, torch.where(torch.isfinite(norm_g), norm_g, 0.5 * sigma))
        felt = norm_g / proposal.step_norm.to(sigma.dtype).clamp(min=torch.finfo(sigma.dtype).tiny) ** 2
        raised = self.increase * sigma
        strongly = torch.where(torch.isfinite(felt), torch.maximum(raised, felt), raised)
        new = torch.where(very, eased, torch.where(accepted, sigma, torch.where(credible, raised, strongly)))
        new = new.clamp(self.min_sigma, self.max_sigma)
        sigma.copy_(new)
        return Verdict(accepted, judgement.ratio(actual, predicted), new, actual_reduction)
