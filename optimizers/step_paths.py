"""Which way a step is taken: the fastest that composition, tensors and signals allow; all give the same numbers.

From the narrowest to the widest:

- *capturable*, where a CUDA graph may record the step (:mod:`optimizers.compiled.captured_path`), for that alone;
- *compiled*, where every tensor has a gradient (:mod:`optimizers.compiled`): two kernels for one formula an element,
  a graph over all tensors for any other composition whose signals are gradients;
- *blocked*: likewise, one formula an element on a CPU, block by block (``blocked.py``);
- *centred*: Tadam's composition on a CPU, block by block (``centred_step.py``);
- *separate*: the general step one tensor after another, where nothing joins tensors (``separate_step.py``): LAMB's,
  LARS's and Muon's on a CPU;
- *in place*: on a CPU a diagonal curvature, block by block or, with ``compile=True``, in one native pass
  (``diagonal_step.py``), one that is diagonal in a rotated basis (``rotated_step.py``), or Kronecker factors
  (``kronecker_step.py``);
- the general path (``core.py``), which writes every intermediate vector and takes anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.kronecker.gradient_rows import GradientRows
from curvature.kronecker.inverses import FactoredKroneckerOperator
from curvature.operators import DiagonalOperator
from curvature.protocols import CurvatureOperator, State
from curvature.rotated_diagonal import RotatedDiagonalOperator
from optimizers import (
    blocked,
    centred_step,
    diagonal_step,
    elementwise,
    kronecker_step,
    rotated_step,
    separate_step,
)
from optimizers.compiled import graph
from optimizers.compiled.captured_path import CapturedPath
from optimizers.compiled.elementwise_path import ElementwisePath, has_passes, passes_for
from optimizers.compiled.graph_path import GraphPath
from optimizers.compiled.host_path import HostRecord
from optimizers.compiled.kernels import compiler_failures
from optimizers.compiled.native_diagonal import NativeDiagonal
from optimizers.compiled.tensors import Options, Tensors
from optimizers.core import Composition
from optimizers.distributed import Ranks, find_ranks
from optimizers.rounding import NARROW
from optimizers.scaling import GradScale
from optimizers.sharding import local, stored
from optimizers.step_info import StepInfo
from trust_region import Proposal

Compile = bool | Literal["auto"]
"""When a step is compiled: always (or refuse), never, or on an accelerator where it can be."""


@dataclass(frozen=True)
class Held:
    """What an optimizer holds at a step; lists in the order of its parameters.

    Args:
        params: θ as the user gave it.
        shards: what this process holds of it; the same tensors unless they are sharded.
        groups: the parameter groups.
        state: of every parameter.
        curvature_state: of the estimator.
        region_state: of region and policy.
        state_dtype: what state shaped like the parameters is kept in; ``None`` is float32 or wider.
        seed: of the rounding into it.
        buffers: the momentum's, where they are not those of ``state``.
    """

    params: list[Tensor]
    shards: list[Tensor]
    groups: list[dict[str, Any]]
    state: MutableMapping[Any, dict[str, Any]]
    curvature_state: State
    region_state: State
    state_dtype: torch.dtype | None = None
    seed: int = 0
    buffers: list[Tensor] | None = None

    def each(self, name: str) -> list[Any]:
        """A hyperparameter of every parameter's group."""
        return [group[name] for group in self.groups for _ in group["params"]]

    @property
    def steps(self) -> list[Tensor]:
        """The gradients that every parameter's momentum has taken in, 0-d each."""
        return [self.state[p]["step"] for p in self.params]

    @property
    def skipped(self) -> Tensor:
        """Steps that a gradient kept from being taken, 0-d."""
        skipped: Tensor = self.state[self.params[0]]["skipped_steps"]
        return skipped

    def momentum_buffers(self) -> list[Tensor]:
        """The buffers, none where nothing is averaged; a schedule that raises the momentum from 0 creates them."""
        if self.buffers is not None:
            return self.buffers
        if all(group["momentum"] == 0.0 for group in self.groups):
            return []
        for p in self.params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = stored(p, self.fresh(local(p)))
        return [local(self.state[p]["momentum"]) for p in self.params]

    def fresh(self, shard: Tensor) -> Tensor:
        """A buffer of zeros."""
        [zeros] = vectors.zeros_like([shard])
        return zeros if self.state_dtype is None else zeros.to(self.state_dtype)


