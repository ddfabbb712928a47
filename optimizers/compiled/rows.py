"""Tensors of any shapes as few matrices of rows, so that one compiled kernel serves them all.

A compiler specialises on shapes: one kernel a tensor is minutes of compilation for a language model. Here every
tensor is seen as rows of :data:`WIDTH` elements with a dynamic number of rows. Large tensors are viewed where they lie.
What is left over, small tensors and the ends of large ones, is copied for the time of a step into a *pool*: one for
every *class* of tensors, which have all their numbers (learning rate, bias corrections) in common. A *leaf* is one of
these matrices; every leaf has one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH = 1024
"""Elements a row."""

SMALLEST_LEAF = 1 << 14
"""Elements below which a tensor is copied into a pool: a kernel of its own would cost more than its arithmetic."""

ALIGNMENT = 16
"""Bytes: accelerator kernels load vectors of that size, and tensors that start elsewhere are copied."""


@dataclass(frozen=True)
class Layout:
    """How a list of tensors is seen as rows.

    Args:
        heads: (tensor, rows) of every large tensor.
        pieces: for every class, (tensor, first element, elements) of what goes to its pool.
        classes: the class of every leaf: heads first, then the pools.
    """

    heads: tuple[tuple[int, int], ...]
    pieces: tuple[tuple[tuple[int, int, int], ...], ...]
    classes: tuple[int, ...]

    @classmethod
    def of(cls, classes: Sequence[int], *lists: Sequence[Tensor]) -> Layout:
        """The layout of lists of contiguous tensors of equal shapes.

        Args:
            classes: the class of every tensor.
            lists: the parameters and their state; a tensor that lies unaligned in any of them is copied whole.
        """
        heads: list[tuple[int, int]] = []
        pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(max(classes) + 1)]
        for i, (kind, x) in enumerate(zip(classes, lists[0], strict=True)):
            aligned = all(tensors[i].data_ptr() % ALIGNMENT == 0 for tensors in lists)
            rows = x.numel() // WIDTH if aligned and x.numel() >= SMALLEST_LEAF else 0
            if rows:
                heads.append((i, rows))
            if x.numel() > rows * WIDTH:
                pieces[kind].append((i, rows * WIDTH, x.numel() - rows * WIDTH))
        pools = [kind for kind, held in enumerate(pieces) if held]
        return cls(
            tuple(heads),
            tuple(tuple(pieces[kind]) for kind in pools),
            (*(classes[i] for i, _ in heads), *pools),
        )

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The large tensors as (rows, WIDTH) views."""
        return [torch.as_strided(tensors[i], (r, WIDTH), (WIDTH, 1)) for i, r in self.heads]

    def rests(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The pieces that go to every pool, as flat views."""
        return [
            [
                torch.as_strided(tensors[i], (n,), (1,), tensors[i].storage_offset() + a)
                if a
                else tensors[i].view(-1)
                for i, a, n in held
            ]
            for held in self.pieces
        ]

    def pools(self, dtype: torch.dtype, device: torch.device) -> list[Pool]:
        """Pools of zeros."""
        return [Pool.of([n for _, _, n in held], dtype, device) for held in self.pieces]


@dataclass(frozen=True)
class Pool:
    """Rows that small tensors are copied into, one after another; what no tensor fills stays 0.

    Args:
        rows: the matrix, two rows or more, since a compiler takes one row for a case of its own.
        filled: its elements that tensors fill, flat.
        slots: where every piece lies in it, flat.
    """

    rows: Tensor
    filled: Tensor
    slots: list[Tensor]

    @classmethod
    def of(cls, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Pool:
        """A pool for pieces of these sizes."""
        total = sum(sizes)
        rows = torch.zeros(max(2, -(-total // WIDTH)), WIDTH, dtype=dtype, device=device)
        filled = rows.view(-1)[:total]
        return cls(rows, filled, list(filled.split(list(sizes))))

    def gather(self, pieces: Sequence[Tensor]) -> None:
        """Copy the pieces in."""
        torch.cat(list(pieces), out=self.filled)

    def scatter(self, pieces: Sequence[Tensor]) -> None:
        """Copy the pieces out."""
        torch._foreach_copy_(list(pieces), self.slots)
