"""One step as a free function over lists of tensors, closed over estimator, region and policy.

Free, because Dynamo does not trace methods of objects that an ``Optimizer`` holds. It reads like the paper: average
the gradient, refresh the curvature, propose a step inside the region; a lagged policy then reviews the previous step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.protocols import CurvatureEstimator, CurvatureOperator, Observation, State
from optimizers.distributed import ALONE, Ranks, over_ranks
from optimizers.momentum import Momentum
from trust_region import Proposal, StepContext, TrustRegion, Verdict


@dataclass(frozen=True)
class Composition:
    """The three choices, and how gradients are averaged.

    Args:
        curvature: what curvature.
        trust_region: what region, and how its radius adapts.
        momentum: how the gradient is averaged; ``None`` takes it as it is.
        ranks: the processes that share the step.
    """

    curvature: CurvatureEstimator
    trust_region: TrustRegion
    momentum: Momentum | None
    ranks: Ranks = ALONE


def averaged_gradient(
    momentum: Momentum | None,
    gradient: Sequence[Tensor | None],
    buffers: Sequence[Tensor],
    counts: Sequence[Tensor],
    betas: Sequence[float | Tensor],
    params: Sequence[Tensor],
) -> list[Tensor]:
    """The gradient that the model is built from: zeros for a parameter that has none in this step.

    Without buffers nothing is averaged.
    """
    live = [i for i, g in enumerate(gradient) if g is not None]
    if live:
        torch._foreach_add_([counts[i] for i in live], 1.0)
    if momentum is None or not buffers:
        averaged = {i: gradient[i] for i in live}
    else:
        means = momentum.average_(
            [buffers[i] for i in live],
            [gradient[i] for i in live],  # type: ignore[misc]
            [counts[i] for i in live],
            [betas[i] for i in live],
        )
        averaged = dict(zip(live, means, strict=True))
    return [
        averaged[i]
        if i in averaged
        else torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))  # type: ignore[misc]
        for i, p in enumerate(params)
    ]


def refreshed(composition: Composition, seen: Observation, curvature_state: State) -> CurvatureOperator:
    """The curvature, after what was seen."""
    composition.curvature.update(curvature_state, seen)
    operator = composition.curvature.operator(curvature_state)
    if seen.graphs:  # products go through this rank's graph, and B is the mean over ranks
        operator = over_ranks(operator, seen.parameters, composition.ranks)
    return operator


def propose(
    composition: Composition,
    operator: CurvatureOperator,
    seen: Observation,
    region_state: State,
    averaged: Sequence[Tensor],
    lr: Sequence[float | Tensor],
) -> Proposal:
    """The step inside the region."""
    context = StepContext(lr=lr, params=seen.parameters, raw_gradient=seen.gradient, loss=seen.loss)
    return composition.trust_region.propose(region_state, averaged, operator, context)


def review(
    composition: Composition, region_state: State, proposal: Proposal, loss: Tensor | None
) -> Verdict | None:
    """A lagged policy's word on the previous step, now that this step's loss is known."""
    if not composition.trust_region.lagged:
        return None
    return composition.trust_region.review(region_state, proposal, loss)


def apply_(
    params: Sequence[Tensor],
    gradient: Sequence[Tensor | None],
    step: Sequence[Tensor],
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float | Tensor],
) -> None:
    """θ ← θ - ηλθ + step, for the parameters that have a gradient (decoupled decay, arXiv 1711.05101)."""
    for p, g, s, eta, decay in zip(params, gradient, step, lr, weight_decay, strict=True):
        if g is None:
            continue
        if isinstance(decay, Tensor) or decay != 0.0:
            p.mul_(1.0 - eta * decay)
        p.add_(s.to(p.dtype))