def check_compile(compiles: Compile, composition: Composition) -> None:
    """Refuse what is no choice, and ``True`` for a composition that has no compiled step.

    Raises:
        ValueError: naming what can be compiled.
    """
    if compiles not in (True, False, "auto"):
        raise ValueError(f'compile must be True, False or "auto", got {compiles!r}')
    if compiles is not True or diagonal_step.has_native_pass(composition):
        return
    reason = graph.why_not(composition)
    if reason is not None:
        raise ValueError(
            "compile=True takes compositions whose signals are gradients, SophiaH, SophiaG and AdaHessian, and here "
            f'{reason}: leave compile at "auto"'
        )


def check_compiled_device(compiles: Compile, composition: Composition, shards: Sequence[Tensor]) -> None:
    """Refuse ``True`` on an accelerator for what is compiled for a CPU alone.

    Raises:
        ValueError: naming the device.
    """
    if compiles is not True or graph.why_not(composition) is None:
        return
    for device in {p.device for p in shards}:
        if device.type != "cpu":
            raise ValueError(
                f"compile=True takes the step of {type(composition.curvature).__name__} on a CPU, and the parameters "
                f'are on {device}: leave compile at "auto"'
            )


class StepPaths:
    """The ways of one optimizer.

    Args:
        composition: what the steps are of.
        compiles: when they are compiled.
        capturable: whether a CUDA graph may record them.
    """

    def __init__(self, composition: Composition, compiles: Compile, capturable: bool = False) -> None:
        self.composition = composition
        self.compiles = compiles
        self.capturable = capturable
        self._path: ElementwisePath | None = None
        self._graph: GraphPath | None = None
        self._refused = False
        native = compiles is True and diagonal_step.has_native_pass(composition)
        self._native = NativeDiagonal() if native else None

    # -- compiled, or in blocks -----------------------------------------------------------------------------------

    def taken(
        self,
        held: Held,
        loss: Tensor | None,
        scale: GradScale,
        ranks: Ranks,
        check: Callable[[Tensor | None], None],
    ) -> StepInfo | HostRecord | None:
        """The record of a step compiled or in blocks, or what forms it when it is asked for.

        ``None``, with nothing changed, where this step is not of its kind.

        Args:
            held: what is worked on; every ``.grad`` as it is.
            loss: at θ, where known.
            scale: a GradScaler's word.
            ranks: that share the step.
            check: raises where a signal is missing.
        """
        path = self._path_for(held)
        if path is None:
            return None
        gradient = [p.grad for p in held.params]
        takes = path.takes(gradient) if isinstance(path, ElementwisePath) else path.takes(held, gradient)
        if not takes:
            return None
        check(loss)
        loss = loss if loss is None else loss.to(held.skipped.device, non_blocking=True)
        try:
            return self._by(path, held, cast("list[Tensor]", gradient), loss, scale, ranks)
        except compiler_failures() as error:
            if self.compiles is True:
                raise
            self._refused, self._path, self._graph = True, None, None
            warnings.warn(f"steps are not compiled, since the compiler failed: {error}", stacklevel=6)
            return None

    @staticmethod
    def _by(
        path: ElementwisePath | GraphPath,
        held: Held,
        gradient: list[Tensor],
        loss: Tensor | None,
        scale: GradScale,
        ranks: Ranks,
    ) -> StepInfo | HostRecord:
        if isinstance(path, GraphPath):
            return path.step_(held, gradient, loss, scale, ranks)
        groups = held.groups
        options = Options(
            [g["momentum"] for g in groups],
            [g["lr"] for g in groups],
            [g["weight_decay"] for g in groups],
            [-1.0 if g["maximize"] else 1.0 for g in groups],
            None if scale.scale is None else scale.scale.reciprocal(),
        )
        return path.step_(gradient, options, loss, scale, ranks, held.region_state, held.skipped)

    def wants_compiled(self, held: Held) -> bool:
        """Whether steps are to be compiled."""
        return self.compiles is True or (self.compiles == "auto" and held.shards[0].device.type != "cpu")

    def settle(self) -> None:
        """Complete what the last compiled step left open."""
        for path in (self._path, self._graph):
            if path is not None:
                with torch.no_grad():
                    path.settle()

    def forget(self, *, tried: bool = False) -> None:
        """Drop what was built for tensors that are replaced; with ``tried`` also that it could not be built."""
        self._path = None
        if tried:
            self._graph, self._refused = None, False

    def _path_for(self, held: Held) -> ElementwisePath | GraphPath | None:
        """What these steps are taken by, built once: passes for these tensors, compiled or not; the graph for any."""
        compiles = self.wants_compiled(held) and not self._refused
        if self.capturable:
            if self._graph is None:
                self._graph = CapturedPath(self.composition, held.seed, compiles)
            return self._graph
        if self._path is not None and not any(g["momentum"] == 0.0 for g in held.groups):
            return self._path
        if find_ranks(held.params, None).shards is not None:
            return None
        self._path = self._built(held, compiles)
        if not compiles:
            return self._path
        if self._path is None and self._graph is None and graph.why_not(self.composition) is None:
            self._graph = GraphPath(self.composition, held.seed)
        path = self._graph if self._path is None else self._path
        self._refused = path is None
        return path

    def _built(self, held: Held, compiles: bool) -> ElementwisePath | None:
        composition = self.composition
        formula, trust_region = _formula_of(composition), composition.trust_region
        if formula is None or any(g["momentum"] == 0.0 for g in held.groups):
            return None
        tensors = Tensors(
            held.params,
            held.momentum_buffers(),
            cast("list[Tensor]", held.curvature_state["second_moment"]),
            held.steps,
            cast("list[Tensor]", held.curvature_state["count"]),
            [i for i, group in enumerate(held.groups) for _ in group["params"]],
        )
        kind = tensors.kind()
        if kind is None:
            return None
        if not compiles:
            if kind.device.type != "cpu" or kind.state == NARROW:
                return None
            return ElementwisePath(
                trust_region, tensors, kind, blocked.BlockedPasses(formula, trust_region.radius)
            )
        if not has_passes(formula, kind):
            return None
        passes = passes_for(formula, trust_region, kind, held.seed)
        return ElementwisePath(trust_region, tensors, kind, passes)

    # -- on a CPU without a compiler ------------------------------------------------------------------------------

    def in_parts(
        self, held: Held, gradient: Sequence[Tensor | None], loss: Tensor | None, ranks: Ranks
    ) -> Proposal | None:
        """The proposal of a step that was taken in blocks or tensor by tensor; its review is the caller's."""
        if ranks.shards is not None:
            return None
        composition, given = self.composition, cast("list[Tensor]", gradient)
        if centred_step.suits(composition, held, gradient):
            return centred_step.step_(composition, held, given, loss)
        if separate_step.suits(composition, held, gradient):
            return separate_step.step_(composition, held, given, loss)
        return None

    def in_place(
        self,
        held: Held,
        operator: CurvatureOperator,
        gradient: Sequence[Tensor | None],
        rows: Mapping[int, GradientRows],
        ranks: Ranks,
    ) -> Callable[[], Proposal] | None:
        """The same for curvature that is refreshed already: Kronecker factors, or a diagonal, maybe in a rotated basis.

        The proposal is formed when it is asked for.
        """
        trust_region, momentum = self.composition.trust_region, self.composition.momentum
        if ranks.shards is None and kronecker_step.suits(operator, trust_region, momentum, held, gradient):
            factored = cast(FactoredKroneckerOperator, operator)
            return kronecker_step.step_(factored, momentum, held, cast("list[Tensor]", gradient), rows)
        means, damping = held.momentum_buffers(), held.region_state.get("damping", 0.0)
        options = held.each("momentum"), held.each("lr"), held.each("weight_decay")
        if ranks.shards is None and rotated_step.suits(
            operator, trust_region, momentum, held.shards, gradient, means, damping
        ):
            return rotated_step.step_(
                cast(RotatedDiagonalOperator, operator),
                momentum,
                held.shards,
                cast("list[Tensor]", gradient),
                means,
                held.steps,
                options,
                float(cast(Tensor, damping)),
            )
        if ranks.shards is not None or not diagonal_step.suits(
            operator, trust_region, momentum, held.shards, gradient, means, damping
        ):
            return None
        return diagonal_step.step_(
            cast(DiagonalOperator, operator),
            trust_region,
            momentum,
            held.shards,
            cast("list[Tensor]", gradient),
            means,
            held.steps,
            options,
            (float(cast(Tensor, held.region_state["radius"])), float(cast(Tensor, damping))),
            self._native,
        )


def _formula_of(composition: Composition) -> elementwise.Formula | None:
    return elementwise.formula_of(composition.curvature, composition.trust_region, composition.momentum)
