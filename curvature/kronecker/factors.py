"""The two factors of a block from what its layer saw: A from inputs, G from output gradients.

Legend: a (groups, lead, d_in) rows of inputs; g (groups, lead, d_out) rows of gradients; lead = (N, R…), N samples
with R positions each; w the weight of a row, Σ_r w_nr = c_n; A = Σ w a aᵀ / Σ w; G = Σ g gᵀ (g carries √c_n).

``expand`` takes positions as samples: A = Σ_nr w a aᵀ, G = Σ_nr g gᵀ. ``reduce`` first brings each sample to one
row: a_n the mean of a_nr, g_n the sum of g_nr (Eschenhagen et al. 2023, arXiv 2311.00636, eqs. 20 and 24). Several
calls of one module, and of modules that share a weight, are further positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from curvature.kronecker.fisher import sample_weights
from curvature.kronecker.sample_rows import uneven
from curvature.room import Room

Sharing = Literal["expand", "reduce"]


def row_weights(weights: Tensor, lead: Sequence[int], where: str, routed: bool = False) -> Tensor:
    """The weight of every row of a layer, from the weights of the positions of z.

    Rows that are the positions of z have their weights. Otherwise a sample's weight is spread evenly over its
    rows. Rows that cannot be told apart by sample weigh as a position of z each, or as a sample where they have
    positions of their own, if all samples weigh alike: however many rows there are, so that the batches of a layer
    that sees some of them only (routing) fit together. That rows are those of the samples is proven elsewhere
    (:mod:`curvature.kronecker.sample_rows`).

    Args:
        weights: c, shaped like the positions of z, (N, T…).
        lead: the shape of the layer's positions.
        where: the layer, for the message.
        routed: whether the layer is known to see some rows only, so that as many as there are samples mean nothing.

    Raises:
        ValueError: where rows cannot be assigned to samples although the samples' weights differ.

    >>> row_weights(torch.tensor([1.0, 2.0]), (2, 2), "layer")
    tensor([[0.5000, 0.5000],
            [1.0000, 1.0000]])
    """
    lead = tuple(lead)
    if routed and len(lead) == 1 and not uneven(weights):
        return weights.mean().expand(lead)
    if lead == tuple(weights.shape):
        return weights
    c = sample_weights(weights)
    if lead and lead[0] == c.shape[0]:
        spread = c / math.prod(lead[1:])
        return spread.reshape(-1, *[1] * (len(lead) - 1)).expand(lead)
    if _flattened(lead, weights):
        return weights.reshape(lead)
    if c.shape[0] == 1:  # all rows are the one sample's
        if [n for n in lead if n != 1] == [n for n in weights.shape if n != 1]:
            return weights.reshape(lead)
        if uneven(weights):
            return (c / max(math.prod(lead), 1)).expand(lead)
    if not uneven(weights):
        one = weights.mean() if len(lead) == 1 else c.mean() / max(math.prod(lead[1:]), 1)
        return one.expand(lead)
    raise ValueError(
        f"{where} was called with positions of shape {lead}, the loss weighs outputs of shape {tuple(weights.shape)} "
        "unevenly, so which sample a row belongs to is not known: keep the samples in dim 0, or exclude this layer"
    )


def sees_some(weights: Tensor, lead: Sequence[int]) -> bool:
    """Whether a layer's rows are neither those of the samples nor the positions of z, so that it is a routed one."""
    lead = tuple(lead)
    known = lead == tuple(weights.shape) or lead[0] == sample_count(weights) or _flattened(lead, weights)
    return len(lead) == 1 and not known


def _flattened(lead: Sequence[int], weights: Tensor) -> bool:
    """Whether layer or outputs have the other's positions flattened, sample by sample."""
    return math.prod(lead) == weights.numel() and (len(lead) == 1 or weights.dim() == 1)


def sample_count(weights: Tensor) -> int:
    """N, from the weights of the positions of z."""
    return weights.shape[0] if weights.dim() else 1


def samples_of(lead: Sequence[int], weights: Tensor, where: str) -> int:
    """N, after checking that the positions of a layer divide into samples, for ``sharing="reduce"``.

    Raises:
        ValueError: where dim 0 of the layer is neither samples nor all positions of z.
    """
    samples = sample_count(weights)
    if (lead and lead[0] == samples) or _flattened(lead, weights) or samples == 1:
        return samples
    raise ValueError(
        f'{where} was called with positions of shape {tuple(lead)} for {samples} samples, so sharing="reduce" cannot '
        'sum over the positions of a sample: keep the samples in dim 0, or use sharing="expand"'
    )


