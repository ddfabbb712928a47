"""The compiled elementwise step as the optimizer takes it: signals in, state and record out, nothing read back.

Legend: see ``optimizers.elementwise``; ℓ the loss, P the predicted reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature.protocols import State
from optimizers import step_info
from optimizers.compiled.host_path import HostPasses, HostRecord, HostSteps
from optimizers.compiled.kernels import Kind
from optimizers.compiled.native import NativePasses, serves
from optimizers.compiled.tensors import Options, Settled, Tensors, suits
from optimizers.compiled.two_pass import TwoPass
from optimizers.distributed import Ranks
from optimizers.elementwise import Formula
from optimizers.rounding import NARROW
from optimizers.scaling import GradScale
from optimizers.step_info import StepInfo
from trust_region import Proposal, TrustRegion, Verdict


@dataclass
class Open:
    """The last step, whose prediction is not settled yet.

    Args:
        region_state: where P is kept.
        records: whether P is kept (a step with a finite gradient and loss), 0-d bool.
        info: the record to complete.
    """

    region_state: State
    records: Tensor
    info: StepInfo


def has_passes(formula: Formula, kind: Kind) -> bool:
    """Whether there are passes; those of ``torch.compile`` take no narrow state and no scale of the step before."""
    return serves(kind) or not (kind.state == NARROW or formula.lags)


def passes_for(formula: Formula, trust_region: TrustRegion, kind: Kind, seed: int) -> TwoPass | HostPasses:
    """The passes for tensors of a kind: native on a CPU with a C++ compiler, else those of ``torch.compile``."""
    if serves(kind):
        return NativePasses(formula, trust_region.radius, seed)
    return TwoPass(formula, trust_region.radius)


class ElementwisePath:
    """Takes the steps of one optimizer.

    Args:
        trust_region: whose policy adapts the radius.
        tensors: what it works on; another path is built where the state is replaced.
        kind: of those.
        passes: over its memory.
    """

    def __init__(
        self, trust_region: TrustRegion, tensors: Tensors, kind: Kind, passes: TwoPass | HostPasses
    ) -> None:
        self.trust_region = trust_region
        self.tensors, self.kind, self.passes = tensors, kind, passes
        self.on_host = HostSteps(trust_region)
        self._open: Open | None = None

    def takes(self, gradient: Sequence[Tensor | None]) -> bool:
        """Whether a step with these gradients (``.grad`` as it is) is of this path's kind."""
        return suits(gradient, self.kind)

    def step_(
        self,
        gradient: Sequence[Tensor],
        options: Options,
        loss: Tensor | None,
        scale: GradScale,
        ranks: Ranks,
        region_state: State,
        skipped_steps: Tensor,
    ) -> StepInfo | HostRecord:
        """One step; a gradient that is not finite (on any rank) changes nothing but ``skipped_steps``."""
        passes = self.passes
        if not isinstance(passes, TwoPass):
            return self._step_on_host(
                passes, gradient, options, loss, scale, ranks, region_state, skipped_steps
            )
        agreed = loss

        def decide(finite: Tensor) -> Tensor:
            nonlocal agreed
            agreed, finite = ranks.agree(loss, scale.finite(finite))
            return finite

        radius = cast(Tensor, region_state["radius"])
        settled = passes.step_(self.tensors, gradient, self.kind, options, radius, decide)
        if settled is not None:
            self._complete(settled)
        finite = cast(Tensor, passes.taken and passes.taken.finite)
        skipped_steps.add_(~finite)
        verdict = self._reviewed(region_state, agreed, finite)
        info = self._record(agreed, verdict, finite, region_state, skipped_steps)
        # without a loss P stays too: it belongs to the last loss that was seen
        records = torch.zeros_like(finite) if agreed is None else finite & torch.isfinite(agreed)
        self._open = Open(region_state, records, info)
        return info

    def _step_on_host(
        self,
        passes: HostPasses,
        gradient: Sequence[Tensor],
        options: Options,
        loss: Tensor | None,
        scale: GradScale,
        ranks: Ranks,
        region_state: State,
        skipped_steps: Tensor,
    ) -> HostRecord:
        """The same where the host is the device, in numbers."""
        agreed = loss

        def decide(finite: bool) -> bool:
            nonlocal agreed
            if not ranks.groups and not scale.active:
                return finite
            agreed, taken = ranks.agree(loss, scale.finite(torch.tensor(finite)))
            return bool(taken)

        state = self.on_host.numbers(region_state, skipped_steps)
        lagged = state.get("fisher_scale")
        found = passes.step_on_host_(
            self.tensors, gradient, self.kind, options, state["radius"], lagged, decide
        )
        if found is not None and lagged is not None:
            state["fisher_scale"] = found.scale
        return self.on_host.review(state, agreed, found, self.tensors.size, self.tensors.steps[0].dtype)

    def settle(self) -> None:
        """Complete the last step's record, and the prediction that the policy will divide by."""
        if self._open is not None and isinstance(self.passes, TwoPass):
            settled = self.passes.settle(self.tensors, self.kind)
            if settled is not None:
                self._complete(settled)

    def _complete(self, settled: Settled) -> None:
        if self._open is None:
            return
        held, info = self._open.region_state.get("predicted"), self._open.info
        if isinstance(
            held, Tensor
        ):  # a prediction that overflowed counts as none, as in the policy's own review
            predicted = torch.nan_to_num(settled.predicted, nan=0.0, posinf=0.0, neginf=0.0)
            held.copy_(torch.where(self._open.records, predicted, held))
        info.predicted_reduction = settled.predicted
        if settled.step_norm is not None and settled.inside is not None:
            info.step_norm, info.fisher_active_fraction = settled.step_norm, settled.inside
        self._open = None

    def _reviewed(self, region_state: State, loss: Tensor | None, finite: Tensor) -> Verdict | None:
        """The policy's word on the previous step; a skipped step leaves its state alone."""
        if not self.trust_region.lagged:
            return None
        before = {k: v.clone() for k, v in region_state.items() if isinstance(v, Tensor)}
        # This step's own prediction follows when it is settled; until then the previous one stays.
        held = before.get("predicted", torch.zeros_like(finite, dtype=torch.float32))
        unknown = torch.full_like(held, float("nan"))
        proposal = Proposal(
            [], predicted_reduction=held, step_norm=unknown, on_boundary=finite, predicted_parts=[]
        )
        verdict = self.trust_region.review(region_state, proposal, loss)
        for key, old in before.items():
            now = cast(Tensor, region_state[key])
            now.copy_(torch.where(finite, now, old))
        return verdict

    def _record(
        self,
        loss: Tensor | None,
        verdict: Verdict | None,
        finite: Tensor,
        region_state: State,
        skipped_steps: Tensor,
    ) -> StepInfo:
        nan = torch.full((), float("nan"), device=finite.device)
        actual = None if verdict is None else verdict.actual_reduction
        return StepInfo(
            loss=nan if loss is None else loss,
            ratio=nan if verdict is None else torch.where(finite, verdict.ratio, nan),
            radius=step_info.radius_of(region_state, nan),
            damping=step_info.damping_of(region_state, nan),
            predicted_reduction=nan,
            actual_reduction=nan if actual is None else torch.where(finite, actual, nan),
            accepted=finite,
            step_norm=nan,
            fisher_active_fraction=nan,
            skipped_steps=skipped_steps.clone(),
        )
