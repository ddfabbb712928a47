"""The two passes of an elementwise step over rows, compiled once for all tensors of a kind.

Legend (see ``optimizers.elementwise``): g gradient, m and v running means of g and g², u the step at learning rate 1.
A *table* holds the numbers of a leaf (see :mod:`optimizers.compiled.rows`), its columns named below. Both passes form
the new m and v; only the second writes them.

- :func:`observe` reads (g, m, v) and writes nothing but sums: those of the new m and v that scale the step, whether g
  is finite, and what the *previous* step predicted, which the old m and v still tell.
- :func:`move_` reads (g, m, v, θ) and updates m, v and θ in place.

So a sum that every element waits for, and a test before anything is written, cost no third pass. Reductions and
in-place updates stay in separate kernels: in one, a compiler for CPUs would write the new state aside and copy it back.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from optimizers.compiled.rows import WIDTH

LEAVES = 8
"""Leaves a call: fewer calls against longer compilation. Calls with fewer are filled up with rows of ones."""

COLUMNS = (
    "gradient_scale",  # what g is multiplied by: -1 to climb, 1/scale of a GradScaler
    "mean_weight",  # 1 - β₁
    "moment_decay",  # β₂
    "moment_weight",  # 1 - β₂
    "mean_correction",  # 1 / (1 - β₁ᵗ)
    "moment_correction",  # 1 / (1 - β₂ᵗ)
    "radius",  # d
    "curvature",  # d (1 + s), 0 without the first branch
    "eps",
    "lr",
    "kept",  # 1 - ηλ
    "quadratic",  # q in the prediction η⟨m̂,u⟩ - q⟨v̂,u²⟩
)
"""Columns of a table."""

STILL = (0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0)
"""A row with which nothing changes."""

INPUTS = ("mean_kept", "mean_gain", "curvature", "eps")
"""Columns of what :func:`observe` is given a leaf: 1 - w and w·(gradient_scale) of the new m, then the *previous*
step's κ and ε′ (see :func:`_direction`)."""

SUMS = ("mean_square", "moment", "gradient_square", "finite", "linear", "quadratic")
"""What :func:`observe` returns of a leaf: Σm², Σv (the old one), Σg², 0 or NaN, and of the previous step Σmw, Σvw²."""

PREDICTED = ("linear", "quadratic", "square", "inside")
"""What :func:`predict` returns of a leaf: Σmw, Σvw², Σw² and the elements that the first branch decided."""

(_G, _W1, _B2, _W2, _C1, _C2, _D, _K, _EPS, _LR, _KEPT, _Q) = range(len(COLUMNS))


def _total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of every part, rows first: over a dynamic length it would be cascaded, which takes far longer."""
    return torch.stack([part.sum(1).sum() for part in parts])


def _moments(g: Tensor, m: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g = g * table[_G]
    return (
        g,
        m + (g - m) * table[_W1],
        v * table[_B2] + (g * g) * table[_W2],
    )


def _step(m: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m̂, v̂, u and where the first branch decided."""
    mean, moment = m * table[_C1], v * table[_C2]
    rms = moment.sqrt()
    curvature = table[_K]
    # Without the first branch its factor is 0, and 0 times a moment that overflowed is not a number.
    curved = torch.where(curvature == 0.0, 0.0, moment * curvature)
    largest = torch.maximum(curved, rms)
    u = table[_D] * mean / (largest + table[_EPS])
    return mean, moment, u, largest > rms


