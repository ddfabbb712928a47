"""A factor of the loss's own curvature in output space: H_z = Σ_k S_k diag(±1) S_kᵀ, block by block.

Legend: z the outputs, N samples along dim 0; H_z = ∂²f/∂z², block-diagonal over samples where the loss is a sum over
them; within a sample often block-diagonal over positions too, with C classes a block. A column is a tensor shaped like
z that holds one eigenvector of every sample's block, times the root of its eigenvalue's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvature.loss_graph import LossGraph
from curvature.probes import generator, probe
from curvature.vectors import compute_dtype

#: Elements of H_z's blocks that may be formed.
MAX_BLOCK_ELEMENTS = 1 << 28


def factor_columns(graph: LossGraph) -> Iterator[tuple[Tensor, Tensor]]:
    """(S_k, signs): columns shaped like z, and the sign of each sample's eigenvalue, (N,).

    Diag(Jᵀ H_z J) = Σ_k Σ_n sign_kn (J_nᵀ S_kn)², exact for an indefinite H_z as well.

    Raises:
        ValueError: where H_z couples samples, so that no sample has a block of its own.

    Cost: C products with H_z, and an eigendecomposition of every block, O(numel(z) C²).
    """
    z = graph.output
    if z.dim() == 0:
        raise ValueError("outputs must hold the samples along dim 0, got a scalar")
    z_shape: tuple[int, ...] = tuple(z.shape)
    count = z_shape[0]
    for axes in block_axes(z_shape):
        blocks = measure_blocks(graph, axes)
        if blocks is not None:
            break
    else:
        raise ValueError(
            "the loss couples the outputs of different samples (or its curvature's blocks are too large to form), so "
            "its Gauss-Newton diagonal is no sum over samples: use GaussNewton, or a loss that is a sum over samples"
        )
    eigenvalues, eigenvectors = torch.linalg.eigh(blocks)
    largest = eigenvalues.abs().amax()
    if not bool(torch.isfinite(largest)):
        raise ValueError("the loss has a non-finite curvature at the model's outputs")
    kept = torch.finfo(eigenvalues.dtype).eps * blocks.shape[-1] * largest
    roots = eigenvectors * torch.where(eigenvalues.abs() > kept, eigenvalues.abs().sqrt(), 0.0).unsqueeze(-2)
    positions = math.prod(n for i, n in enumerate(z_shape) if i > 0 and i not in axes)
    inner = [n for i, n in enumerate(z_shape) if i > 0 and i not in axes]
    for k in range(blocks.shape[-1]):
        column = roots[..., k].reshape(count, positions, -1)
        signs = eigenvalues[..., k].sign().reshape(count, positions)
        if not bool((column != 0).any()):
            continue
        for t in range(positions):
            one = torch.zeros_like(column)
            one[:, t] = column[:, t]
            if bool((one != 0).any()):
                yield to_outputs(one.reshape(count, *inner, -1), axes, z.shape), signs[:, t]


def block_axes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Which axes may make up a block, the smallest first: none (a diagonal), the classes, everything of a sample."""
    last = len(shape) - 1
    candidates: list[tuple[int, ...]] = [()]
    if last >= 1:
        candidates.append((last,))
    if last >= 2:
        candidates += [(1,), tuple(range(1, last + 1))]
    return candidates


def to_blocks(v: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A tensor shaped like z as (…, C): the block's axes last, flattened."""
    if not axes:
        return v.unsqueeze(-1)
    moved = v.movedim(axes, tuple(range(-len(axes), 0)))
    return moved.flatten(-len(axes))


def to_outputs(v: Tensor, axes: tuple[int, ...], shape: torch.Size) -> Tensor:
    """The inverse of :func:`to_blocks`."""
    if not axes:
        return v.reshape(shape)
    rest = [n for i, n in enumerate(shape) if i not in axes]
    wide = v.reshape(*rest, *[shape[i] for i in axes])
    return wide.movedim(tuple(range(-len(axes), 0)), axes)


def measure_blocks(graph: LossGraph, axes: tuple[int, ...]) -> Tensor | None:
    """H_z as blocks (…, C, C) over ``axes``, or None where a second product shows that it has entries outside them."""
    z = graph.output
    dtype = compute_dtype(z.dtype)
    shape = z.shape
    like = to_blocks(torch.zeros(shape, dtype=dtype, device=z.device), axes)
    size = like.shape[-1]
    if like.numel() * size > MAX_BLOCK_ELEMENTS:
        return None
    columns = []
    for c in range(size):
        unit = torch.zeros_like(like)
        unit[..., c] = 1.0
        columns.append(to_blocks(graph.loss_hvp(to_outputs(unit, axes, shape)).to(dtype), axes))
    blocks = torch.stack(columns, -1)
    tolerance = 5 * float(torch.finfo(z.dtype).eps) ** 0.6
    for index in range(2):  # entries outside the blocks would have to cancel in two random sums
        stretch = 1 + torch.rand(shape, generator=generator(0xB10C, index, z.device), device=z.device)
        v = probe([z], 0xB10C, 2 + index)[0] * stretch.to(dtype)
        product = to_blocks(graph.loss_hvp(v).to(dtype), axes)
        ours = (blocks @ to_blocks(v, axes).unsqueeze(-1)).squeeze(-1)
        if not bool((product - ours).abs().max() <= tolerance * product.abs().max()):
            return None
    return 0.5 * (blocks + blocks.mT)
