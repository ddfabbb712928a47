"""The optimizer: three choices composed into a ``torch.optim.Optimizer``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import vectors
from curvature.identity import Identity
from curvature.loss_graph import LossGraph, check_loss
from curvature.protocols import TRANSIENT, CurvatureEstimator, Needs, Observation, State
from optimizers import checkpoint, core, state_layout, step_info, trial
from optimizers.checks import FLAGS, check_flags, check_group, check_unmoved, signal_names
from optimizers.distributed import ALONE, Ranks, check_shardable, find_ranks
from optimizers.momentum import Momentum, RunningMean
from optimizers.pending import Pending
from optimizers.rounding import check_state_dtype, key_of, narrowed, put_back, widened
from optimizers.scaling import GradScale
from optimizers.sharding import local, stored
from optimizers.step_info import StepInfo
from optimizers.step_paths import Compile, Held, StepPaths, check_compile
from trust_region import Proposal, TrustRegion, Verdict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


NARROWING = ("state_dtype", "rounding_seed")


class SecondOrder(torch.optim.Optimizer):
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
            refused with the reason): fused passes for SOAA, Adam and AdamW, one graph over all tensors for the rest;
            ``"auto"`` does so on an accelerator, where it can, and says once where no compiler works; ``False`` never.
            Without: foreach calls, on a CPU block by block.
        process_group: the data-parallel ranks over which losses and statistics are averaged: ``"auto"`` is the default
            group where ``torch.distributed`` is initialised, ``None`` nobody. Sharded parameters know theirs.
        state_dtype: ``torch.bfloat16`` keeps momentum and all state that is shaped like the parameters in half the
            bytes, rounded up or down at random (``optimizers/rounding.py``), where only gradients are needed; ``None``
            keeps float32 or wider.
        rounding_seed: of that rounding; every optimizer has its own.
        **flags: ``foreach``, ``fused``, ``capturable``, ``differentiable``, for scripts that pass them everywhere: what
            asks for the step's own way is taken, what asks for another is refused.

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

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        curvature: CurvatureEstimator | None = None,
        trust_region: TrustRegion | None = None,
        momentum: float | Momentum = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        compile: Compile = "auto",  # noqa: A002
        process_group: ProcessGroup | Literal["auto"] | None = "auto",
        state_dtype: torch.dtype | None = None,
        rounding_seed: int = 0,
        **flags: Any,
    ) -> None:
        unknown = sorted(flags.keys() - FLAGS.keys())
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no option {unknown[0]!r}")
        check_flags(flags)
        self.curvature: CurvatureEstimator = Identity() if curvature is None else curvature
        self.trust_region = TrustRegion() if trust_region is None else trust_region
        self.momentum: Momentum = RunningMean(momentum) if isinstance(momentum, (int, float)) else momentum
        check_compile(compile, self._composition())
        check_state_dtype(state_dtype, self._composition())
        self.state_dtype, self.rounding_seed = state_dtype, int(rounding_seed)
        self.compile = compile
        self.process_group = process_group
        self.needs: Needs = self.curvature.needs | self.trust_region.needs
        self._set_transients()
        self._curvature_state: State = {}
        self._region_state: State = {}
        defaults = {
            "lr": lr,
            "momentum": self.momentum.beta,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    #: A GradScaler then always calls ``step``, with ``found_inf`` and ``grad_scale`` set: a skipped step is seen.
    _step_supports_amp_scaling = True

    def _set_transients(self) -> None:
        self._pending = Pending()
        self._in_trial = False
        self._trial_needs_gradient = False
        self._backward_called = False
        self._warned_no_loss = False
        self._info = StepInfo()
        self._paths = StepPaths(self._composition(), self.compile)

    @property
    def step_info(self) -> StepInfo:
        """The record of the last step; asked for after a compiled step it costs one pass over the state."""
        self._paths.settle()
        return self._info

    @step_info.setter
    def step_info(self, info: StepInfo) -> None:
        self._info = info

    # -- parameters and state -------------------------------------------------------------------------------------

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _shards(self) -> list[Tensor]:
        """What this process holds of every parameter: the parameter itself, unless it is sharded."""
        return [local(p) for p in self._params]

    def _per_parameter(self, name: str) -> list[Any]:
        return [group[name] for group in self.param_groups for _ in group["params"]]

    def _held(self) -> Held:
        return Held(
            self._params,
            self._shards,
            self.param_groups,
            self.state,
            self._curvature_state,
            self._region_state,
            self.state_dtype,
            self.rounding_seed,
        )

    def _composition(self, ranks: Ranks = ALONE) -> core.Composition:
        return core.Composition(self.curvature, self.trust_region, self.momentum, ranks)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its state is created at once, the state of the others is kept."""
        kept = len(self._params)
        self._paths.settle()
        self._paths.forget(tried=True)
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.needs)
        except Exception:
            self.param_groups.pop()
            raise
        params, shards = self._params, self._shards
        try:
            check_shardable(find_ranks(params, None), self.curvature, self.trust_region)
        except Exception:
            self.param_groups.pop()
            raise
        held = self._held()
        for p, shard in zip(params[kept:], shards[kept:], strict=True):
            entries = self.state[p]
            entries["step"] = vectors.scalar_like([shard])
            if self.param_groups[-1]["momentum"] != 0.0:
                entries["momentum"] = stored(p, held.fresh(shard))
            if getattr(self.curvature, "tracks_steps", False):
                entries["step_change"] = stored(p, vectors.zeros_like([shard])[0])
        first = self.state[params[0]]
        first.setdefault("skipped_steps", vectors.scalar_like(shards))
        fresh = self.curvature.init(shards), self.trust_region.init(shards, self.curvature)
        curvature, region = (narrowed(state, shards, self.state_dtype) for state in fresh)
        self._curvature_state = state_layout.extend(self._curvature_state, curvature, kept)
        self._region_state = state_layout.extend(self._region_state, region, kept)
        self._built_for = [(p.dtype, p.device) for p in params]
        self._scatter()

    def _scatter(self) -> None:
        params = self._params
        state_layout.scatter(self.state, "curvature", self._curvature_state, params)
        state_layout.scatter(self.state, "trust_region", self._region_state, params)

    def _regather(self) -> None:
        params = self._params
        self._curvature_state = state_layout.regather(self.state, "curvature", self._curvature_state, params)
        self._region_state = state_layout.regather(self.state, "trust_region", self._region_state, params)

    def __getstate__(self) -> dict[str, Any]:
        """The three choices travel with the state, so that deepcopy and pickle keep them."""
        self._paths.settle()
        held: dict[str, Any] = super().__getstate__()
        for name in ("curvature", "trust_region", "momentum", "compile", "needs", "_built_for", *NARROWING):
            held[name] = getattr(self, name)
        # A process group belongs to its process; the copy finds its own.
        held["process_group"] = self.process_group if self.process_group in ("auto", None) else "auto"
        held["_curvature_state"] = {k: v for k, v in self._curvature_state.items() if k != TRANSIENT}
        held["_region_state"] = {k: v for k, v in self._region_state.items() if k != TRANSIENT}
        return held

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; what was pending belongs to the graph of another object and is not."""
        super().__setstate__(state)
        # PyTorch adds it to every copy, from where groups would take it
        self.defaults.pop("differentiable", None)
        for group in self.param_groups:  # of an older version, whose groups lack what did not exist then
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if "curvature" not in state:  # PyTorch's load_state_dict comes by here with groups and state alone
            return
        self.__dict__.setdefault("compile", "auto")
        self.__dict__.setdefault("process_group", "auto")
        self.__dict__.setdefault("state_dtype", None)
        self.__dict__.setdefault("rounding_seed", 0)
        self._set_transients()
        self.__dict__.setdefault("_built_for", [(p.dtype, p.device) for p in self._params])
        attach = getattr(self.curvature, "attach", None)
        if attach is not None:
            attach(self._params)
        self._regather()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave, from a run of the same composition; a mismatch changes nothing.

        PyTorch casts loaded state to the parameter's dtype; here it keeps the dtype that it was kept in, so float32
        moments of bfloat16 parameters survive.

        Raises:
            ValueError: where groups, entries or shapes do not fit.
        """
        given: Any = state_dict
        state_dict = (
            given.copy() if isinstance(given, dict) else given
        )  # `checked` refuses what is no dictionary
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        groups, entries = checkpoint.checked(self, state_dict)
        self.param_groups = groups
        self.state.update(entries)
        self._regather()
        self._pending.discard()
        self._paths.forget()  # what is compiled worked on the state that has been replaced
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def state_dict(self) -> dict[str, Any]:
        """Groups and state, as every ``torch.optim`` optimizer gives them."""
        self._paths.settle()
        return super().state_dict()

    def state_bytes(self) -> int:
        """Bytes that this optimizer keeps beside parameters and gradients."""
        return state_layout.bytes_of(self.state, self._curvature_state)

    # -- the two loops --------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and what ``backward`` observed but no step used; inside a trial this does nothing."""
        if self._in_trial:
            return
        self._forget()
        super().zero_grad(set_to_none)

    def backward(
        self,
        loss: Tensor,
        outputs: Any = None,
        retain_graph: bool = False,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Accumulate the gradient into ``.grad``, and whatever else the curvature needs from this loss.

        Where only gradients are needed this is ``loss.backward()``. Several calls before a step add up. Inside a trial
        evaluation it does nothing.

        Args:
            loss: a scalar with a graph.
            outputs: the model's outputs from which the loss was computed; needed by Gauss-Newton and sampled-label
                curvature (``optimizer.needs.outputs``).
            retain_graph: keep the graph alive, as in ``loss.backward``.
            scaler: scales the loss for the gradients; curvature and radius see the loss as it is.
        """
        if self._in_trial:
            if self._trial_needs_gradient:
                loss.backward(retain_graph=retain_graph)
            return
        self._backward_called = True
        keeps = self._take_in(loss, outputs)
        scaled = loss if scaler is None else scaler.scale(loss)
        scaled.backward(retain_graph=retain_graph or keeps)
        self._pending.knows_scale = scaler is not None

    def observe(self, loss: Tensor, outputs: Any = None) -> None:
        """What :meth:`backward` does beside the gradient: for every further optimizer over the same loss.

        Call it before the one ``backward``, which adds the gradients of all parameters once and frees the graph; with
        curvature that takes products in the step (:class:`curvature.Hessian`) that needs ``retain_graph=True``. Inside
        a trial evaluation it does nothing.

        Args:
            loss: a scalar with a graph, not scaled.
            outputs: the model's outputs, as for :meth:`backward`.

        >>> from optimizers import AdaHessian, SOAA
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> body, head = AdaHessian(model[0].parameters()), SOAA(model[2].parameters())
        >>> loss = model(torch.ones(2, 3)).square().mean()
        >>> body.observe(loss)
        >>> head.backward(loss)
        >>> body.step(), head.step()
        (None, None)
        """
        if not self._in_trial:
            self._take_in(loss, outputs)
            self._pending.knows_scale = True

    def _take_in(self, loss: Tensor, outputs: Any) -> bool:
        """Measure what the curvature needs and note the loss; whether its graph must live on till the step."""
        check_loss(loss, outputs)
        if self._pending.backwards and all(p.grad is None for p in self._params):
            self._forget()  # the gradients were cleared behind this optimizer's back: so are the observations
        keeps = False
        if self.needs.graph and self._due():
            keeps = self._measure(loss, outputs)
        self._pending.add_loss(loss)
        return keeps

    def _measure(self, loss: Tensor, outputs: Any) -> bool:
        """Statistics of the curvature from the loss's graph; whether the graph must live on till the step."""
        ranks = find_ranks(self._params, self.process_group)
        # What an estimator proves and draws from outputs makes no sense of NaN, and the step will be skipped. All ranks
        # pass it over together: those that measure may wait for each other.
        if self.needs.outputs and not ranks.all(loss.detach().isfinite().all()):
            self._pending.diverged = True
            return False
        graph = LossGraph(loss, self._params, outputs)
        with torch.enable_grad(), ranks.dividing():
            statistics = self.curvature.measure(self._curvature_state, graph)  # type: ignore[attr-defined]
        self._pending.add_statistics(statistics)
        if getattr(self.curvature, "keeps_graph", False):
            self._pending.graphs.append(graph)
            return True
        graph.release()
        return False

    def _forget(self) -> None:
        """Drop what ``backward`` observed and no step used."""
        self._pending.discard()
        self._curvature_state.pop(TRANSIENT, None)

    def _due(self) -> bool:
        due = getattr(self.curvature, "due", None)
        return True if due is None else bool(due(self._curvature_state))

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
        params = self._shards
        check_unmoved(self._params, self._built_for)
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
        try:
            self._step(closure, self._pending.loss if value is None else value, before, scale)
        finally:
            self._pending.discard()
            self._curvature_state.pop(TRANSIENT, None)
            self._region_state.pop(TRANSIENT, None)
        return returned

    def _step(
        self,
        closure: Callable[[], Any] | None,
        loss: Tensor | None,
        before: trial.RandomState,
        scale: GradScale,
    ) -> None:
        params = self._shards
        ranks = find_ranks(self._params, self.process_group)
        info = self._paths.compiled(self._held(), loss, scale, ranks, self._check_signals)
        if info is not None:
            self._info = info
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
        ranks.mean_statistics_(self._pending.statistics)
        held = self._held()
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
        taken = self._paths.blocked(held, gradient)
        if taken is not None:
            self._record(loss, taken, core.review(composition, self._region_state, taken, loss), None)
            return
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
        operator = core.refreshed(composition, seen, held.curvature_state)
        taken = self._paths.diagonal(held, operator, gradient, ranks)
        if taken is not None:
            self._record(loss, taken, None, None)
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
        proposal = core.propose(composition, operator, seen, held.region_state, averaged, lr)
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

    def _record(
        self, loss: Tensor | None, proposal: Proposal, verdict: Verdict | None, actual: Tensor | None
    ) -> None:
        self.step_info = step_info.of_step(
            loss, proposal, verdict, actual, self._region_state, self.state[self._params[0]]["skipped_steps"]
        )


def _is_finite(loss: Tensor | None) -> bool:
    return loss is None or bool(torch.isfinite(loss))
