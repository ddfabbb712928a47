"""The step of a diagonal curvature by one C++ pass over pointers: :mod:`optimizers.compiled.native_diagonal_source`."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from curvature.operators import DiagonalOperator, MappedDiagonal, PowerDiagonal
from optimizers.compiled.native import CHUNK
from optimizers.compiled.native_library import NoCompilerError, library

KINDS = {
    (torch.float32, torch.float32): 0,
    (torch.float64, torch.float64): 1,
    (torch.bfloat16, torch.float32): 2,
}
"""Dtypes of parameters and of state that the pass is compiled for."""


class _Diagonal(ctypes.Structure):
    """``struct Diagonal`` of the source."""

    _fields_ = (
        ("chunks", ctypes.c_int64),
        ("tensor", ctypes.c_void_p),
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("p", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("m", ctypes.c_void_p),
        ("h", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Numbers:
    """What a step multiplies by, one entry a tensor but for the last two.

    Args:
        beta: β.
        lr: η.
        decay: λ_wd.
        correction: c.
        radius: r; infinite without a box.
        damping: λ.
    """

    beta: Sequence[float]
    lr: Sequence[float]
    decay: Sequence[float]
    correction: Sequence[float]
    radius: float
    damping: float


class NativeDiagonal:
    """One native pass for the steps of a diagonal curvature.

    Cost: 24 bytes read and written a float32 parameter beside the gradient's look for numbers that are not finite.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._kept: list[Tensor] = []

    @staticmethod
    def available() -> bool:
        """Whether there is a compiler."""
        try:
            library()
        except NoCompilerError:
            return False
        return True

    @staticmethod
    def serves(operator: DiagonalOperator, params: Sequence[Tensor], mean: Sequence[Tensor]) -> bool:
        """Whether the pass knows this curvature and these dtypes; ``diagonal_step.suits`` has asked for the rest."""
        if isinstance(operator, PowerDiagonal):
            if operator.power not in (0.5, 1.0):
                return False
        elif isinstance(operator, MappedDiagonal):
            return False
        first = (params[0].dtype, mean[0].dtype)
        return first in KINDS and all((p.dtype, m.dtype) == first for p, m in zip(params, mean, strict=True))

    def step_(
        self,
        operator: DiagonalOperator,
        params: Sequence[Tensor],
        gradient: Sequence[Tensor],
        mean: Sequence[Tensor],
        numbers: Numbers,
    ) -> None:
        """m and θ of the step, in place."""
        sizes = [p.numel() for p in params]
        if sizes != self._sizes:
            self._cut(sizes)
        if isinstance(operator, PowerDiagonal):
            base, root, floor = operator.base, operator.power == 0.5, operator.floor
            scales = [float(s) for s in operator.scales]
        else:
            base, root, floor, scales = operator.values, False, float("-inf"), [1.0] * len(sizes)
        table = array("d")
        rows = zip(numbers.beta, numbers.lr, numbers.decay, numbers.correction, scales, strict=True)
        for beta, lr, decay, c, scale in rows:
            table.extend((1.0 - beta, 1.0 / c, scale, 0.5 if root else 1.0, floor, numbers.damping))
            table.extend((numbers.radius, lr, 1.0 - lr * decay))
        lists = [array("q", [x.data_ptr() for x in tensors]) for tensors in (params, gradient, mean, base)]
        tensor, begin, end = (x.data_ptr() for x in self._kept)
        work = _Diagonal(
            self._kept[0].numel(),
            tensor,
            begin,
            end,
            *(pointers.buffer_info()[0] for pointers in lists),
            table.buffer_info()[0],
            torch.get_num_threads(),
        )
        kind = KINDS[params[0].dtype, mean[0].dtype]
        cast(Any, library()).soaa_diagonal(ctypes.byref(work), kind, int(root))
        torch.autograd.graph.increment_version([*params, *mean])  # as every in-place operation does

    def _cut(self, sizes: list[int]) -> None:
        """Chunks for the threads; several of a tensor where it is large."""
        chunks = [(i, a, min(a + CHUNK, n)) for i, n in enumerate(sizes) for a in range(0, n, CHUNK)]
        self._kept = [
            torch.tensor([c[0] for c in chunks], dtype=torch.int32),
            torch.tensor([c[1] for c in chunks], dtype=torch.int64),
            torch.tensor([c[2] for c in chunks], dtype=torch.int64),
        ]
        self._sizes = sizes
