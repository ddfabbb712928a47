"""SOAP: Adam in Shampoo's eigenbasis.

Legend: G the gradient, L_i the running mean of G_(i)G_(i)ᵀ, Q_i its slowly followed eigenbasis, G' = G rotated into it,
v the running mean of G'², t the gradients a parameter has received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.operators import MappedDiagonal
from curvature.protocols import Estimator, Needs, Observation, State
from curvature.registry import estimators
from curvature.rotated_diagonal import RotatedDiagonalOperator
from curvature.running_mean import bias_correction, check_beta
from curvature.shampoo import add_factors_, decompose_all_, newly_seen, running_weight
from curvature.shared_work import divided
from curvature.tensor_blocks import Block, along, blocks_of, identity_storage, storage_size, views


@dataclass(frozen=True)
class SOAP(Estimator):
    """B = Q diag(√v̂ + ε) Qᵀ, Q = Q_1 ⊗ … ⊗ Q_k: the root of the gradient's second moment in Shampoo's basis.

    Between two refreshes of the basis the second moment goes on at every step, which is why SOAP bears longer intervals
    than Shampoo. A refresh is one power iteration and a QR decomposition; its columns are first sorted by the
    eigenvalue they stand for, and the second moment is sorted with them. As in the paper a gradient enters the basis
    after the step it belongs to; so there is none for a parameter's first gradient, where B is Adam's diagonal. The
    second gradient finds the eigenbasis of the first, and the second moment starts in it.

    (A gradient in its own eigenbasis is diagonal: what stands beside the diagonal is rounding, and dividing by its root
    mean square would make steps of it.)

    Where gradients span fewer directions than a dimension has, the basis of the rest is free, and rounding chooses it:
    two runs that differ by rounding may part. What any choice keeps: Q is orthogonal, and the sum of the second moment
    is the running mean of ‖G‖².

    Args:
        beta: β₂, decay of the second moment, in [0, 1).
        factor_beta: decay of the factors, in [0, 1); ``None`` is ``beta``.
        eps: ε > 0, added to √v̂.
        interval: steps between refreshes of the basis, >= 1.
        every_step_until: up to this step, >= 0, the basis is refreshed at every step: the first ones come from few
            gradients, and turn fast. 0 is the paper's.
        max_dim: longer dimensions are not rotated, >= 1; ``None`` rotates every one.
        rotate_vectors: whether parameters of order 1 are rotated too; without it theirs is Adam's diagonal.

    >>> soap = SOAP()
    >>> G = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> state = soap.init([G])
    >>> for _ in range(2):
    ...     soap.update(state, Observation(gradient=[G]))
    ...     soap.operator(state).diagonal()[0].round(decimals=2)
    tensor([[2., 1.],
            [1., 2.]])
    tensor([[1., 1.],
            [1., 1.]])

    Cost: O(P Σ n_i) a step, QR decompositions O(Σ n_i³) every ``interval`` steps; P + 2 Σ n_i² of state.
    Reference: Vyas et al. 2024, arXiv 2409.11321, algorithms 3 and 4.
    """

    beta: float = 0.95
    factor_beta: float | None = None
    eps: float = 1e-8
    interval: int = 10
    max_dim: int | None = 10_000
    rotate_vectors: bool = False
    every_step_until: int = 0

    semidefinite = True

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.factor_beta is not None:
            check_beta(self.factor_beta, "factor_beta")
        if not self.eps > 0:
            raise ValueError(f"eps must be > 0, got {self.eps}")
        if self.interval < 1:
            raise ValueError(f"interval must be >= 1, got {self.interval}")
        if self.max_dim is not None and self.max_dim < 1:
            raise ValueError(f"max_dim must be >= 1 or None, got {self.max_dim}")
        if self.every_step_until < 0:
            raise ValueError(f"every_step_until must be >= 0, got {self.every_step_until}")

    @property
    def needs(self) -> Needs:
        """Gradients."""
        return Needs.GRAD

    def blocks(self, p: Tensor) -> list[Block]:
        """One block a parameter."""
        return blocks_of(p.shape, None, self.max_dim, smallest_order=1 if self.rotate_vectors else 2)

    def init(self, params: Sequence[Tensor]) -> State:
        """v = 0, factors 0; the step count is the host's."""
        sizes = [storage_size(self.blocks(p)) for p in params]
        return {
            "second_moment": vectors.zeros_like(params),
            "factors": [_flat(p, size) for p, size in zip(params, sizes, strict=True)],
            "bases": [identity_storage(p, self.blocks(p)) for p in params],
            "count": [vectors.scalar_like([p]) for p in params],
            "step": 0,
            "decomposed": 0,
        }

    def update(self, state: State, seen: Observation) -> None:
        """The refresh that the last step made due; then G' into v; then G into the factors (algorithm 3)."""
        step = cast(int, state["step"])
        state["step"] = step + 1
        moments, factors, bases, count = (
            cast("list[Tensor]", state[key]) for key in ("second_moment", "factors", "bases", "count")
        )
        live = [i for i, g in enumerate(seen.gradient) if g is not None]
        if self._due(step):
            refresh_(moments, factors, bases, [self.blocks(v) for v in moments])
        for i in live:
            count[i].add_(1.0)
        second = newly_seen(state, count, live, times=2)
        decompose_all_(
            [factors[i] for i in second],
            [bases[i] for i in second],
            None,
            [self.blocks(moments[i]) for i in second],
        )
        for i in second:
            moments[i].zero_()
        self._take_in(state, seen)

    def ordinary(self, state: State) -> bool:
        """Whether the coming update refreshes no basis."""
        seen_all = cast(int, state["decomposed"]) >= len(cast("list[Tensor]", state["count"]))
        return seen_all and not self._due(cast(int, state["step"]))

    def advance(self, state: State, steps: int = 1) -> None:
        """Count steps that :meth:`absorb` took; fewer than 0 takes back what was counted too much."""
        state["step"] = cast(int, state["step"]) + steps

    def absorb(self, state: State, seen: Observation) -> None:
        """An ordinary update, without a number of the host."""
        for t, g in zip(cast("list[Tensor]", state["count"]), seen.gradient, strict=True):
            if g is not None:
                t.add_(1.0)
        self._take_in(state, seen)

    def _due(self, step: int) -> bool:
        return step > 1 and (step <= self.every_step_until or (step - 1) % self.interval == 0)

    def _take_in(self, state: State, seen: Observation) -> None:
        """G' into v, then G into the factors."""
        moments, factors, bases, count = (
            cast("list[Tensor]", state[key]) for key in ("second_moment", "factors", "bases", "count")
        )
        factor_beta = self.beta if self.factor_beta is None else self.factor_beta
        for i, g in enumerate(seen.gradient):
            if g is None:
                continue
            G = g.to(moments[i].dtype)
            blocks = self.blocks(G)
            for basis, block in zip(views(bases[i], blocks), blocks, strict=True):
                rotated = along(G[block.index], basis, transpose=True)
                moments[i][block.index].mul_(self.beta).addcmul_(rotated, rotated, value=1.0 - self.beta)
            add_factors_(factors[i], G, blocks, running_weight(count[i], factor_beta), factor_beta)

    def operator(self, state: State) -> RotatedDiagonalOperator:
        """Q diag(√v̂ + ε) Qᵀ."""
        moments, bases, count = (
            cast("list[Tensor]", state[key]) for key in ("second_moment", "bases", "count")
        )
        blocks = [self.blocks(v) for v in moments]
        # the moment of the first gradient was dropped with its basis; a count of 0 is taken as 1
        corrections = [bias_correction(t - 1.0, self.beta) for t in count]

        def root(v: Tensor, i: int, out: Tensor) -> Tensor:
            return torch.div(v, corrections[i], out=out).sqrt_().add_(self.eps)

        return RotatedDiagonalOperator(
            MappedDiagonal(moments, root, least=self.eps),
            [views(q, own) for q, own in zip(bases, blocks, strict=True)],
            blocks,
        )


