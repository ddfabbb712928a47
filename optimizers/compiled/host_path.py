"""What surrounds the passes of an elementwise step on a CPU: the host *is* the device there, so numbers are numbers.

A radius policy written in tensors is some sixty small operations a step. In a model whose tensors fill the caches each
of them costs more than its arithmetic, and together as much as a pass over a million parameters. Here the same rules
are evaluated in Python's own numbers, on memory that the state's 0-d tensors share. The record of a step is formed
where it is asked for.

Legend: see ``optimizers.elementwise``; ℓ the loss, P the predicted reduction, ρ the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from curvature.protocols import State
from optimizers.compiled.kernels import Kind
from optimizers.compiled.tensors import Options, Tensors
from optimizers.elementwise import correction
from optimizers.step_info import StepInfo
from trust_region import FixedRadius, SOAARadius, TrustRegion

NAN = math.nan


@dataclass(frozen=True)
class Judged:
    """A policy's word on the previous step, in numbers; NaN for what it did not say."""

    ratio: float = NAN
    actual_reduction: float = NAN


@dataclass(frozen=True)
class Found:
    """What a step that was taken says of itself.

    Args:
        predicted: P; NaN where no policy asks for it.
        scale: 1 + s of its own sums.
        rest: gives P, ‖ηu‖² and the elements inside the box, (3,), from the state as the step left it; reads nothing.
    """

    predicted: float
    scale: float
    rest: Callable[[], Tensor]


class HostPasses(Protocol):
    """Passes over memory that say on the host what they found."""

    def step_on_host_(
        self,
        x: Tensors,
        gradient: Sequence[Tensor],
        kind: Kind,
        options: Options,
        radius: float,
        lagged: float | None,
        decide: Callable[[bool], bool],
    ) -> Found | None:
        """Update the state and move the parameters, in place.

        Args:
            x: the tensors.
            gradient: ``.grad`` as it is: neither unscaled nor negated.
            kind: of the tensors.
            options: hyperparameters.
            radius: d.
            lagged: 1 + s of the step before, where the composition takes that one.
            decide: turns "my gradient is finite" into "the step is taken" (all ranks, a GradScaler).

        Returns:
            what it found; ``None``, with nothing changed, where the step is not taken.
        """


class Numbers:
    """The 0-d tensors of a state, read and written through the memory that they share with NumPy.

    Args:
        state: of the trust region.
        skipped: steps skipped so far, 0-d.
    """

    def __init__(self, state: State, skipped: Tensor) -> None:
        self.tensors = {k: x for k, x in state.items() if isinstance(x, Tensor)} | {"skipped": skipped}
        self.views: dict[str, Any] = {name: x.detach().numpy() for name, x in self.tensors.items()}

    def holds(self, state: State, skipped: Tensor) -> bool:
        """Whether they are still those of this state."""
        return self.tensors["skipped"] is skipped and all(
            self.tensors.get(k) is x for k, x in state.items() if isinstance(x, Tensor)
        )

    def __getitem__(self, name: str) -> float:
        return float(self.views[name])

    def get(self, name: str) -> float | None:
        """The number of that name, where there is one."""
        return self[name] if name in self.views else None

    def __setitem__(self, name: str, value: float) -> None:
        self.views[name][()] = value

    def dtype(self, name: str) -> torch.dtype:
        """What a number is kept in."""
        return self.tensors[name].dtype


def rule_of(trust_region: TrustRegion) -> Callable[[Numbers, float | None, float], Judged]:
    """The policy in numbers: a function of the state, ℓ and P of this step.

    Raises:
        TypeError: for a policy that no elementwise formula goes with.
    """
    policy = trust_region.radius
    if type(policy) is FixedRadius:
        return lambda state, loss, predicted: Judged()
    if type(policy) is SOAARadius and policy.scope == "global":
        return lambda state, loss, predicted: soaa_review(policy, state, loss, predicted)
    raise TypeError(f"{type(policy).__name__} has no rule in numbers: its steps go another way")


