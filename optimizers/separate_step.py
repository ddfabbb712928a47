"""The general step one tensor after another, where nothing joins tensors: LAMB's, LARS's and Muon's on a CPU.

The general path (``core.py``) writes every intermediate vector of all tensors: four to six times the parameters. Where
curvature and region treat each tensor by itself and the radius is fixed, the same functions give the same numbers for
one tensor at a time, and a step holds a layer's worth of vectors at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from curvature import EmpiricalFisherDiagonal, Identity, RootDiagonal, vectors
from curvature.protocols import TRANSIENT, Observation, State
from optimizers import core
from optimizers.core import Composition
from trust_region import FixedRadius, Proposal, RelativeBall, SpectralBall

if TYPE_CHECKING:
    from optimizers.step_paths import Held


def suits(composition: Composition, held: Held, gradient: Sequence[Tensor | None]) -> bool:
    """Whether no number of this composition's step joins tensors, and every tensor of a CPU has a gradient.

    Exact types are asked for, since a subclass may compute something else.
    """
    curvature, trust_region = composition.curvature, composition.trust_region
    if trust_region.subproblem is not None or type(trust_region.radius) is not FixedRadius:
        return False
    if type(trust_region.region) is SpectralBall:
        alone = trust_region.region.fill and type(curvature) is Identity
    elif type(trust_region.region) is RelativeBall:
        inner = curvature.estimator if type(curvature) is RootDiagonal else curvature
        batch = type(inner) is EmpiricalFisherDiagonal and inner.samples == "batch"
        alone = trust_region.region.fill and (batch or type(curvature) is Identity)
    else:
        return False
    return (
        alone
        and len(held.shards) > 1
        and all(g is not None and p.device.type == "cpu" for p, g in zip(held.shards, gradient, strict=True))
    )


def step_(composition: Composition, held: Held, gradient: Sequence[Tensor], loss: Tensor | None) -> Proposal:
    """Move the parameters, in place.

    Returns:
        the record of the step that was taken.
    """
    numbers = list(zip(*(held.each(name) for name in ("momentum", "lr", "weight_decay")), strict=True))
    parts: list[Tensor] = []
    norms, outside = [], []
    for i, g in enumerate(gradient):
        part, norm, at_edge = _moved(composition, held, i, g, loss, numbers[i])
        parts.append(part)
        norms.append(norm)
        outside.append(at_edge)
    return Proposal(
        step=[],
        predicted_reduction=vectors.total(parts),
        step_norm=vectors.norm(norms),
        on_boundary=vectors.any_of(outside),
        predicted_parts=parts,
    )


def _moved(
    composition: Composition,
    held: Held,
    i: int,
    g: Tensor,
    loss: Tensor | None,
    numbers: tuple[Any, Any, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Move tensor i; its share of the prediction, its step's norm, whether it is at the edge. Its vectors die here."""
    p, (beta, lr, decay) = held.shards[i], numbers
    seen = Observation(gradient=[g], loss=loss, parameters=[p])
    operator = core.refreshed(composition, seen, _of_tensor(held.curvature_state, i))
    buffers = held.momentum_buffers()[i : i + 1]
    averaged = core.averaged_gradient(composition.momentum, [g], buffers, [held.steps[i]], [beta], [p])
    region_state = _of_tensor(held.region_state, i)
    proposal = core.propose(composition, operator, seen, region_state, averaged, [lr])
    core.apply_([p], [g], proposal.step, [lr], [decay])
    [part] = cast("list[Tensor]", proposal.predicted_parts)
    return part, proposal.step_norm, torch.as_tensor(proposal.on_boundary)


def _of_tensor(state: State, i: int) -> State:
    """What tensor i has of a state; numbers of all tensors as they are."""
    own: dict[str, Any] = {
        key: [value[i]] if isinstance(value, list) else value
        for key, value in state.items()
        if key != TRANSIENT
    }
    return own
