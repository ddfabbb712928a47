"""The optimizer: three choices composed into a ``torch.optim.Optimizer``.

Three classes, each one concern: :class:`Composed` holds the parts and their state, :class:`Observing` takes in losses,
and the one here steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import TRANSIENT, Needs, Observation, State
from optimizers import core, row_solves, state_layout, step_info, trial
from optimizers.autocast import Autocast
from optimizers.checks import check_direction, check_unmoved, signal_names
from optimizers.compiled.captured_path import refuse_capture
from optimizers.distributed import Ranks, find_ranks
from optimizers.observing import Observing
from optimizers.rounding import key_of, put_back, widened
from optimizers.scaling import GradScale
from optimizers.sharding import local
from optimizers.step_info import StepInfo
from optimizers.step_paths import Held
from trust_region import Proposal, Verdict


class SecondOrder(Observing):
    """An optimizer made of three choices: what curvature, what region of trust, how its radius adapts.

    Args:
        params: parameters, or groups of them; a group may set ``lr``, ``momentum``, ``weight_decay`` and ``maximize``.
        lr: η >= 0, multiplies the proposed step; where a trial is judged leave it at 1.
        curvature: the estimator of B; ``None`` is the identity.
        trust_region: region, solver and radius policy; ``None`` believes the model everywhere.
        momentum: β in [0, 1) of the gradient's bias-corrected running mean, or a
            :class:`optimizers.momentum.Momentum`; 0 keeps none.
        weight_decay: λ >= 0, decoupled: θ ← θ - ηλθ.
        maximize: climb in place of descending; for curvature that needs only gradients.
        compile: ``True`` takes the step in compiled kernels, for compositions whose signals are gradients (another is
            refused with the reason): fused passes for SOAA, Adam and AdamW, one graph over all tensors for the rest,
            and on a CPU one fused pass for a measured diagonal, Sophia's and AdaHessian's;
            ``"auto"`` does so on an accelerator, where it can, and says once where no compiler works; ``False`` never.
            Without: foreach calls, on a CPU block by block.
        process_group: the data-parallel ranks over which losses and statistics are averaged: ``"auto"`` is the default
            group where ``torch.distributed`` is initialised, ``None`` nobody. Sharded parameters know theirs.
        state_dtype: ``torch.bfloat16`` keeps momentum and all state that is shaped like the parameters in half the
            bytes, rounded up or down at random (``optimizers/rounding.py``), where only gradients are needed; ``None``
            keeps float32 or wider.
        rounding_seed: of that rounding; every optimizer has its own.
        capturable: take steps in which the host decides, reads and sends nothing, so that ``torch.cuda.graph`` can
            record them; for compositions whose signals are gradients, without host counters (another is refused with
            the reason).
        beside_outputs: what curvature that is taken at the outputs does with a loss that reaches the parameters by
            another way (a penalty on weights or activations, a second output): ``"refuse"`` is an error; ``"drop"``
            leaves that part out of the curvature, while the gradient keeps it.
        **flags: ``foreach``, ``fused``, ``differentiable``, for scripts that pass them everywhere: what asks for the
            step's own way is taken, what asks for another is refused.

    Raises:
        ValueError: for arguments out of range, parts that do not fit together, or a flag that asks for another step.
        TypeError: for an option that does not exist.

    >>> from curvature import EmpiricalFisherDiagonal
    >>> from trust_region import RmsBox, SOAARadius, TrustRegion
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = SecondOrder(
    ...     model.parameters(), lr=1e-2, curvature=EmpiricalFisherDiagonal(),
    ...     trust_region=TrustRegion(region=RmsBox(), radius=SOAARadius(total_steps=100)), momentum=0.9)
    >>> loss = model(torch.ones(2, 3)).square().mean()
    >>> optimizer.backward(loss)
    >>> optimizer.step()
    >>> float(optimizer.step_info.radius)
    1.0

    Cost: that of its parts; see their docstrings.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """Take one step with the gradients in ``.grad``, which are not changed.

        Args:
            closure: recomputes the loss (``zero_grad``, forward, ``optimizer.backward``) and returns it; required by
                policies that judge a trial point, which run it a second time.
            loss: the loss at the present parameters; may be left out after ``optimizer.backward(loss)``.

        Returns:
            what the closure returned the first time, or ``None``.

        Raises:
            RuntimeError: where a signal that the composition needs is missing; the message names the remedy.
        """
        self._start_again_if_cleared()
        for group in self.param_groups:  # which anyone may have changed since
            check_direction(group, self.needs)
        held = self._held()
        params = held.shards
        if not self.capturable:
            refuse_capture(params[0].device)
        check_unmoved(held.params, self._built_for)
        scale = GradScale.of(self)
        scale.check(self.needs, self._pending, closure, loss)
        returned = None
        before: trial.RandomState = []
        if closure is not None:
            if self.needs.trial or getattr(self.curvature, "evaluates_gradients", False):
                before = trial.random_state(params)
            self._backward_called = False
            with torch.enable_grad():
                returned = closure()
            loss = returned if loss is None else loss
        elif self.needs.trial:
            raise RuntimeError(
                f"{type(self.trust_region.radius).__name__} judges a trial point: call optimizer.step(closure), where "
                "closure() recomputes the loss on the same batch"
            )
        value = trial.loss_tensor(loss, params)
        if closure is not None and self._pending.backwards > 1:
            value = None  # a trainer's closure ends an accumulation: it returns the last part, backward saw them all
        cast = Autocast.found(params[0].device)
        try:
            with cast.set_aside():
                self._step(
                    held, cast.around(closure), self._pending.loss if value is None else value, before, scale
                )
        finally:
            self._pending.discard()
            self._curvature_state.pop(TRANSIENT, None)
            self._region_state.pop(TRANSIENT, None)
        return returned

    def _step(
        self,
        held: Held,
        closure: Callable[[], Any] | None,
        loss: Tensor | None,
        before: trial.RandomState,
        scale: GradScale,
    ) -> None:
        params = held.shards
        ranks = find_ranks(held.params, self.process_group)
        info = self._paths.taken(held, loss, scale, ranks, self._check_signals)
        if info is not None:
            if isinstance(info, StepInfo):
                self.step_info = info
            else:
                self._recorded = info
            return
        self._paths.settle()
        self._paths.forget()  # built anew, for counts that no longer agree
        gradient = scale.unscaled(self._gradient())
        if all(g is None for g in gradient):
            return
        self._check_signals(loss)
        if loss is not None:
            loss = loss.to(params[0].device)
        finite = scale.finite(vectors.all_finite([g for g in gradient if g is not None])).to(params[0].device)
        if self._pending.diverged:
            finite = torch.zeros_like(finite)
        loss, finite = ranks.agree(loss, finite)
        if not bool(finite) or (closure is not None and self.needs.trial and not _is_finite(loss)):
            self._skip(loss)
            return
        symmetric = getattr(self.curvature, "symmetric_statistics", ())
        ranks.mean_statistics_(self._pending.statistics, symmetric)
        wide = widened(held)
        key = None if wide is held else key_of(self.rounding_seed, held.steps[0])
        with ranks.whole():
            self._move(wide, closure, gradient, loss, before, ranks)
        if key is not None:
            put_back(held, wide, key)
        self._scatter()

    def _move(
        self,
        held: Held,
        closure: Callable[[], Any] | None,
        gradient: Sequence[Tensor | None],
        loss: Tensor | None,
        before: trial.RandomState,
        ranks: Ranks,
    ) -> None:
        """Refresh the curvature, propose, and move (or try)."""
        composition = self._composition(ranks)
        self._recorded = None  # it was of the state that changes now
        params = self._shards
        seen = Observation(
            gradient=gradient,
            loss=loss,
            statistics=self._pending.statistics,
            graphs=self._pending.graphs,
            parameters=params,
            step_change=self._step_change(),
            gradient_at=self._gradient_at(closure, before),
        )
        taken = self._paths.in_parts(held, gradient, loss, ranks)
        if taken is not None:
            self._record(loss, taken, core.review(composition, self._region_state, taken, loss), None)
            return
        operator = core.refreshed(composition, seen, held.curvature_state)
        recorded = self._paths.in_place(held, operator, gradient, self._pending.rows, ranks)
        if recorded is not None:
            self._record_later(loss, recorded)
            return
        betas, lr = self._per_parameter("momentum"), self._per_parameter("lr")
        averaged = core.averaged_gradient(
            self.momentum,
            gradient,
            held.momentum_buffers(),
            held.steps,
            betas,
            params,
        )
        operator = row_solves.prepared(operator, self.momentum, held, gradient, averaged, self._pending.rows)
        proposal = core.propose(composition, operator, seen, held.region_state, averaged, lr)
        row_solves.keep(operator, held)
        actual: Tensor | None = None
        verdict: Verdict | None
        if self.needs.trial and self.trust_region.tries(self._region_state):
            verdict, actual = self._try(
                cast("Callable[[], Any]", closure), proposal, gradient, loss, before, ranks
            )
        else:
            verdict = core.review(composition, self._region_state, proposal, loss)
            if self.needs.trial:
                self.trust_region.pass_over(self._region_state)
            self._apply(proposal.step, gradient)
        self._record(loss, proposal, verdict, actual)

    def _gradient(self) -> list[Tensor | None]:
        """``.grad`` in the precision of the state, negated where a group climbs."""
        gradient: list[Tensor | None] = []
        for i, (p, climbs) in enumerate(zip(self._params, self._per_parameter("maximize"), strict=True)):
            g = state_layout.dense_or_none(p, i)
            if g is not None:
                g = g.to(vectors.compute_dtype(p.dtype))
                g = -g if climbs else g
            gradient.append(g)
        return gradient

    def _gradient_at(
        self, closure: Callable[[], Any] | None, before: trial.RandomState
    ) -> Callable[[Sequence[Tensor]], list[Tensor]] | None:
        """shift ↦ the closure's gradient at θ + shift, for curvature by finite differences."""
        if closure is None or not getattr(self.curvature, "evaluates_gradients", False):
            return None
        signs = [-1.0 if climbs else 1.0 for climbs in self._per_parameter("maximize")]

        def gradient_at(shift: Sequence[Tensor]) -> list[Tensor]:
            self._in_trial, self._trial_needs_gradient = True, True
            try:
                found = trial.shifted_gradient(closure, self._params, self._shards, before, shift)
            finally:
                self._in_trial = False
            return [
                torch.zeros_like(p, dtype=vectors.compute_dtype(p.dtype))
                if g is None
                else sign * local(g).to(vectors.compute_dtype(p.dtype))
                for sign, g, p in zip(signs, found, self._shards, strict=True)
            ]

        return gradient_at

    def _check_signals(self, loss: Tensor | None) -> None:
        """Say in the first step what is missing, and how to give it."""
        name = type(self.curvature).__name__
        if self.needs.graph and self._due() and not (self._pending.measured or self._pending.diverged):
            argument = "loss, outputs" if self.needs.outputs else "loss"
            raise RuntimeError(
                f"{name} needs {signal_names(self.needs.graph)}, which only the loss's graph can give: "
                f"call optimizer.backward({argument}) in place of loss.backward()"
            )
        if Needs.LOSS in self.needs and loss is None and not self._warned_no_loss:
            self._warned_no_loss = True
            warnings.warn(
                f"{type(self.trust_region.radius).__name__} adapts by the loss, and this step was given none, so the "
                "radius stays as it is: call optimizer.backward(loss), step(loss=loss) or step(closure)",
                stacklevel=5,
            )

    def _skip(self, loss: Tensor | None) -> None:
        """A gradient that is not finite enters nothing; the record counts the step."""
        skipped = self.state[self._params[0]]["skipped_steps"].add_(1.0)
        self.step_info = step_info.of_skip(loss, self._region_state, skipped)

    def _step_change(self) -> list[Tensor] | None:
        """θ_t - θ_{t-1}, for quasi-Newton pairs."""
        if not getattr(self.curvature, "tracks_steps", False):
            return None
        return [local(self.state[p]["step_change"]) for p in self._params]

    def _apply(self, step: Sequence[Tensor], gradient: Sequence[Tensor | None]) -> None:
        params, changes = self._shards, self._step_change()
        before = vectors.copy(params) if changes is not None else []
        core.apply_(params, gradient, step, self._per_parameter("lr"), self._per_parameter("weight_decay"))
        for change, p, old in zip(changes or [], params, before, strict=False):
            change.copy_(p - old)

    def _try(
        self,
        closure: Callable[[], Any],
        proposal: Proposal,
        gradient: Sequence[Tensor | None],
        loss: Tensor | None,
        before: trial.RandomState,
        ranks: Ranks,
    ) -> tuple[Verdict, Tensor]:
        """Move, evaluate the trial point, and stay or go back."""
        if loss is None:
            raise RuntimeError(
                f"{type(self.trust_region.radius).__name__} compares losses: the closure must return the loss"
            )
        params = self._shards
        if float(proposal.step_norm) == 0.0:  # a stationary point: there is nothing to try
            still = torch.zeros((), dtype=torch.bool, device=loss.device)
            return Verdict(
                still, torch.full_like(loss, float("nan")), step_info.radius_of(self._region_state, loss)
            ), torch.zeros_like(loss)
        saved = vectors.copy(params)
        self._apply(proposal.step, gradient)
        wants_gradient = Needs.TRIAL_GRADIENT in self.needs
        self._in_trial, self._trial_needs_gradient = True, wants_gradient
        accepted = False
        try:
            # A closure that calls loss.backward() itself needs a graph for it; its gradients are put back.
            with_graph = wants_gradient or not self._backward_called
            trial_loss, trial_gradient = trial.evaluate(
                closure, self._params, before, with_gradient=with_graph
            )
            if trial_loss is None:
                raise RuntimeError("the closure returned a loss the first time and None at the trial point")
            trial_loss = ranks.mean_(trial_loss.to(loss.dtype).clone())
            # Compared in the precision of the policy: half-precision losses would hide small reductions.
            actual = loss.to(proposal.step_norm.dtype) - trial_loss.to(proposal.step_norm)
            norm = trial.gradient_norm(trial_gradient) if wants_gradient else None
            verdict = self.trust_region.judge(self._region_state, proposal, actual, norm)
            accepted = bool(verdict.accepted)
        finally:
            self._in_trial = False
            if not accepted:
                for p, old in zip(params, saved, strict=True):
                    p.copy_(old)
                for change in self._step_change() or []:
                    change.zero_()
        return verdict, actual

    # -- telemetry ------------------------------------------------------------------------------------------------

    def _record_later(self, loss: Tensor | None, proposal: Callable[[], Proposal]) -> None:
        """Note the record of a step, to be formed from the state that it left; at once where that is rounded."""
        region: State = {k: v.clone() for k, v in self._region_state.items() if isinstance(v, Tensor)}
        skipped = self.state[self._params[0]]["skipped_steps"].clone()

        def record() -> StepInfo:
            return step_info.of_step(loss, proposal(), None, None, region, skipped)

        if self.state_dtype is None:
            self._recorded = record
        else:
            self.step_info = record()

    def _record(
        self, loss: Tensor | None, proposal: Proposal, verdict: Verdict | None, actual: Tensor | None
    ) -> None:
        self.step_info = step_info.of_step(
            loss, proposal, verdict, actual, self._region_state, self.state[self._params[0]]["skipped_steps"]
        )


def _is_finite(loss: Tensor | None) -> bool:
    return loss is None or bool(torch.isfinite(loss))
