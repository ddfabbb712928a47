"""Tensors of any order cut into blocks, with one square matrix a dimension: the storage of Shampoo and SOAP.

Legend: G a tensor of order k and shape (n_1, …, n_k), or a block of it; G_(i) its unfolding with n_i rows; L_i a
symmetric (n_i, n_i) factor; Q_i an orthogonal one. All factors of one parameter lie one after another in one flat
tensor, so that an optimizer's state has one entry a parameter; the functions below view it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One block of a tensor.

    Args:
        index: where it lies, a slice a dimension; ``(None,)`` sees a tensor of order 0 as one of order 1.
        shape: (n_1, …, n_k) of the block.
        factored: the dimensions that have a factor; the others count as the identity.
    """

    index: tuple[slice | None, ...]
    shape: tuple[int, ...]
    factored: tuple[int, ...]


def blocks_of(
    shape: Sequence[int], block_size: int | None, max_dim: int | None, smallest_order: int
) -> list[Block]:
    """The blocks of a tensor of ``shape``.

    Args:
        shape: of the parameter; one of order 0 counts as order 1 with one element.
        block_size: a longer dimension is cut into pieces of at most this; ``None`` cuts nothing.
        max_dim: a longer (piece of a) dimension has no factor; ``None`` gives every dimension one.
        smallest_order: tensors of a smaller order have no factors.

    >>> [b.shape for b in blocks_of((3, 5), block_size=3, max_dim=None, smallest_order=1)]
    [(3, 3), (3, 2)]
    >>> blocks_of((3, 500), block_size=None, max_dim=100, smallest_order=1)[0].factored
    (0,)
    """
    if not shape:
        return [Block((None,), (1,), (0,) if smallest_order <= 1 else ())]
    pieces = []
    for n in shape:
        step = n if block_size is None else min(block_size, n)
        pieces.append([slice(i, min(i + step, n)) for i in range(0, n, max(step, 1))])
    blocks = []
    for index in itertools.product(*pieces):
        sizes = tuple(s.stop - s.start for s in index)
        factored = tuple(i for i, n in enumerate(sizes) if max_dim is None or n <= max_dim)
        blocks.append(Block(index, sizes, factored if len(shape) >= smallest_order else ()))
    return blocks


def storage_size(blocks: Sequence[Block], *, vectors: bool = False) -> int:
    """Elements of one parameter's factors, Σ n_i²; with ``vectors`` of one number a row, Σ n_i."""
    return sum(b.shape[i] ** (1 if vectors else 2) for b in blocks for i in b.factored)


def views(flat: Tensor, blocks: Sequence[Block], *, vectors: bool = False) -> list[dict[int, Tensor]]:
    """Dimension ↦ factor for every block: views of ``flat``, so that writing to them writes to the state."""
    sizes = [b.shape[i] ** (1 if vectors else 2) for b in blocks for i in b.factored]
    pieces = iter(flat.split(sizes)) if sizes else iter(())
    return [
        {i: next(pieces) if vectors else next(pieces).view(b.shape[i], b.shape[i]) for i in b.factored}
        for b in blocks
    ]


def identity_storage(p: Tensor, blocks: Sequence[Block]) -> Tensor:
    """One parameter's factors, each the identity."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    eyes = [
        torch.eye(b.shape[i], dtype=dtype, device=p.device).reshape(-1) for b in blocks for i in b.factored
    ]
    return torch.cat(eyes) if eyes else torch.zeros(0, dtype=dtype, device=p.device)


def gram(x: Tensor, dim: int) -> Tensor:
    """X_(i) X_(i)ᵀ, the sum over all other dimensions: (n_i, n_i).

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 0)
    tensor([[5., 2.],
            [2., 1.]])

    Cost: O(n_i · numel); a large one is formed below its diagonal, in strips, and mirrored: 5/8 of the products.
    """
    unfolded = x.movedim(dim, 0).reshape(x.shape[dim], -1)
    n = unfolded.shape[0]
    if n < STRIPED:
        return unfolded @ unfolded.mT
    product = unfolded.new_empty(n, n)
    for start in range(0, n, -(-n // STRIPS)):
        end = min(start + -(-n // STRIPS), n)
        product[start:end, :end] = unfolded[start:end] @ unfolded[:end].mT
        product[:start, start:end] = product[start:end, :start].mT
    return product


STRIPED, STRIPS = 600, 4
"""From how many rows on a Gram matrix is formed in strips, and in how many; smaller ones gain nothing by it."""


def along(x: Tensor, matrices: dict[int, Tensor], *, transpose: bool = False) -> Tensor:
    """``x`` multiplied by M_i along every dimension i that has one; by M_iᵀ with ``transpose``.

    >>> x = torch.tensor([[1.0, 0.0]])
    >>> along(x, {1: torch.tensor([[0.0, 1.0], [2.0, 0.0]])})
    tensor([[0., 2.]])
    """
    for i, matrix in matrices.items():
        if x.dim() == 2:  # the plain product, without a transposed copy
            x = (
                (matrix.mT if transpose else matrix) @ x
                if i == 0
                else x @ (matrix if transpose else matrix.mT)
            )
            continue
        x = torch.tensordot(matrix, x, dims=([0 if transpose else 1], [i])).movedim(0, i)
    return x


def outer(columns: dict[int, Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
    """The tensor Π_i c_i[j_i] of ``shape``; a dimension without a column counts as ones."""
    product = torch.ones((1,) * len(shape), dtype=like.dtype, device=like.device)
    for i, c in columns.items():
        product = product * c.reshape([-1 if j == i else 1 for j in range(len(shape))])
    return product.expand(tuple(shape))