def soaa_review(policy: SOAARadius, state: Numbers, loss: float | None, predicted: float) -> Judged:
    """:meth:`trust_region.SOAARadius.review` in numbers."""
    steps = state["policy_steps"] + 1.0
    state["policy_steps"] = steps
    if loss is None or not math.isfinite(loss):
        return Judged()
    beta, seen = policy.beta, state["losses_seen"] + 1.0
    state["losses_seen"] = seen
    state["running_loss"] = loss + (state["running_loss"] - loss) * beta
    actual = state["running_loss"] / correction(seen, beta) - loss
    most = 0.5 * torch.finfo(state.dtype("running_loss")).max
    radius, promised = state["radius"], state["predicted"]
    ratio = NAN
    if promised != 0.0:
        exponent = min(max((steps - 1.0) / policy.total_steps, 0.0), 1.0) if policy.total_steps else 1.0
        # a quotient that would overflow saturates: d is at its bound then, whatever ρ is
        bounded = min(max(actual, -most), most)
        ratio = bounded / max(promised, policy.eps, abs(bounded) / most)
        moved = max(ratio * radius, (1.0 - policy.gamma) ** exponent)
        state["radius"] = min(moved, 1.0 + policy.gamma**exponent)
    # a prediction that overflowed counts as none
    state["predicted"] = predicted if abs(predicted) <= 2.0 * most else 0.0
    return Judged(ratio, actual)


@dataclass(frozen=True)
class HostRecord:
    """What a step leaves for its record.

    Args:
        loss: as it was given.
        judged: on the step before.
        found: by a step that was taken.
        size: elements in all.
        radius: after the step.
        damping: likewise; ``None`` where there is none.
        skipped: steps skipped so far.
        dtype: of sums over the state.
        likes: dtypes of the region's and of the counters' numbers.
    """

    loss: Tensor | None
    judged: Judged
    found: Found | None
    size: int
    radius: float
    damping: float | None
    skipped: float
    dtype: torch.dtype
    likes: tuple[torch.dtype, torch.dtype]

    def __call__(self) -> StepInfo:
        """The record."""
        region, counter = self.likes
        found = torch.full((3,), NAN) if self.found is None else self.found.rest()
        predicted, square, inside = found.to(self.dtype).unbind()

        def number(x: float, dtype: torch.dtype) -> Tensor:
            return torch.tensor(x, dtype=dtype)

        return StepInfo(
            loss=number(NAN, torch.float32) if self.loss is None else self.loss,
            ratio=number(self.judged.ratio, region),
            radius=number(self.radius, region),
            damping=number(NAN if self.damping is None else self.damping, region),
            predicted_reduction=predicted,
            actual_reduction=number(self.judged.actual_reduction, region),
            accepted=torch.tensor(self.found is not None),
            step_norm=square.sqrt(),
            fisher_active_fraction=inside / self.size,
            skipped_steps=number(self.skipped, counter),
        )


class HostSteps:
    """The steps of one optimizer of a single process, on its host.

    Args:
        trust_region: whose policy has a rule in numbers.
    """

    def __init__(self, trust_region: TrustRegion) -> None:
        self.rule = rule_of(trust_region)
        self._numbers: Numbers | None = None

    def numbers(self, region_state: State, skipped: Tensor) -> Numbers:
        """The state's numbers, bound anew where the state was replaced."""
        if self._numbers is None or not self._numbers.holds(region_state, skipped):
            self._numbers = Numbers(region_state, skipped)
        return self._numbers

    def review(
        self,
        state: Numbers,
        loss: Tensor | None,
        found: Found | None,
        size: int,
        dtype: torch.dtype,
    ) -> HostRecord:
        """Count the step and adapt the radius; a step that was not taken changes nothing but its own count."""
        judged = Judged()
        if found is None:
            state["skipped"] += 1.0
        else:
            value = None if loss is None else float(in_dtype(loss, state.dtype("radius")))
            judged = self.rule(state, value, found.predicted)
        return HostRecord(
            loss,
            judged,
            found,
            size,
            state["radius"],
            state.get("damping"),
            state["skipped"],
            dtype,
            (state.dtype("radius"), state.dtype("skipped")),
        )


def in_dtype(x: Tensor, dtype: torch.dtype) -> Any:
    """A 0-d tensor of the CPU as a number in the precision of ``dtype``, through shared memory."""
    return cast(Any, x.detach().to(dtype)).numpy()
