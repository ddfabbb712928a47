"""The two passes of an elementwise step over rows, compiled once for all tensors of a kind.

Legend (see ``optimizers.elementwise``): g gradient, m and v running means of g and g², u the step at learning rate 1.
A *table* has a row for every row of elements, its columns named below. Both passes form the new m and v; only the
second writes them.

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

LEAVES = 4
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

SUMS = ("mean_square", "moment", "finite", "predicted", "step_square", "inside")
"""Rows of what :func:`observe` returns: Σm̂², Σv̂, 0 or NaN, and of the previous step P, ‖ηu‖² and the elements that the
first branch decided."""

(_G, _W1, _B2, _W2, _C1, _C2, _D, _K, _EPS, _LR, _KEPT, _Q) = range(len(COLUMNS))


def _column(table: Tensor, index: int) -> Tensor:
    return table[:, index : index + 1]


def _moments(g: Tensor, m: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g = g * _column(table, _G)
    return (
        g,
        m + (g - m) * _column(table, _W1),
        v * _column(table, _B2) + (g * g) * _column(table, _W2),
    )


def _step(m: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m̂, v̂, u and where the first branch decided."""
    mean, moment = m * _column(table, _C1), v * _column(table, _C2)
    rms = moment.sqrt()
    curvature = _column(table, _K)
    # Without the first branch its factor is 0, and 0 times a moment that overflowed is not a number.
    curved = torch.where(curvature == 0.0, 0.0, moment * curvature)
    largest = torch.maximum(curved, rms)
    u = _column(table, _D) * mean / (largest + _column(table, _EPS))
    return mean, moment, u, largest > rms


def observe(
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    tables: Sequence[Tensor],
    previous: Sequence[Tensor],
) -> list[Tensor]:
    """:data:`SUMS` of every row, (sums, rows) a leaf.

    Args:
        g: gradients.
        m: means before this step.
        v: second moments before this step.
        tables: this step's numbers, d and what depends on it not yet known.
        previous: the previous step's numbers.
    """
    found = []
    for g_i, m_i, v_i, new, old in zip(g, m, v, tables, previous, strict=True):
        mean, moment, u, inside = _step(m_i, v_i, old)
        moved = u * _column(old, _LR)
        g_i, m_new, v_new = _moments(g_i, m_i, v_i, new)
        new_mean = m_new * _column(new, _C1)
        # Every number of the table is multiplied in before the sum: each sum is then written where it is returned.
        found.append(
            torch.stack(
                [
                    (new_mean * new_mean).sum(1),
                    (v_new * _column(new, _C2)).sum(1),
                    (g_i * 0.0).sum(1),
                    (mean * moved - moment * u * u * _column(old, _Q)).sum(1),
                    (moved * moved).sum(1),
                    inside.to(v_i.dtype).sum(1),
                ]
            )
        )
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
        moved = p_i * _column(table, _KEPT) - _column(table, _LR) * u
        m_i.copy_(torch.where(finite, m_new, m_i))
        v_i.copy_(torch.where(finite, v_new, v_i))
        p_i.copy_(torch.where(finite, moved, p_i))


def all_zero(g: Sequence[Tensor]) -> list[Tensor]:
    """Σ 0·g of every row: 0, or NaN where an element is not finite."""
    return [(g_i * 0.0).sum(1) for g_i in g]


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
        self._table, self._previous = leaves(len(COLUMNS), kind.state), leaves(len(COLUMNS), kind.state)
        for table in (*self._table, *self._previous):  # filling stays as it is, whatever the number of steps
            table.copy_(table.new_tensor(STILL))
        self._finite = torch.ones((), dtype=torch.bool, device=kind.device)
        self._observe, self._all_zero, self._move = compiled(observe), compiled(all_zero), compiled(move_)
        self._ready: set[str] = set()

    def prepare(self, observe: bool) -> None:
        """Compile what a step calls, on tensors of its own.

        Args:
            observe: the pass of sums, or only the test for a gradient that is not finite.
        """
        self._once("observe" if observe else "all_zero")
        self._once("move")

    def _once(self, name: str) -> None:
        if name in self._ready:
            return
        if name == "observe":
            self._observe(*self._spare_for_observe)
        elif name == "all_zero":
            self._all_zero(self._g)
        else:
            self._move(*self._spare_for_move, self._finite)
        self._ready.add(name)

    @property
    def _spare_for_observe(self) -> list[list[Tensor]]:
        return [self._g, self._m, self._v, self._table, self._previous]

    @property
    def _spare_for_move(self) -> list[list[Tensor]]:
        return [self._p, self._g, self._m, self._v, self._table]

    def observe(
        self,
        g: list[Tensor],
        m: list[Tensor],
        v: list[Tensor],
        tables: list[Tensor],
        previous: list[Tensor],
    ) -> Tensor:
        """:data:`SUMS` over all rows."""
        self._once("observe")
        found: list[Tensor] = []
        for count, chunk in chunks([g, m, v, tables, previous], self._spare_for_observe):
            found += self._observe(*chunk)[:count]
        return torch.cat(found, 1).sum(1)

    def all_finite(self, g: list[Tensor]) -> Tensor:
        """Whether every element of g is finite."""
        self._once("all_zero")
        found: list[Tensor] = []
        for count, chunk in chunks([g], [self._g]):
            found += self._all_zero(*chunk)[:count]
        return torch.cat(found).sum() == 0.0

    def move_(
        self,
        p: list[Tensor],
        g: list[Tensor],
        m: list[Tensor],
        v: list[Tensor],
        tables: list[Tensor],
        finite: Tensor,
    ) -> None:
        """:func:`move_` over all rows."""
        self._once("move")
        for _, chunk in chunks([p, g, m, v, tables], self._spare_for_move):
            self._move(*chunk, finite)


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
