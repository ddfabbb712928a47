"""The elementwise step on a CPU by C++ passes over pointers: :mod:`optimizers.compiled.native_source`.

It does what :class:`optimizers.compiled.two_pass.TwoPass` does, and knows what a step predicted as soon as the step is
taken. Between steps it holds the pointers of parameters and state, Σv and the counts, so that a step is two calls,
whatever the number of tensors.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimizers.compiled.kernels import Kind
from optimizers.compiled.native_library import NoCompilerError, library
from optimizers.compiled.tensors import Options, Settled, Tensors, classes, log
from optimizers.elementwise import Formula, prediction_of
from optimizers.rounding import NARROW, key_of

CHUNK = 1 << 14
"""Elements a thread takes at a time."""

KINDS = {
    (torch.float32, torch.float32): 0,
    (torch.float64, torch.float64): 1,
    (torch.bfloat16, torch.float32): 2,
    (torch.float32, torch.bfloat16): 3,
    (torch.bfloat16, torch.bfloat16): 4,
}
"""Dtypes of parameters and of state that the passes are compiled for."""


class _Work(ctypes.Structure):
    """``struct Work`` of the source."""

    _fields_ = (
        ("chunks", ctypes.c_int64),
        ("tensor", ctypes.c_void_p),
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("kind", ctypes.c_void_p),
        ("p", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("m", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("classes", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("key", ctypes.c_uint32),
    )


def serves(kind: Kind) -> bool:
    """Whether there are native passes for these tensors, and a compiler for them."""
    if kind.device.type != "cpu" or (kind.param, kind.state) not in KINDS:
        return False
    try:
        library()
    except NoCompilerError:
        return False
    return True


@dataclass(frozen=True)
class Taken:
    """A step that was taken and whose prediction is not settled.

    Args:
        found: P, ‖ηu‖², the elements inside the box and the scale of its own sums; NaN for a skipped step.
        finite: whether it moved anything, 0-d bool.
    """

    found: Tensor
    finite: Tensor


class _Bound:
    """What stays between the steps of one set of tensors: pointers, Σv and the counts of every class."""

    def __init__(self, x: Tensors, code: int) -> None:
        self.pointers = x.pointers()
        class_of, self.groups = classes(x)
        chunks = [
            (i, a, min(a + CHUNK, p.numel()))
            for i, p in enumerate(x.params)
            for a in range(0, p.numel(), CHUNK)
        ]
        first = [class_of.index(k) for k in range(len(self.groups))]
        self.seen = torch.tensor([[float(x.steps[i]), float(x.count[i])] for i in first], dtype=torch.float64)
        self.coming = self.seen.clone()
        self.mass, self.sums, self.found = (
            torch.zeros(n, dtype=torch.float64) for n in (len(first), 2 * len(first), 4)
        )
        self.finite = torch.zeros((), dtype=torch.bool)
        self.size = x.size
        self.versions = [*x.params, *x.mean, *x.second_moment]
        self.counts = _pointers([*x.steps, *x.count])
        self.wide = int(x.steps[0].dtype == torch.float64)
        self.seen_on_host, self.found_on_host = self.seen.numpy(), self.found.numpy()
        self.finite_on_host = self.finite.numpy()
        self.at_sums, self.at_finite, self.at_mass, self.at_found, self.at_counts = (
            _at(y) for y in (self.sums, self.finite, self.mass, self.found, self.counts)
        )
        self._kept = [
            torch.tensor([c[0] for c in chunks], dtype=torch.int32),
            torch.tensor([c[1] for c in chunks]),
            torch.tensor([c[2] for c in chunks]),
            torch.tensor(class_of, dtype=torch.int32),
            *(_pointers(tensors) for tensors in (x.params, x.mean, x.second_moment)),
            torch.zeros(6 * len(chunks), dtype=torch.float64),
        ]
        tensor, begin, end, kind, p, m, v, partial = (y.data_ptr() for y in self._kept)
        self.work = _Work(
            len(chunks),
            tensor,
            begin,
            end,
            kind,
            p,
            None,
            m,
            v,
            len(first),
            None,
            self.coming.data_ptr(),
            partial,
            1,
            0,
        )
        self.work.threads = torch.get_num_threads()
        library().soaa_weigh(ctypes.byref(self.work), code, _at(self.mass))


class NativePasses:
    """Two native passes for a composition that is one formula an element.

    Args:
        formula: its constants.
        policy: the radius policy, which decides what a prediction is.
        seed: of the rounding of state in bfloat16 (:mod:`optimizers.rounding`).

    Cost: 8 bytes a float32 parameter by the first pass (4 where it only looks for gradients that are not finite) and 28
    by the second.
    """

    #: Whether a step's prediction is known as soon as it is taken.
    at_once = True

    def __init__(self, formula: Formula, policy: object, seed: int = 0) -> None:
        self.formula, self.seed = formula, seed
        self.rule = prediction_of(policy)
        self.taken: Taken | None = None
        self.lagged_scale: Tensor | None = None
        """1 + s of the step before, where the composition takes that one; overwritten by a step."""
        self._bound: _Bound | None = None

    def step_(
        self,
        x: Tensors,
        gradient: Sequence[Tensor],
        kind: Kind,
        options: Options,
        radius: Tensor,
        decide: Callable[[Tensor], Tensor],
    ) -> Settled | None:
        """Update the state and move the parameters, in place; as :meth:`TwoPass.step_`."""
        work, code, bound, held = self._prepared(x, gradient, kind, options)
        radius = radius.to(torch.float64)
        lagged = None if self.lagged_scale is None else self.lagged_scale.to(torch.float64)
        library().soaa_look(
            ctypes.byref(work), code, int(self.formula.needs_sums), _at(bound.sums), _at(bound.finite)
        )
        finite = decide(bound.finite.clone())
        self._move(bound, code, _at(finite), _at(radius), None if lagged is None else _at(lagged))
        bound.seen += finite
        del held
        if self.lagged_scale is not None:
            own = torch.nan_to_num(bound.found[3], nan=1.0)
            self.lagged_scale.copy_(torch.where(finite, own, self.lagged_scale))
        self.taken = Taken(bound.found.to(x.steps[0].dtype, copy=True), finite)
        return None

    def step_on_host_(
        self,
        x: Tensors,
        gradient: Sequence[Tensor],
        kind: Kind,
        options: Options,
        radius: float,
        lagged: float | None,
    ) -> tuple[bool, list[float]]:
        """As :meth:`step_`, for one process without a scaler, in numbers.

        Args:
            x: the tensors.
            gradient: ``.grad`` as it is.
            kind: of the tensors.
            options: hyperparameters.
            radius: d.
            lagged: 1 + s of the step before, where the composition takes that one.

        Returns:
            whether the step was taken, and P, ‖ηu‖², the elements inside the box and 1 + s of its own sums.
        """
        work, code, bound, held = self._prepared(x, gradient, kind, options)
        library().soaa_look(
            ctypes.byref(work), code, int(self.formula.needs_sums), bound.at_sums, bound.at_finite
        )
        finite = bool(bound.finite_on_host)
        if not finite:
            return False, [math.nan] * 4
        scale = None if lagged is None else ctypes.byref(ctypes.c_double(lagged))
        self._move(bound, code, bound.at_finite, ctypes.byref(ctypes.c_double(radius)), scale)
        bound.seen_on_host += 1.0
        del held
        return True, bound.found_on_host.tolist()

    def _prepared(
        self, x: Tensors, gradient: Sequence[Tensor], kind: Kind, options: Options
    ) -> tuple[_Work, int, _Bound, object]:
        """What the passes are told of a step, and what must live until they have run."""
        code = KINDS[kind.param, kind.state]
        if self._bound is None or self._bound.pointers != x.pointers():
            self._bound = _Bound(x, code)
        bound = self._bound
        work = bound.work
        pointers, table = array("q", [g.data_ptr() for g in gradient]), self._table(bound, options)
        torch.add(bound.seen, 1.0, out=bound.coming)
        work.g, work.table = pointers.buffer_info()[0], table.buffer_info()[0]
        work.threads = torch.get_num_threads()
        if kind.state == NARROW:
            work.key = int(key_of(self.seed, bound.seen[0, 0]))
        return work, code, bound, (pointers, table)

    def _move(self, bound: _Bound, code: int, finite: Any, radius: Any, lagged: Any) -> None:
        """The second pass, and the counts."""
        passes, scales = library(), int(self.formula.needs_sums)
        passes.soaa_move(
            ctypes.byref(bound.work),
            code,
            int(self.formula.interior),
            scales if lagged is None else 2,
            self.rule,
            ctypes.c_double(bound.size),
            bound.at_sums,
            finite,
            radius,
            lagged,
            bound.at_mass,
            bound.at_found,
        )
        passes.soaa_count(ctypes.c_int64(len(bound.counts)), bound.at_counts, bound.wide, finite)
        torch.autograd.graph.increment_version(bound.versions)  # as every in-place operation does

    def settle(self, x: Tensors, kind: Kind) -> Settled | None:
        """What the last step predicted, if nobody has asked yet."""
        if self.taken is None:
            return None
        predicted, square, inside, _ = self.taken.found.unbind()
        self.taken = None
        return Settled(predicted, square.sqrt(), inside / x.size)

    def _table(self, bound: _Bound, options: Options) -> array[float]:
        """The numbers of every class: sign, β₁, β₂, ε, η, λ, and the logarithms of both decays."""
        beta_2, eps = self.formula.beta_2, self.formula.eps
        unscale = 1.0 if options.unscale is None else float(number(options.unscale))
        rows = array("d")
        for k in bound.groups:
            eta, beta_1 = options.lr[k], options.beta_1[k]
            rate = float(number(eta)) if isinstance(eta, Tensor) else eta
            rows.extend((options.sign[k] * unscale, beta_1, beta_2, eps, rate, options.weight_decay[k]))
            rows.extend((log(beta_1), log(beta_2)))
        return rows


def number(x: Tensor) -> Any:
    """A tensor of one element as a number; that of a CPU through shared memory."""
    return x.detach().to("cpu", torch.float64).reshape(()).numpy()


def _pointers(tensors: Sequence[Tensor]) -> Tensor:
    """Where tensors lie, as an array that C++ can read."""
    return torch.tensor([x.data_ptr() for x in tensors])


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
