"""The elementwise step on a CPU by C++ passes over pointers: :mod:`optimizers.compiled.native_source`.

It does what :class:`optimizers.compiled.two_pass.TwoPass` does, and knows what a step predicted as soon as the step is
taken. Between steps it holds the pointers of parameters and state, Σv and the counts, so that a step is two calls,
whatever the number of tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        self.mass, self.sums, self.found = (
            torch.zeros(n, dtype=torch.float64) for n in (len(first), 2 * len(first), 4)
        )
        self.finite = torch.zeros((), dtype=torch.bool)
        self.size = x.size
        self.versions = [*x.params, *x.mean, *x.second_moment]
        self.counts = _pointers([*x.steps, *x.count])
        self.wide = int(x.steps[0].dtype == torch.float64)
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
            len(chunks), tensor, begin, end, kind, p, None, m, v, len(first), None, None, partial, 1, 0
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
        code = KINDS[kind.param, kind.state]
        passes = library()
        if self._bound is None or self._bound.pointers != x.pointers():
            self._bound = _Bound(x, code)
        bound = self._bound
        work, scales = bound.work, int(self.formula.needs_sums)
        lagged = None if self.lagged_scale is None else self.lagged_scale.to(torch.float64)
        held = (_pointers(gradient), self._table(bound, options), bound.seen + 1.0, radius.to(torch.float64))
        work.g, work.table, work.count, d = (y.data_ptr() for y in held)
        work.threads = torch.get_num_threads()
        if kind.state == NARROW:
            work.key = int(key_of(self.seed, bound.seen[0, 0]))
        passes.soaa_look(ctypes.byref(work), code, scales, _at(bound.sums), _at(bound.finite))
        finite = decide(bound.finite.clone())
        passes.soaa_move(
            ctypes.byref(work),
            code,
            int(self.formula.interior),
            scales if lagged is None else 2,
            self.rule,
            ctypes.c_double(bound.size),
            _at(bound.sums),
            _at(finite),
            ctypes.c_void_p(d),
            None if lagged is None else _at(lagged),
            _at(bound.mass),
            _at(bound.found),
        )
        passes.soaa_count(ctypes.c_int64(len(bound.counts)), _at(bound.counts), bound.wide, _at(finite))
        bound.seen += finite
        torch.autograd.graph.increment_version(bound.versions)  # as every in-place operation does
        if self.lagged_scale is not None:
            own = torch.nan_to_num(bound.found[3], nan=1.0)
            self.lagged_scale.copy_(torch.where(finite, own, self.lagged_scale))
        self.taken = Taken(bound.found.to(x.steps[0].dtype, copy=True), finite)
        return None

    def settle(self, x: Tensors, kind: Kind) -> Settled | None:
        """What the last step predicted, if nobody has asked yet."""
        if self.taken is None:
            return None
        predicted, square, inside, _ = self.taken.found.unbind()
        self.taken = None
        return Settled(predicted, square.sqrt(), inside / x.size)

    def _table(self, bound: _Bound, options: Options) -> Tensor:
        """The numbers of every class: sign, β₁, β₂, ε, η, λ, and the logarithms of both decays."""
        beta_2, eps = self.formula.beta_2, self.formula.eps
        rows = []
        for k in bound.groups:
            eta, beta_1 = options.lr[k], options.beta_1[k]
            rows.append([options.sign[k], beta_1, beta_2, eps, 0.0 if isinstance(eta, Tensor) else eta])
            rows[-1] += [options.weight_decay[k], log(beta_1), log(beta_2)]
        table = torch.tensor(rows, dtype=torch.float64)
        for row, k in enumerate(bound.groups):
            eta = options.lr[k]
            if isinstance(eta, Tensor):
                table[row, 4] = eta
        if options.unscale is not None:
            table[:, 0] *= options.unscale.to(torch.float64)
        return table


def _pointers(tensors: Sequence[Tensor]) -> Tensor:
    """Where tensors lie, as an array that C++ can read."""
    return torch.tensor([x.data_ptr() for x in tensors])


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
