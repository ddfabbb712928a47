"""What an optimizer is made of, and what it keeps: parameters, state, copies, checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvature import vectors
from curvature.beside_outputs import BesideOutputs, check_beside_outputs
from curvature.identity import Identity
from curvature.protocols import CACHE, TRANSIENT, CurvatureEstimator, Needs, State
from curvature.registry import nearest
from optimizers import checkpoint, core, state_layout
from optimizers.checks import FLAGS, check_flags, check_group
from optimizers.compiled.captured_path import check_capturable
from optimizers.distributed import ALONE, Ranks, check_shardable, find_ranks
from optimizers.momentum import Momentum, RunningMean
from optimizers.pending import Pending
from optimizers.rounding import check_state_dtype, narrowed
from optimizers.sharding import shards_of, stored
from optimizers.step_info import StepInfo
from optimizers.step_paths import Compile, Held, StepPaths, check_compile, check_compiled_device
from trust_region import TrustRegion

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


LATER = ("state_dtype", "rounding_seed", "capturable", "beside_outputs")
"""Options that copies by an older version lack."""


def _options(kind: type[Composed]) -> list[str]:
    """What the class takes by keyword; a preset has chosen curvature, region and momentum, and passes on the rest."""
    named = {p.name for p in inspect.signature(kind).parameters.values() if p.kind is not p.VAR_KEYWORD}
    passed = inspect.signature(Composed).parameters.keys() - {
        "curvature",
        "trust_region",
        "momentum",
        "flags",
    }
    return sorted(named | passed | FLAGS.keys())


class Composed(torch.optim.Optimizer):
    """The three choices and their state; :class:`optimizers.SecondOrder` documents the arguments and steps."""

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
        capturable: bool | None = False,
        beside_outputs: BesideOutputs = "refuse",
        **flags: Any,
    ) -> None:
        unknown = sorted(flags.keys() - FLAGS.keys())
        if unknown:
            hint = nearest(unknown[0], _options(type(self)))
            raise TypeError(f"{type(self).__name__} takes no option {unknown[0]!r}: {hint}")
        check_flags(flags)
        self.curvature: CurvatureEstimator = Identity() if curvature is None else curvature
        self.trust_region = TrustRegion() if trust_region is None else trust_region
        self.momentum: Momentum = RunningMean(momentum) if isinstance(momentum, (int, float)) else momentum
        check_compile(compile, self._composition())
        self.capturable = check_capturable(capturable, self._composition())
        check_state_dtype(state_dtype, self._composition())
        self.state_dtype, self.rounding_seed = state_dtype, int(rounding_seed)
        check_beside_outputs(beside_outputs)
        self.beside_outputs: BesideOutputs = beside_outputs
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
        self._recorded: Callable[[], StepInfo] | None = None
        self._paths = StepPaths(self._composition(), self.compile, self.capturable)

    @property
    def step_info(self) -> StepInfo:
        """The record of the last step; asked for after a step in blocks or kernels it costs a pass over the state."""
        self._settle()
        return self._info

    @step_info.setter
    def step_info(self, info: StepInfo) -> None:
        self._info, self._recorded = info, None

    @torch.no_grad()
    def _settle(self) -> None:
        """Complete what the last step left open, while state is as it left it."""
        self._paths.settle()
        if self._recorded is not None:
            self.step_info = self._recorded()

    # -- parameters and state -------------------------------------------------------------------------------------

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _shards(self) -> list[Tensor]:
        """What this process holds of every parameter: the parameter itself, unless it is sharded."""
        return shards_of(self._params)

    def _per_parameter(self, name: str) -> list[Any]:
        return [group[name] for group in self.param_groups for _ in group["params"]]

    def _held(self) -> Held:
        params = self._params
        return Held(
            params,
            shards_of(params),
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
        self._settle()
        self._paths.forget(tried=True)
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.needs)
        except Exception:
            self.param_groups.pop()
            raise
        try:
            check_shardable(find_ranks(self._params, None), self.curvature, self.trust_region)
            check_compiled_device(self.compile, self._composition(), self._shards)
        except Exception:
            self.param_groups.pop()
            raise
        self._create_state(kept)

    def _create_state(self, kept: int) -> None:
        """State of the parameters after the first ``kept``, whose state stays."""
        params, shards = self._params, self._shards
        held = self._held()
        betas = self._per_parameter("momentum")
        for p, shard, beta in zip(params[kept:], shards[kept:], betas[kept:], strict=True):
            entries = self.state[p]
            entries["step"] = vectors.scalar_like([shard])
            if beta != 0.0:
                entries["momentum"] = stored(p, held.fresh(shard))
            if getattr(self.curvature, "tracks_steps", False):
                entries["step_change"] = stored(p, vectors.zeros_like([shard])[0])
        first = self.state[params[0]]
        first.setdefault("skipped_steps", vectors.scalar_like(shards))
        fresh = self.curvature.init(shards), self.trust_region.init(shards, self.curvature)
        curvature, region = (narrowed(state, shards, self.state_dtype) for state in fresh)
        divided = self._divided
        self._curvature_state = {**state_layout.extend(self._curvature_state, curvature, kept), **divided}
        self._region_state = state_layout.extend(self._region_state, region, kept)
        self._built_for = [(p.dtype, p.device) for p in params]
        self._scatter()

    def _start_again_if_cleared(self) -> None:
        """``optimizer.state.clear()`` resets a ``torch.optim`` optimizer, which creates its state as it steps."""
        if self.state:
            return
        self._curvature_state, self._region_state = {}, {}
        self._recorded = None
        self._paths = StepPaths(self._composition(), self.compile, self.capturable)
        self._create_state(0)

    @property
    def _divided(self) -> State:
        """What ranks keep divided among them, beside the state: of this process, and of no other."""
        kept = CACHE in self._curvature_state and bool(getattr(self.curvature, "gathered_keys", ()))
        return {CACHE: self._curvature_state[CACHE]} if kept else {}

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
        self._settle()
        held: dict[str, Any] = super().__getstate__()
        for name in ("curvature", "trust_region", "momentum", "compile", "needs", "_built_for", *LATER):
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
        self.__dict__.setdefault("capturable", False)
        self.__dict__.setdefault("beside_outputs", "refuse")
        self._set_transients()
        self.__dict__.setdefault("_built_for", [(p.dtype, p.device) for p in self._params])
        attach = getattr(self.curvature, "attach", None)
        if attach is not None:
            attach(self._params)
        divided = self._divided
        self._regather()
        self._curvature_state.update(divided)

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
        self._start_again_if_cleared()
        groups, entries, gathered = checkpoint.checked(self, state_dict)
        self._settle()
        self.param_groups = groups
        self.state.update(entries)
        self._regather()
        if gathered is not None:
            with find_ranks(self._params, self.process_group).dividing():
                self.curvature.take_gathered(self._curvature_state, gathered)  # type: ignore[attr-defined]
        self._pending.discard()
        self._paths.forget()  # what is compiled worked on the state that has been replaced
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def state_dict(self) -> dict[str, Any]:
        """Groups and state, as every ``torch.optim`` optimizer gives them."""
        self._paths.settle()
        return super().state_dict()

    def gathered_state_dict(self) -> dict[str, Any]:
        """``state_dict()`` with what ranks keep divided among them; any number of ranks loads it.

        Every rank must call it; one of them may save what it returns. Where nothing is divided (all but
        ``KFAC`` and ``EKFAC`` with ``inverses="owner"``) it is ``state_dict()``.

        Returns:
            groups and state; it holds the parts of the other ranks until it is let go.
        """
        whole = self.state_dict()
        if not getattr(self.curvature, "gathered_keys", ()):
            return whole
        with find_ranks(self._params, self.process_group).dividing():
            gathered = self.curvature.gather(self._curvature_state)  # type: ignore[attr-defined]
        whole["state"] = {i: dict(entries) for i, entries in whole["state"].items()}
        for key, tensors in gathered.items():
            for i, x in enumerate(tensors):
                whole["state"][i][f"curvature{state_layout.SEPARATOR}{key}"] = x
        return whole

    def state_bytes(self) -> int:
        """Bytes that this optimizer keeps beside parameters and gradients."""
        return state_layout.bytes_of(self.state, self._curvature_state)