def refresh_(
    second_moments: Sequence[Tensor],
    factors: Sequence[Tensor],
    bases: Sequence[Tensor],
    blocks: Sequence[Sequence[Block]],
) -> None:
    """Q ← qr(L Q P), P sorting the columns by qᵀLq, and v sorted along (algorithm 4), in place.

    Divided among the ranks that hold the same state. A parameter that had no gradient yet has L = 0 and is left alone
    without asking the host: qr(0) is an orthogonal matrix, and its first gradient replaces it.
    """
    places = [
        (v[block.index], i, L, Q)
        for v, flat_L, flat_Q, own in zip(second_moments, factors, bases, blocks, strict=True)
        for Ls, Qs, block in zip(views(flat_L, own), views(flat_Q, own), own, strict=True)
        for (i, L), Q in zip(Ls.items(), Qs.values(), strict=True)
    ]

    def compute(indices: Sequence[int]) -> list[list[Tensor]]:
        return [list(power_iteration(places[k][2], places[k][3])) for k in indices]

    def like(k: int) -> list[Tensor]:
        Q = places[k][3]
        return [torch.empty_like(Q[0], dtype=torch.int64), torch.empty_like(Q)]

    found = divided([float(L.shape[0]) ** 3 for _, _, L, _ in places], compute, like)
    for (v, i, _, Q), (order, orthogonal) in zip(places, found, strict=True):
        v.copy_(v.index_select(i, order))
        Q.copy_(orthogonal)


def power_iteration(L: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """(the order of Q's columns by qᵀLq, qr(L Q) of the columns in that order)."""
    product = L @ Q
    order = torch.argsort((Q * product).sum(dim=0), descending=True)
    return order, torch.linalg.qr(product.index_select(1, order))[0]


def _flat(p: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=vectors.compute_dtype(p.dtype), device=p.device)


estimators.add("soap", SOAP)
