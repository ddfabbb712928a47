"""Second moments of per-sample gradients in a block's eigenbasis, which EK-FAC puts in place of λ_G λ_Aᵀ.

Legend: ∇_n = Σ_r g_nr [a_nr; 1]ᵀ the gradient of sample n over its R positions (all calls), per vector sent back;
S = Σ_n (Q_Gᵀ ∇_n Q_A)², elementwise: the diagonal of the Gauss-Newton block in the basis Q_G ⊗ Q_A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.kronecker.layout import Block
from curvature.kronecker.rules import BlockCall

#: Elements of per-sample gradients that may exist at once.
CHUNK = 1 << 22


def add_moments_(
    into: Tensor,
    block: Block,
    calls: Sequence[BlockCall],
    gradients: Sequence[Tensor],
    Q_G: Tensor | None,
    Q_A: Tensor | None,
    samples: int,
) -> None:
    """S += Σ_n (Q_Gᵀ ∇_n Q_A)² for one vector sent back.

    Args:
        into: S, (groups, d_out, size_in).
        block: the block.
        calls: its calls.
        gradients: g of every call, (groups, lead, d_out).
        Q_G: (groups, d_out, d_out), or ``None``.
        Q_A: (groups, size_in, size_in), or ``None``.
        samples: N.

    Cost: O(N R d (d_out + size_in)) for the bases, then O(N d_out size_in) without sharing, R times that with.
    """
    left, right = [], []
    for call, g in zip(calls, gradients, strict=True):
        rows = by_sample(g, samples, call.name)
        left.append(rows if Q_G is None else rows @ Q_G.unsqueeze(1))
        a = block.rule.input_rows(call.module, call.inputs)
        if block.diagonal_input:
            right.append(by_sample(a.unsqueeze(-1), samples, call.name))
            continue
        a = by_sample(_with_bias(block, a.to(into.dtype)), samples, call.name)
        right.append((a if Q_A is None else a @ Q_A.unsqueeze(1)).expand(into.shape[0], -1, -1, -1))
    g, a = torch.cat(left, 2), torch.cat(right, 2)
    if block.diagonal_input:
        _add_one_hot_(into, g.squeeze(0), a.squeeze(0).squeeze(-1))
    else:
        _add_squares_(into, g, a)


def add_paired_moments_(
    into: Tensor,
    block: Block,
    calls: Sequence[BlockCall],
    gradients: Sequence[Tensor],
    exchanged: Sequence[BlockCall],
    their_gradients: Sequence[Tensor],
    bases: tuple[Tensor | None, Tensor | None],
    samples: int,
) -> None:
    """S += Σ_n (Q_Gᵀ ∇_n Q_A)² of a head tied to an embedding: ∇_n = Σ_p u_p h_pᵀ + Σ_r e_r g_rᵀ, cross terms and all.

    Args:
        into: S, (1, V, d).
        block: the head's block.
        calls: of the head, with inputs h.
        gradients: u of every call, (1, lead, V).
        exchanged: the calls of the embedding, with tokens r.
        their_gradients: g of every one, (1, lead, d).
        bases: Q_G, (1, V, V), and Q_A, (1, d, d).
        samples: N.

    Cost: O(N R V d) for R positions of both kinds a sample.
    """
    Q_G, Q_A = bases
    assert Q_G is not None
    assert Q_A is not None
    assert block.transposed is not None
    left, right = [], []
    for call, u in zip(calls, gradients, strict=True):
        h = block.rule.input_rows(call.module, call.inputs).to(into.dtype)
        left.append(by_sample(u.to(into.dtype), samples, call.name) @ Q_G.unsqueeze(1))
        right.append(by_sample(h, samples, call.name) @ Q_A.unsqueeze(1))
    for call, g in zip(exchanged, their_gradients, strict=True):
        index = block.transposed.rule.input_rows(call.module, call.inputs)
        token = by_sample(index.unsqueeze(-1), samples, call.name).squeeze(-1)
        left.append(Q_G[0][token.clamp(min=0)] * (token >= 0).unsqueeze(-1))
        right.append(by_sample(g.to(into.dtype), samples, call.name) @ Q_A.unsqueeze(1))
    if left:
        _add_squares_(into, torch.cat(left, 2), torch.cat(right, 2))


def _add_squares_(into: Tensor, g: Tensor, a: Tensor) -> None:
    """S += Σ_n (Σ_r g_nr a_nrᵀ)² for (groups, N, R, d_out) and (groups, N, R, size_in)."""
    if g.shape[2] == 1:
        into.baddbmm_(g.squeeze(2).square().mT, a.squeeze(2).square())
        return
    step = max(1, CHUNK // into.numel())
    for start in range(0, g.shape[1], step):
        part = slice(start, start + step)
        into.add_((g[:, part].mT @ a[:, part]).square_().sum(1))


def by_sample(rows: Tensor, samples: int, where: str) -> Tensor:
    """(groups, lead, d) as (groups, N, R, d).

    Raises:
        ValueError: where the positions cannot be told apart by sample.
    """
    lead = tuple(rows.shape[1:-1])
    if samples != 1 and (not lead or (lead[0] != samples and (len(lead) > 1 or lead[0] % samples))):
        raise ValueError(
            f"{where} was called with positions of shape {lead} for {samples} samples, so EKFAC cannot form each "
            "sample's gradient: keep the samples in dim 0, or exclude this layer"
        )
    return rows.reshape(rows.shape[0], samples, math.prod(lead) // samples, rows.shape[-1])


def _with_bias(block: Block, a: Tensor) -> Tensor:
    one = a.new_ones(*a.shape[:-1], 1)
    if block.weight is None:
        return one
    return a if block.bias is None else torch.cat([a, one], -1)


def _add_one_hot_(into: Tensor, g: Tensor, index: Tensor) -> None:
    """S[:, :, v] += Σ_n (Σ_{r: token v} g_nr)², without a (V, d) gradient a sample.

    Args:
        into: S, (1, d, V).
        g: (N, R, d).
        index: tokens, (N, R), negative for a row of zeros.
    """
    vocabulary = into.shape[-1]
    sample = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
    kept = index >= 0
    pairs, place = torch.unique((sample * vocabulary + index)[kept], return_inverse=True)
    sums = g.new_zeros(pairs.shape[0], g.shape[-1]).index_add_(0, place, g[kept])
    into[0].index_add_(1, pairs % vocabulary, sums.square_().mT)
