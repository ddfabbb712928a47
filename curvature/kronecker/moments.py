"""Second moments of per-sample gradients in a block's eigenbasis, which EK-FAC puts in place of λ_G λ_Aᵀ.

Legend: ∇_n = Σ_r g_nr [a_nr; 1]ᵀ the gradient of sample n over its R positions (all calls), per vector sent back;
S = Σ_n (Q_Gᵀ ∇_n Q_A)², elementwise: the diagonal of the Gauss-Newton block in the basis Q_G ⊗ Q_A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from curvature.kronecker.layout import Block
from curvature.kronecker.rules import LayerRule
from curvature.kronecker.rules.base import samples_first

#: Elements of per-sample gradients that may exist at once.
CHUNK = 1 << 22

#: Elements of inputs and gradients that a first step may hold until its bases are known.
HELD = 1 << 26


class Inputs(Protocol):
    """A call's module, name and inputs."""

    @property
    def module(self) -> nn.Module:
        """The module."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the rule's ``input_rows`` reads."""
        ...

    @property
    def sample_axis(self) -> int:
        """Which axis of the positions is the samples'."""
        ...

    def input_rows(self, rule: LayerRule) -> Tensor:
        """a, the samples first."""
        ...


@dataclass(frozen=True)
class HeldInputs:
    """A call's inputs without its place in a graph, which they would keep alive."""

    module: nn.Module
    name: str
    inputs: tuple[Tensor, ...]
    sample_axis: int

    def input_rows(self, rule: LayerRule) -> Tensor:
        """a, the samples first."""
        return samples_first(rule.input_rows(self.module, self.inputs), self.sample_axis)


@dataclass(frozen=True)
class Term:
    """What one vector sent back adds to a block's S, in whatever basis.

    Args:
        block: the block.
        at: the groups that take part.
        calls: its calls.
        gradients: g of every call, (groups, lead, d_out).
        samples: N.
        exchanged: the calls of an embedding that is tied to this head.
        theirs: g of every one of those.
    """

    block: Block
    at: slice
    calls: Sequence[Inputs]
    gradients: Sequence[Tensor]
    samples: int
    exchanged: Sequence[Inputs] = ()
    theirs: Sequence[Tensor] = ()

    def add_to_(self, into: Tensor, Q_G: Tensor | None, Q_A: Tensor | None) -> None:
        """S += Σ_n (Q_Gᵀ ∇_n Q_A)²."""
        if self.block.transposed is not None:
            uses = (self.calls, self.gradients, self.exchanged, self.theirs)
            add_paired_moments_(into, self.block, *uses, (Q_G, Q_A), self.samples)
            return
        Q_G, Q_A = (None if Q is None else Q[self.at] for Q in (Q_G, Q_A))
        add_moments_(into[self.at], self.block, self.calls, self.gradients, Q_G, Q_A, self.samples)


@dataclass
class Held:
    """The terms of a step that knows its bases only when all of it was seen, up to :data:`HELD` elements.

    Args:
        terms: by root parameter.
        elements: in all of them.
        full: whether there were more, and nothing is held.
    """

    terms: dict[int, list[Term]] = field(default_factory=dict)
    elements: int = 0
    full: bool = False
    _calls: dict[int, tuple[Inputs, HeldInputs]] = field(default_factory=dict)

    def add(self, term: Term) -> None:
        """Copy a term, so that neither its graph nor what is written to its inputs later matters."""
        if self.full:
            return
        self.elements += sum(g.numel() for g in (*term.gradients, *term.theirs))
        kept = Term(
            term.block,
            term.at,
            [self._inputs_of(call) for call in term.calls],
            [g.detach().clone() for g in term.gradients],
            term.samples,
            [self._inputs_of(call) for call in term.exchanged],
            [g.detach().clone() for g in term.theirs],
        )
        self.terms.setdefault(term.block.root, []).append(kept)
        if self.elements > HELD:
            self.full = True
            self.terms.clear()
            self._calls.clear()

    def end_of_part(self) -> None:
        """Let the calls of a micro-batch go: the next one's are others."""
        self._calls.clear()

    def without(self, roots: Sequence[int]) -> dict[int, list[Term]]:
        """Take the terms of these blocks out."""
        taken = {root: self.terms.pop(root) for root in roots if root in self.terms}
        if not self.terms:
            self.elements = 0
        return taken

    def _inputs_of(self, call: Inputs) -> HeldInputs:
        if id(call) not in self._calls:  # every vector sent back meets the same inputs
            inputs = tuple(x.clone() for x in call.inputs)
            self.elements += sum(x.numel() for x in inputs)
            self._calls[id(call)] = (call, HeldInputs(call.module, call.name, inputs, call.sample_axis))
        return self._calls[id(call)][1]


def add_moments_(
    into: Tensor,
    block: Block,
    calls: Sequence[Inputs],
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
        a = call.input_rows(block.rule)
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
    calls: Sequence[Inputs],
    gradients: Sequence[Tensor],
    exchanged: Sequence[Inputs],
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
        h = call.input_rows(block.rule).to(into.dtype)
        left.append(by_sample(u.to(into.dtype), samples, call.name) @ Q_G.unsqueeze(1))
        right.append(by_sample(h, samples, call.name) @ Q_A.unsqueeze(1))
    for call, g in zip(exchanged, their_gradients, strict=True):
        index = call.input_rows(block.transposed.rule)
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
    if math.prod(lead) % samples:
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
    into[0].index_add_(1, pairs % vocabulary, sums.to(into.dtype).square_().mT)
