"""The compiled step of any composition whose signals are gradients, as the optimizer takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvature import vectors
from optimizers.compiled.graph import compiled, everything, graph_of, is_ordinary, tensors_of
from optimizers.core import Composition
from optimizers.distributed import Ranks
from optimizers.scaling import GradScale
from optimizers.state_layout import SEPARATOR
from optimizers.step_info import StepInfo

if TYPE_CHECKING:
    from optimizers.step_paths import Held

BACKEND = "inductor"
"""What compiles the graph."""

GroupNumbers = tuple[Tensor, Tensor, Tensor | None, bool]
"""η, β, λ (``None`` for 0), 0-d each, and whether the loss is climbed, of one group."""


class GraphPath:
    """Takes the ordinary steps of one optimizer by one graph over all of its tensors.

    Args:
        composition: what the steps are of.
        seed: of the rounding of state in bfloat16.

    Cost: compiled once for the shapes at hand, which takes longer the more tensors there are; every intermediate that
    is not a reduction or a matrix product stays in registers.
    """

    def __init__(self, composition: Composition, seed: int = 0) -> None:
        self.composition = composition
        self._counts: Callable[..., None] | None = getattr(composition.curvature, "advance", None)
        self._overcounted: tuple[Held, Tensor] | None = None
        self._step = compiled(graph_of(composition, seed), BACKEND)

    def takes(self, held: Held, gradient: Sequence[Tensor | None]) -> bool:
        """Whether every tensor has a gradient like itself, and the curvature is not refreshed in this step."""
        device = held.shards[0].device
        if not is_ordinary(self.composition.curvature, held.curvature_state):
            self.settle()
        return is_ordinary(self.composition.curvature, held.curvature_state) and all(
            g is not None
            and g.layout is torch.strided
            and g.dtype == p.dtype
            and g.device == device == p.device
            for p, g in zip(held.shards, gradient, strict=True)
        )

    def settle(self) -> None:
        """Take back the skipped steps that the estimator's counters hold; reads the device."""
        if self._counts is not None and self._overcounted is not None:
            held, missed = self._overcounted
            self._overcounted = None
            self._count(held, -int(missed))

    def _count(self, held: Held, steps: int) -> None:
        """Move the estimator's counters, which are numbers, so that the parameters' state needs the new ones."""
        assert self._counts is not None
        self._counts(held.curvature_state, steps)
        for key, value in held.curvature_state.items():
            if isinstance(value, (int, float)):
                held.state[held.params[0]]["curvature" + SEPARATOR + key] = value

    def step_(
        self,
        held: Held,
        gradient: Sequence[Tensor],
        loss: Tensor | None,
        scale: GradScale,
        ranks: Ranks,
    ) -> StepInfo:
        """One step; a gradient that is not finite (on any rank) changes nothing but ``skipped_steps``."""
        device = held.skipped.device
        allowed = scale.finite(torch.ones((), dtype=torch.bool, device=device))
        if ranks.groups:
            loss, allowed = ranks.agree(loss, allowed & vectors.all_finite(list(gradient)).to(device))
        params, buffers, counts = [p.detach() for p in held.shards], held.momentum_buffers(), held.steps
        curvature_state, region_state = tensors_of(held.curvature_state), tensors_of(held.region_state)
        record, scalars = self._step(
            params,
            [g.detach() for g in gradient],
            buffers,
            counts,
            curvature_state,
            region_state,
            [self.numbers(i, group, held.skipped) for i, group in enumerate(held.groups)],
            [i for i, group in enumerate(held.groups) for _ in group["params"]],
            loss if loss is None else loss.detach(),
            None if scale.scale is None else scale.scale.reciprocal().to(device),
            allowed,
            held.skipped,
        )
        changed = everything(params, buffers, counts, curvature_state, region_state)
        torch._foreach_copy_([x for x in changed if x.dim() == 0], scalars)
        if self._counts is not None:
            self._count(held, 1)
            missed = record["skipped_steps"] - held.skipped
            before = None if self._overcounted is None else self._overcounted[1]
            self._overcounted = held, missed if before is None else before + missed
        held.skipped.copy_(record["skipped_steps"])
        return StepInfo(**record)

    def numbers(self, index: int, group: Mapping[str, Any], like: Tensor) -> GroupNumbers:
        """The numbers of the group of that index, as tensors on the device of ``like``."""
        decay = group["weight_decay"]
        host = [0.0 if isinstance(group["lr"], Tensor) else group["lr"], group["momentum"], decay]
        numbers = torch.tensor(host, dtype=like.dtype)
        lr, beta, weight_decay = _sent(numbers, like.device).unbind()
        if isinstance(group["lr"], Tensor):
            lr = group["lr"].detach().to(like).reshape(())
        return lr, beta, None if decay == 0.0 else weight_decay, bool(group["maximize"])


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device, without a wait."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)
