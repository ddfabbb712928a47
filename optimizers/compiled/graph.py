"""Any composition whose signals are gradients, as one graph: the general step of ``core.py``, traced and compiled.

What is traced is a free function over lists of tensors that closes over estimator, region and policy, which run as they
stand. Everything that a schedule moves comes in as a tensor, so nothing is compiled twice. The step works on copies and
is written back where every gradient was finite; a compiler removes the copies.

Estimators whose ordinary steps are tensors alone, and who now and then do more on the host (an eigendecomposition), say
so by ``ordinary(state)``; such a step then goes the general way, and the others call ``absorb`` and ``advance``:

- ``ordinary(state) -> bool``: whether the coming update is of that kind; host knowledge only;
- ``absorb(state, seen)``: that update, without a number of the host;
- ``advance(state, steps=1)``: the host's own counters after it. The host does not wait to learn whether a step was
  skipped, so it counts every one, and takes the skipped ones back (``steps < 0``) before it believes that one is due.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import TRANSIENT, CurvatureEstimator, Observation, State
from optimizers import core, step_info
from optimizers.core import Composition
from optimizers.rounding import NARROW, key_of, rounded
from trust_region import (
    CubicModel,
    Dogleg,
    ExactSubproblem,
    KLConjugateGradient,
    Krylov,
    L2Ball,
    RelativeBall,
    SteihaugCG,
)

Part = Tensor | list[Tensor]


def why_not(composition: Composition) -> str | None:
    """Why a composition has no compiled step, in words; ``None`` where it has one."""
    curvature, region = composition.curvature, composition.trust_region
    needs = curvature.needs | region.needs
    name = type(curvature).__name__
    if needs.graph:
        return f"{name} needs the loss's graph, not gradients alone"
    if needs.trial:
        return f"{type(region.radius).__name__} judges a trial, which evaluates the loss between two halves of a step"
    if getattr(curvature, "evaluates_gradients", False):
        return f"{name} evaluates further gradients during the step"
    if getattr(curvature, "tracks_steps", False):
        return f"{name} keeps pairs of steps and gradients, which it chooses on the host"
    solver = region.region if region.subproblem is None else region.subproblem
    if _reads_host(solver):
        return f"{type(solver).__name__} decides on the host how its solution goes on"
    if getattr(region.radius, "decides_on_host", False):
        return f"{type(region.radius).__name__} decides on the host"
    return None


def _reads_host(solver: object) -> bool:
    """Whether a region or subproblem iterates until the host says that it is enough."""
    if isinstance(solver, RelativeBall):
        return not solver.fill
    iterates = (L2Ball, SteihaugCG, Dogleg, ExactSubproblem, Krylov, CubicModel, KLConjugateGradient)
    return isinstance(solver, iterates) or bool(getattr(solver, "decides_on_host", False))


def is_ordinary(curvature: CurvatureEstimator, state: State) -> bool:
    """Whether the coming update is tensors alone."""
    asked = getattr(curvature, "ordinary", None)
    return True if asked is None else bool(asked(state))


def tensors_of(state: State) -> dict[str, Part]:
    """The entries of a state that are tensors, or lists of them."""
    return {
        key: cast(Part, value)
        for key, value in state.items()
        if key != TRANSIENT and isinstance(value, (Tensor, list))
    }


def graph_of(
    composition: Composition, seed: int = 0
) -> Callable[..., tuple[dict[str, Tensor], list[Tensor]]]:
    """The step of a composition as a free function, its own code object: compiled code is kept with that.

    It takes, in the order of the parameters: θ, ``.grad`` as it is, momentum buffers and their counts, the states'
    tensors, (η, β, λ or ``None``, whether the loss is climbed) of every group, the group of every parameter, the loss,
    1/scale of a GradScaler, whether the step may be taken as far as the host side knows, and the skipped steps.
    It returns the record of the step and the new values of all scalars among :func:`everything`.
    """
    curvature, momentum = composition.curvature, composition.momentum
    absorb = getattr(curvature, "absorb", curvature.update)

    def step(
        params: list[Tensor],
        raw: list[Tensor],
        buffers: list[Tensor],
        counts: list[Tensor],
        curvature_state: dict[str, Part],
        region_state: dict[str, Part],
        groups: list[tuple[Tensor, Tensor, Tensor | None, bool]],
        group_of: list[int],
        loss: Tensor | None,
        unscale: Tensor | None,
        allowed: Tensor,
        skipped: Tensor,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        gradient = [_signed(g, unscale, groups[k][3]) for g, k in zip(raw, group_of, strict=True)]
        finite = vectors.all_finite(gradient) & allowed
        key = key_of(seed, counts[0])
        own, theirs = _copied(curvature_state), _copied(region_state)
        means, seen_counts = [_wide(_copy(x)) for x in buffers], [_copy(x) for x in counts]
        lr = [groups[k][0] for k in group_of]
        seen = Observation(gradient=gradient, loss=loss, parameters=params)
        absorb(own, seen)
        operator = curvature.operator(own)
        averaged = core.averaged_gradient(
            momentum, gradient, means, seen_counts, [groups[k][1] for k in group_of], params
        )
        proposal = core.propose(composition, operator, seen, theirs, averaged, lr)
        verdict = core.review(composition, theirs, proposal, loss)
        moved = [_copy(p) for p in params]
        core.apply_(moved, gradient, proposal.step, lr, [_decay(groups[k][2]) for k in group_of])
        info = step_info.of_step(loss, proposal, verdict, None, theirs, skipped + ~finite)
        number = int(_narrow(means, buffers, key, 0))
        for new, old in ((own, curvature_state), (theirs, region_state)):
            for name, part in old.items():
                if isinstance(part, list):
                    number += _narrow(cast("list[Tensor]", new[name]), part, key, number)
        changed = [*moved, *means, *seen_counts, *_flat(own, curvature_state), *_flat(theirs, region_state)]
        scalars = _written_back(
            everything(params, buffers, counts, curvature_state, region_state), changed, finite
        )
        return _recorded(info, theirs, region_state, finite), scalars

    code = step.__code__.replace()
    return types.FunctionType(code, step.__globals__, step.__name__, step.__defaults__, step.__closure__)


def _signed(g: Tensor, unscale: Tensor | None, climbs: bool) -> Tensor:
    g = g.to(vectors.compute_dtype(g.dtype))
    if unscale is not None:
        g = g * unscale.to(g.dtype)
    return -g if climbs else g


def _decay(weight_decay: Tensor | None) -> Tensor | float:
    return 0.0 if weight_decay is None else weight_decay


def _copy(x: Tensor) -> Tensor:
    """A copy to work on; what shares memory with itself stands for a shape and is never written."""
    return x if _overlaps(x) else x.clone()


def _overlaps(x: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))


def _wide(x: Tensor) -> Tensor:
    """State that is kept in bfloat16 in the precision that is computed in."""
    return x.float() if x.dtype == NARROW else x


def _narrow(new: list[Tensor], old: Sequence[Tensor], key: Tensor, number: int) -> bool:
    """Round what is kept in bfloat16, in the list; whether there was any."""
    found = False
    for k, (x, y) in enumerate(zip(old, new, strict=True)):
        if x.dtype == NARROW:
            new[k], found = rounded(y, key, k, number), True
    return found


def _copied(state: Mapping[str, Part]) -> State:
    return {k: [_wide(_copy(x)) for x in v] if isinstance(v, list) else _copy(v) for k, v in state.items()}


def _flat(state: Mapping[str, object], like: Mapping[str, Part]) -> list[Tensor]:
    """The tensors of a state one after another, in the order of ``like``."""
    parts = [cast(Part, state[key]) for key in like]
    return [x for part in parts for x in (part if isinstance(part, list) else [part])]


def everything(
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    counts: Sequence[Tensor],
    curvature_state: Mapping[str, Part],
    region_state: Mapping[str, Part],
) -> list[Tensor]:
    """All that a step changes, but the skipped steps."""
    states = [*_flat(curvature_state, curvature_state), *_flat(region_state, region_state)]
    return [*params, *buffers, *counts, *states]


def _written_back(old: Sequence[Tensor], new: Sequence[Tensor], finite: Tensor) -> list[Tensor]:
    """Write what changed, where the step was taken; the new scalars are returned, for the caller to write.

    PyTorch 2.13 takes a 0-d float64 tensor on a CPU for a number, and loses what a graph writes to it.
    """
    scalars = []
    for x, y in zip(old, new, strict=True):
        if x.dim() == 0:
            scalars.append(torch.where(finite, y.to(x.dtype), x))
        elif y is not x:
            x.copy_(torch.where(finite, y.to(x.dtype), x))
    return scalars


def _recorded(
    info: step_info.StepInfo, new: State, old: Mapping[str, Part], finite: Tensor
) -> dict[str, Tensor]:
    """The record of this step: of a skipped one only what did not depend on the gradient."""
    nan = torch.full_like(info.step_norm, float("nan"))
    record = {name: torch.where(finite, x, float("nan")) for name, x in info.items() if name != "accepted"}
    for name, read in (("radius", step_info.radius_of), ("damping", step_info.damping_of)):
        record[name] = torch.where(finite, read(new, nan), read(cast(State, old), nan))
    record["loss"], record["skipped_steps"] = info.loss.clone(), info.skipped_steps
    record["accepted"] = info.accepted & finite
    return record


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """``function`` as one graph, for tensors whose shapes stay."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
