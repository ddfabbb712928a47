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
from typing import Any

import torch
from torch import Tensor

from optimizers.compiled.host_path import Found
from optimizers.compiled.kernels import Kind
from optimizers.compiled.native_library import NoCompilerError, library
from optimizers.compiled.tensors import Options, Tensors, classes, log
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


_TAKEN = ctypes.byref(ctypes.c_uint8(1))


def serves(kind: Kind) -> bool:
    """Whether there are native passes for these tensors, and a compiler for them."""
    if kind.device.type != "cpu" or (kind.param, kind.state) not in KINDS:
        return False
    try:
        library()
    except NoCompilerError:
        return False
    return True


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

    def __init__(self, formula: Formula, policy: object, seed: int = 0) -> None:
        self.formula, self.seed = formula, seed
        self.rule = prediction_of(policy)
        self._bound: _Bound | None = None

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
        """As :class:`optimizers.compiled.host_path.HostPasses`."""
        work, code, bound, held = self._prepared(x, gradient, kind, options)
        library().soaa_look(
            ctypes.byref(work), code, int(self.formula.needs_sums), bound.at_sums, bound.at_finite
        )
        if not decide(bool(bound.finite_on_host)):
            return None
        scale = None if lagged is None else ctypes.byref(ctypes.c_double(lagged))
        self._move(bound, code, ctypes.byref(ctypes.c_double(radius)), scale)
        bound.seen += 1.0
        del held
        values = bound.found_on_host.tolist()
        own = 1.0 if math.isnan(values[3]) else values[3]
        return Found(values[0], own, lambda: torch.tensor(values[:3], dtype=torch.float64))

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

    def _move(self, bound: _Bound, code: int, radius: Any, lagged: Any) -> None:
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
            _TAKEN,
            radius,
            lagged,
            bound.at_mass,
            bound.at_found,
        )
        passes.soaa_count(ctypes.c_int64(len(bound.counts)), bound.at_counts, bound.wide, _TAKEN)
        torch.autograd.graph.increment_version(bound.versions)  # as every in-place operation does

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