def input_factor_(
    into: Tensor,
    rows: Sequence[Tensor],
    weights: Sequence[Tensor],
    with_weight: bool,
    with_bias: bool,
    empty: bool = False,
    room: Room | None = None,
) -> None:
    """A += Σ w [a; 1][a; 1]ᵀ over the rows of all calls, in place.

    The border of the 1 is Σ w a and Σ w: no row is copied to be lengthened, and the product keeps a's own, rounder
    width.

    Args:
        into: A, (groups, size_in, size_in).
        rows: a of every call, (groups, M, d_in).
        weights: w of every call, (M,).
        with_weight: whether a takes part; without it only the 1 of the bias is left.
        with_bias: whether the 1 takes part.
        empty: whether A holds nothing yet, so that the first call's part is written over whatever it contains.
        room: memory for w a.
    """
    room = room or Room()
    for a, w in zip(rows, weights, strict=True):
        if with_weight:
            a = a.to(into.dtype)
            scaled = torch.mul(a, w.unsqueeze(-1), out=room.take(a.shape, a))
            d = a.shape[-1]
            add_gram_(into[:, :d, :d], scaled, a, empty)
            if with_bias:
                border = scaled.sum(1)
                for edge in (into[:, d, :d], into[:, :d, d]):
                    edge.copy_(border) if empty else edge.add_(border)
        if with_bias:
            corner = into[:, -1, -1]
            corner.copy_(w.sum()) if empty else corner.add_(w.sum())
        empty = False


def token_factor(indices: Sequence[Tensor], weights: Sequence[Tensor], size: int) -> Tensor:
    """The diagonal of Σ w e eᵀ over one-hot rows, (1, size); a negative index is a row of zeros."""
    counts = torch.zeros(size, dtype=weights[0].dtype, device=weights[0].device)
    for index, w in zip(indices, weights, strict=True):
        flat = index.reshape(-1)
        counts.index_add_(0, flat.clamp(min=0), w.reshape(-1) * (flat >= 0))
    return counts.unsqueeze(0)


def reduce_inputs(rows: Sequence[Tensor], weights: Sequence[Tensor], samples: int) -> tuple[Tensor, Tensor]:
    """a_n, the weighted mean over the positions of all calls, (groups, N, d_in), and c_n, (N,)."""
    total: Tensor | None = None
    mass: Tensor | None = None
    for a, w in zip(rows, weights, strict=True):
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        part = (a * w.unsqueeze(-1)).reshape(a.shape[0], samples, -1, a.shape[-1]).sum(2)
        c = w.reshape(samples, -1).sum(1)
        total = part if total is None else total + part
        mass = c if mass is None else mass + c
    assert total is not None
    assert mass is not None
    safe = torch.where(mass > 0, mass, torch.ones_like(mass))
    return total / safe.unsqueeze(-1), mass


def reduce_gradients(rows: Sequence[Tensor], samples: int) -> Tensor:
    """g_n, the sum over the positions of all calls, (groups, N, d_out)."""
    parts = [g.reshape(g.shape[0], samples, -1, g.shape[-1]).sum(2) for g in rows]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def gradient_factor_(into: Tensor, rows: Tensor, empty: bool = False) -> Tensor:
    """G += Σ g gᵀ over (groups, M, d_out) rows, in place; ``empty`` as in :func:`input_factor_`."""
    rows = rows.to(into.dtype)
    add_gram_(into, rows, rows, empty)
    return into


#: A symmetric product of at least this size is formed in panels: they save more than copying mirror images costs.
SPLIT = 384
PANELS = 4


def add_gram_(into: Tensor, left: Tensor, right: Tensor, empty: bool = False) -> None:
    """S += Lᵀ R for L = W R with W diagonal, so that the product is symmetric: only one triangle of panels is computed.

    Args:
        into: S, symmetric, (groups, d, d); it may be a part of a larger matrix.
        left: L, (groups, M, d).
        right: R, (groups, M, d).
        empty: S = Lᵀ R instead, whatever S contains: neither zeros are written before nor S is read.

    Cost: five eighths of the full product where it is large; a BLAS's ``syrk`` would take half.
    """
    d = into.shape[-1]
    beta = 0 if empty else 1  # with 0, what S contains is not read, NaN or not
    if into.shape[0] != 1:
        if (
            into.is_contiguous() and left.shape[0] == into.shape[0]
        ):  # rows that all groups share are multiplied once
            into.baddbmm_(left.mT, right, beta=beta)
        else:
            into.copy_(left.mT @ right) if empty else into.add_(left.mT @ right)
        return
    S, L, R = into[0], left[0], right[0]
    if d < SPLIT:  # one matrix: the plain product is faster than a batch of one
        S.addmm_(L.mT, R, beta=beta)
        return
    width = -(-d // PANELS)
    for start in range(0, d, width):
        stop = min(start + width, d)
        S[start:stop, start:].addmm_(L[:, start:stop].mT, R[:, start:], beta=beta)
        if stop < d:
            S[stop:, start:stop] = S[start:stop, stop:].mT
