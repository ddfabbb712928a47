"""Tensors of any shapes as few lists of rows, so that one compiled kernel serves them all.

A compiler specialises on shapes: one kernel a tensor is minutes of compilation for a language model. Here every
tensor is seen as rows of :data:`WIDTH` elements with a dynamic number of rows. Large tensors are viewed where they lie
(*leaves*). What is left over, small tensors and the ends of large ones, is copied for the time of a step into one
*pool* of rows, each of which belongs to one tensor. Numbers of a tensor (its learning rate, its bias corrections) are
given a row at a time, so a kernel need not know where tensors begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH = 1024
"""Elements a row."""

SMALLEST_LEAF = 1 << 14
"""Elements below which a tensor is copied into the pool: a call for it would cost more than its arithmetic."""

ALIGNMENT = 16
"""Bytes: accelerator kernels load vectors of that size, and rows that start elsewhere go to the pool."""


@dataclass(frozen=True)
class Layout:
    """How a list of tensors is seen as rows.

    Args:
        leaves: (tensor, rows) of every large tensor.
        pieces: (tensor, first element, elements, rows) of what goes to the pool.
        owner: the tensor of every row, leaves first, then the pool; on the tensors' device.
        split: rows of every leaf, then of the pool.
    """

    leaves: tuple[tuple[int, int], ...]
    pieces: tuple[tuple[int, int, int, int], ...]
    owner: Tensor
    split: tuple[int, ...]

    @classmethod
    def of(cls, *lists: Sequence[Tensor]) -> Layout:
        """The layout of lists of contiguous tensors of equal shapes.

        Args:
            lists: the parameters and their state; a tensor that lies unaligned in any of them is no leaf.
        """
        first = lists[0]
        leaves, pieces = [], []
        for i, x in enumerate(first):
            aligned = all(tensors[i].data_ptr() % ALIGNMENT == 0 for tensors in lists)
            rows = x.numel() // WIDTH if aligned and x.numel() >= SMALLEST_LEAF else 0
            if rows:
                leaves.append((i, rows))
            rest = x.numel() - rows * WIDTH
            if rest:
                pieces.append((i, rows * WIDTH, rest, -(-rest // WIDTH)))
        split = [rows for _, rows in leaves]
        owner = torch.repeat_interleave(
            torch.tensor([i for i, _ in leaves] + [i for i, *_ in pieces], dtype=torch.long),
            torch.tensor(split + [rows for *_, rows in pieces], dtype=torch.long),
        )
        return cls(
            tuple(leaves),
            tuple(pieces),
            owner.to(first[0].device),
            (*split, sum(rows for *_, rows in pieces)),
        )

    @property
    def pooled_rows(self) -> int:
        """Rows of the pool."""
        return self.split[-1]

    def heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The leaves of ``tensors`` as (rows, WIDTH) views."""
        return [torch.as_strided(tensors[i], (r, WIDTH), (WIDTH, 1)) for i, r in self.leaves]

    def rests(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The pieces of ``tensors`` that go to the pool, as flat views."""
        return [
            torch.as_strided(tensors[i], (n,), (1,), tensors[i].storage_offset() + a)
            if a
            else tensors[i].view(-1)
            for i, a, n, _ in self.pieces
        ]

    def pool(self, like: Tensor) -> Pool:
        """A pool of zeros in the dtype of ``like``."""
        rows = torch.zeros(self.pooled_rows, WIDTH, dtype=like.dtype, device=like.device)
        flat, slots, start = rows.view(-1), [], 0
        for _, _, n, r in self.pieces:
            slots.append(flat[start : start + n])
            start += r * WIDTH
        return Pool(rows, slots)

    def of_rows(self, table: Tensor) -> list[Tensor]:
        """Rows of ``table`` (one a tensor) given out to every row: one matrix a leaf, and the pool's."""
        return list(table.index_select(0, self.owner).split(self.split))

    def weighted(self, sums: Tensor, weights: Tensor) -> Tensor:
        """Σ over rows of (sums, rows) ``sums``, each row weighted by its tensor's (tensors, sums) ``weights``."""
        return (sums * weights.index_select(0, self.owner).t()).sum(1)


@dataclass(frozen=True)
class Pool:
    """Rows that small tensors are copied into; what no tensor fills stays 0.

    Args:
        rows: the matrix.
        slots: where every piece lies in it, flat.
    """

    rows: Tensor
    slots: list[Tensor]

    def gather(self, pieces: Sequence[Tensor]) -> None:
        """Copy the pieces in."""
        if self.slots:
            torch._foreach_copy_(self.slots, list(pieces))

    def scatter(self, pieces: Sequence[Tensor]) -> None:
        """Copy the pieces out."""
        if self.slots:
            torch._foreach_copy_(list(pieces), self.slots)