def _direction(m: Tensor, v: Tensor, curvature: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w = m / (max(κv, √v) + ε′), of which u is a multiple; and both sides of the maximum.

    With c₁ and c₂ the bias corrections, κ = d(1+s)/√c₂, ε′ = ε√c₂ and u = (d√c₂/c₁) w. Numbers that are the same for a
    whole leaf are multiplied in after the sum, since arithmetic is what this pass costs.
    """
    rms = v.sqrt()
    largest = torch.maximum(v * curvature, rms)
    return m / (largest + eps), largest, rms


def observe(
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> list[Tensor]:
    """:data:`SUMS` of every leaf.

    Args:
        g: gradients.
        m: means before this step.
        v: second moments before this step.
        inputs: :data:`INPUTS` of every leaf.
    """
    found = []
    for g_i, m_i, v_i, x in zip(g, m, v, inputs, strict=True):
        w, _, _ = _direction(m_i, v_i, x[2], x[3])
        g_i = g_i.to(v_i.dtype)
        m_new = m_i * x[0] + g_i * x[1]
        parts = (m_new * m_new, v_i, g_i * g_i, g_i * 0.0, m_i * w, v_i * (w * w))
        found.append(_total(parts))
    return found


def predict(m: Sequence[Tensor], v: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """:data:`PREDICTED` of every leaf; m and v as the step left them."""
    found = []
    for m_i, v_i, x in zip(m, v, inputs, strict=True):
        w, largest, rms = _direction(m_i, v_i, x[2], x[3])
        parts = (m_i * w, v_i * (w * w), w * w, (largest > rms).to(v_i.dtype))
        found.append(_total(parts))
    return found


def move_(
    p: Sequence[Tensor],
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    tables: Sequence[Tensor],
    finite: Tensor,
) -> None:
    """θ ← (1-ηλ)θ - ηu with the new m and v, all in place; nothing changes where ``finite`` is false."""
    for p_i, g_i, m_i, v_i, table in zip(p, g, m, v, tables, strict=True):
        _, m_new, v_new = _moments(g_i, m_i, v_i, table)
        _, _, u, _ = _step(m_new, v_new, table)
        moved = p_i * table[_KEPT] - table[_LR] * u
        m_i.copy_(torch.where(finite, m_new, m_i))
        v_i.copy_(torch.where(finite, v_new, v_i))
        p_i.copy_(torch.where(finite, moved, p_i))


def all_zero(g: Sequence[Tensor]) -> list[Tensor]:
    """Σ 0·g of every leaf: 0, or NaN where an element is not finite."""
    return [(g_i * 0.0).sum(1).sum() for g_i in g]


@dataclass(frozen=True)
class Kind:
    """What the kernels are specialised to."""

    device: torch.device
    param: torch.dtype
    gradient: torch.dtype
    state: torch.dtype


class Kernels:
    """The compiled passes for one kind of tensors, each compiled when first called.

    Args:
        kind: devices and dtypes.

    Cost: each pass compiles once a process and kind (a few seconds), whatever the number of tensors and their shapes.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        sizes = [
            64 + i for i in range(LEAVES)
        ]  # distinct, or the compiler would take the leaves for equally long

        def leaves(width: int, dtype: torch.dtype) -> list[Tensor]:
            made = [torch.ones(rows, width, dtype=dtype, device=kind.device) for rows in sizes]
            for x in made:
                torch._dynamo.mark_dynamic(x, 0)
            return made

        self._p, self._g = leaves(WIDTH, kind.param), leaves(WIDTH, kind.gradient)
        self._m, self._v = leaves(WIDTH, kind.state), leaves(WIDTH, kind.state)
        # filling stays as it is, whatever the number of steps
        self._table = [torch.tensor(STILL, dtype=kind.state, device=kind.device) for _ in sizes]
        self._inputs = [torch.ones(len(INPUTS), dtype=kind.state, device=kind.device) for _ in sizes]
        yes = torch.ones((), dtype=torch.bool, device=kind.device)
        self._passes: dict[str, tuple[Callable[..., Any], list[list[Tensor]], list[Any]]] = {
            "observe": (compiled(observe), [self._g, self._m, self._v, self._inputs], []),
            "predict": (compiled(predict), [self._m, self._v, self._inputs], []),
            "all_zero": (compiled(all_zero), [self._g], []),
            "move_": (compiled(move_), [self._p, self._g, self._m, self._v, self._table], [yes]),
        }
        self._ready: set[str] = set()

    def prepare(self, *names: str) -> None:
        """Compile passes, on tensors of their own: a compiler that fails does so before anything has changed."""
        for name in names:
            if name not in self._ready:
                function, spare, rest = self._passes[name]
                function(*spare, *rest)
                self._ready.add(name)

    def run(self, name: str, lists: list[list[Tensor]], *rest: Any) -> list[Tensor]:
        """A pass over all rows: :func:`observe`, :func:`predict`, :func:`all_zero` or :func:`move_`.

        Args:
            name: of the pass.
            lists: its arguments, a tensor a leaf.
            rest: its further arguments.

        Returns:
            what it returns of every leaf.
        """
        self.prepare(name)
        function, spare, _ = self._passes[name]
        found: list[Tensor] = []
        for count, chunk in chunks(lists, spare):
            found += (function(*chunk, *rest) or [])[:count]
        return found


def chunks(lists: list[list[Tensor]], fill: list[list[Tensor]]) -> list[tuple[int, list[list[Tensor]]]]:
    """``lists`` in parts of :data:`LEAVES`, the last one filled up; with the number that are not filling."""
    parts = []
    for start in range(0, len(lists[0]), LEAVES):
        taken = [x[start : start + LEAVES] for x in lists]
        count = len(taken[0])
        parts.append((count, [x + spare[: LEAVES - count] for x, spare in zip(taken, fill, strict=True)]))
    return parts


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled for the first arguments it is called with, and never again.

    The caller answers for every later call being of the same kind, so the compiler's checks of each argument (which
    would take longer than small kernels do) are left out where the installed PyTorch lets them.
    """
    # Compiled code is kept with the code object: a copy of it keeps kinds apart.
    code = cast(types.FunctionType, function).__code__.replace()
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    skip = getattr(torch.compiler, "skip_all_guards_unsafe", None)
    options = None if skip is None else {"guard_filter_fn": skip}
    return torch.compile(own, fullgraph=True, options=options)


def compiler_failures() -> tuple[type[Exception], ...]:
    """What is raised where there is no compiler that works: none for this device, or none installed."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException, ImportError, NotImplementedError)


@lru_cache(maxsize=32)
def kernels_of(kind: Kind) -> Kernels:
    """The kernels of a kind, shared by all optimizers of a process."""
    return Kernels(kind)
