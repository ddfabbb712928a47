"""Shampoo: one factor a dimension of the gradient, and a root of each.

Legend: G the gradient of a parameter of order k, G_(i) its unfolding, L_i = E[G_(i) G_(i)ᵀ] = U_i diag(λ_i) U_iᵀ the
factor of dimension i, e the exponent, t the gradients a parameter has received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.kronecker.eigen import eigh_many
from curvature.protocols import CurvatureEstimator, Estimator, Needs, Observation, State
from curvature.registry import estimators
from curvature.rotated_diagonal import RotatedDiagonalOperator
from curvature.running_mean import bias_correction
from curvature.tensor_blocks import Block, blocks_of, gram, identity_storage, outer, storage_size, views

GRAFT = "graft_"


@dataclass(frozen=True)
class Shampoo(Estimator):
    """B = (L_1 + εI)^e ⊗ … ⊗ (L_k + εI)^e with e = 1/(2k): for a matrix L^¼ ⊗ R^¼, whose step is L^-¼ G R^-¼.

    A full-matrix Adagrad (or, with ``beta < 1``, Adam) metric at the cost of one small matrix a dimension. It needs
    gradients alone, whatever the layers are: choose it where K-FAC has no rule, or in loops that give only gradients.

    Args:
        beta: decay of the factors' running means, in [0, 1]; bias-corrected. 1 sums, as in the paper (Adagrad).
        eps: ε > 0, added to every factor's eigenvalues. Eigenvalues below the factor's own rounding error
            (its size times its largest eigenvalue times the unit roundoff) are raised to that first.
        exponent: e > 0 of each factor; ``None`` is 1/(2k), k the number of factors.
        interval: steps between eigendecompositions, >= 1; the factors themselves take every gradient.
        block_size: longer dimensions are cut, and every block has factors of its own, >= 1; ``None`` cuts nothing.
        grafting: an estimator whose step length is taken over: every parameter's B is scaled so that B⁻¹G has the
            length of this one's. ``RootDiagonal(EmpiricalFisherDiagonal())`` gives Adam's.

    >>> shampoo = Shampoo(eps=1e-12)
    >>> G = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> state = shampoo.init([G])
    >>> shampoo.update(state, Observation(gradient=[G]))
    >>> [step.round(decimals=4) for step in shampoo.operator(state).solve([G])]  # L^-¼ G R^-¼: all singular values 1
    [tensor([[1., 0.],
            [0., 1.]])]

    Cost: O(P Σ n_i) a step, eigendecompositions O(Σ n_i³) every ``interval`` steps; 2 Σ n_i² of state a block.
    References: Gupta, Koren & Singer 2018, arXiv 1802.09568, algorithms 1 and 2; Anil et al. 2020, arXiv 2002.09018
    (blocks, grafting).
    """

    beta: float = 0.999
    eps: float = 1e-12
    exponent: float | None = None
    interval: int = 10
    block_size: int | None = 1024
    grafting: CurvatureEstimator | None = None

    semidefinite = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        if not self.eps > 0:
            raise ValueError(f"eps must be > 0, got {self.eps}")
        if self.exponent is not None and not self.exponent > 0:
            raise ValueError(f"exponent must be > 0 or None, got {self.exponent}")
        if self.interval < 1:
            raise ValueError(f"interval must be >= 1, got {self.interval}")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size must be >= 1 or None, got {self.block_size}")
        if self.grafting is not None and self.grafting.needs.graph:
            raise ValueError(f"grafting must need only gradients, got {type(self.grafting).__name__}")
        for name in ("tracks_steps", "evaluates_gradients"):
            if getattr(self.grafting, name, False):
                raise ValueError(
                    f"grafting must need only the gradients of the steps, got {type(self.grafting).__name__}: graft "
                    "a diagonal, such as RootDiagonal(EmpiricalFisherDiagonal())"
                )

    @property
    def needs(self) -> Needs:
        """Gradients."""
        return Needs.GRAD

    def blocks(self, p: Tensor) -> list[Block]:
        """The blocks of a parameter."""
        return blocks_of(p.shape, self.block_size, max_dim=None, smallest_order=1)

    def init(self, params: Sequence[Tensor]) -> State:
        """Factors 0, bases I; the step count and whether all parameters were seen are the host's."""
        state: State = {
            "factors": [_flat(p, storage_size(self.blocks(p))) for p in params],
            "bases": [identity_storage(p, self.blocks(p)) for p in params],
            "eigenvalues": [_flat(p, storage_size(self.blocks(p), vectors=True)) for p in params],
            "count": [vectors.scalar_like([p]) for p in params],
            "step": 0,
            "decomposed": 0,
            # a shape a parameter, without memory: a scalar that is expanded
            "shape": [
                p.detach().new_zeros((), dtype=vectors.compute_dtype(p.dtype)).expand(p.shape) for p in params
            ],
        }
        if self.grafting is not None:
            state["scale"] = [vectors.scalar_like([p], 1.0) for p in params]
            state.update({GRAFT + key: value for key, value in self.grafting.init(params).items()})
        return state

    def ordinary(self, state: State) -> bool:
        """Whether the coming update decomposes nothing."""
        seen_all = cast(int, state["decomposed"]) >= len(cast("list[Tensor]", state["count"]))
        return seen_all and cast(int, state["step"]) % self.interval != 0

    def advance(self, state: State, steps: int = 1) -> None:
        """Count steps that :meth:`absorb` took; fewer than 0 takes back what was counted too much."""
        state["step"] = cast(int, state["step"]) + steps

    def absorb(self, state: State, seen: Observation) -> None:
        """An ordinary update, without a number of the host."""
        self._take_in(state, seen)
        if self.grafting is not None:
            self._graft(state, seen, [i for i, g in enumerate(seen.gradient) if g is not None])

    def _take_in(self, state: State, seen: Observation) -> None:
        """L_i ← βL_i + (1-β) G_(i)G_(i)ᵀ."""
        factors, count = (cast("list[Tensor]", state[key]) for key in ("factors", "count"))
        for t, flat, g in zip(count, factors, seen.gradient, strict=True):
            if g is not None:
                t.add_(1.0)
                G = g.to(flat.dtype)
                add_factors_(flat, G, self.blocks(G), running_weight(t, self.beta), self.beta)

    def update(self, state: State, seen: Observation) -> None:
        """L_i ← βL_i + (1-β) G_(i)G_(i)ᵀ, then eigendecompositions where due, then the grafted length."""
        due = cast(int, state["step"]) % self.interval == 0
        state["step"] = cast(int, state["step"]) + 1
        factors, bases, eigenvalues, count = (
            cast("list[Tensor]", state[key]) for key in ("factors", "bases", "eigenvalues", "count")
        )
        live = [i for i, g in enumerate(seen.gradient) if g is not None]
        self._take_in(state, seen)
        turn = list(live) if due else newly_seen(state, count, live, times=1)
        if turn:
            decompose_all_(
                [factors[i] for i in turn],
                [bases[i] for i in turn],
                [eigenvalues[i] for i in turn],
                [self.blocks(cast(Tensor, seen.gradient[i])) for i in turn],
            )
        if self.grafting is not None:
            self._graft(state, seen, live)

    def _graft(self, state: State, seen: Observation, live: Sequence[int]) -> None:
        """c_i = ‖B_i⁻¹G_i‖ / ‖B'_i⁻¹G_i‖, B' the grafted estimator's."""
        grafting = cast(CurvatureEstimator, self.grafting)
        inner = {key.removeprefix(GRAFT): value for key, value in state.items() if key.startswith(GRAFT)}
        grafting.update(inner, seen)
        state.update({GRAFT + key: value for key, value in inner.items()})
        scale = cast("list[Tensor]", state["scale"])
        for c in scale:
            c.fill_(1.0)
        gradient = [
            torch.zeros_like(c) if g is None else g
            for g, c in zip(seen.gradient, cast("list[Tensor]", state["shape"]), strict=True)
        ]
        tiny = torch.finfo(scale[0].dtype).tiny
        own = self.operator(state).solve(gradient)
        other = grafting.operator(inner).solve(gradient, tiny)
        for i in live:
            lengths = [torch.linalg.vector_norm(x[i]).to(scale[i]) for x in (own, other)]
            both = (lengths[0] > 0) & (lengths[1] > 0)
            scale[i].copy_(torch.where(both, lengths[0] / lengths[1].clamp(min=tiny), 1.0))

    def operator(self, state: State) -> RotatedDiagonalOperator:
        """⊗ (L_i + εI)^e in the eigenbases of the last decomposition."""
        shapes, bases, eigenvalues = (
            cast("list[Tensor]", state[key]) for key in ("shape", "bases", "eigenvalues")
        )
        blocks = [self.blocks(x) for x in shapes]
        values = []
        for x, lam, own in zip(shapes, eigenvalues, blocks, strict=True):
            d = torch.ones_like(x, memory_format=torch.contiguous_format)
            for columns, block in zip(views(lam, own, vectors=True), own, strict=True):
                if block.factored:
                    e = 0.5 / len(block.factored) if self.exponent is None else self.exponent
                    roots = {i: (column + self.eps).pow(e) for i, column in columns.items()}
                    d[block.index] = outer(roots, block.shape, d)
            values.append(d)
        if self.grafting is not None:
            values = [d * c for d, c in zip(values, cast("list[Tensor]", state["scale"]), strict=True)]
        return RotatedDiagonalOperator(
            values, [views(q, own) for q, own in zip(bases, blocks, strict=True)], blocks
        )


def running_weight(count: Tensor, beta: float) -> Tensor:
    """The weight of the t-th observation in a bias-corrected running mean; with β = 1 in a sum, 1."""
    if beta == 1.0:
        return torch.ones_like(count)
    return torch.where(count <= 1.0, 1.0, (1.0 - beta) / bias_correction(count, beta))


def add_factors_(flat: Tensor, G: Tensor, blocks: Sequence[Block], weight: Tensor, beta: float) -> None:
    """L_i ← L_i + w (G_(i)G_(i)ᵀ - L_i) in place; with β = 1 the sum."""
    for factors, block in zip(views(flat, blocks), blocks, strict=True):
        for i, L in factors.items():
            if beta == 1.0:
                L.add_(gram(G[block.index], i))
            else:
                L.lerp_(gram(G[block.index], i), weight)


def decompose_(factors: Tensor, bases: Tensor, eigenvalues: Tensor | None, blocks: Sequence[Block]) -> None:
    """Eigenvalues and eigenvectors of every factor of one parameter, in descending order, in place."""
    decompose_all_([factors], [bases], None if eigenvalues is None else [eigenvalues], [blocks])


def decompose_all_(
    factors: Sequence[Tensor],
    bases: Sequence[Tensor],
    eigenvalues: Sequence[Tensor] | None,
    blocks: Sequence[Sequence[Block]],
) -> None:
    """:func:`decompose_` of many parameters at once, so that the work can be batched, and divided among ranks."""
    all_factors = _each(factors, blocks)
    found = eigh_many([L.unsqueeze(0) for L in all_factors]) if all_factors else []
    for Q, (_, U) in zip(_each(bases, blocks), found, strict=True):
        Q.copy_(U[0].flip(-1))
    if eigenvalues is None:
        return
    for column, (lam, _) in zip(_each(eigenvalues, blocks, vectors=True), found, strict=True):
        noise = lam.shape[-1] * torch.finfo(lam.dtype).eps * lam[0, -1]
        column.copy_(torch.maximum(lam[0], noise).flip(-1))


def _each(
    flats: Sequence[Tensor], blocks: Sequence[Sequence[Block]], *, vectors: bool = False
) -> list[Tensor]:
    """Views of all factors of several parameters, one after another."""
    return [
        x
        for flat, own in zip(flats, blocks, strict=True)
        for view in views(flat, own, vectors=vectors)
        for x in view.values()
    ]


def newly_seen(state: State, count: Sequence[Tensor], live: Sequence[int], times: int) -> list[int]:
    """The parameters that get their ``times``-th gradient now; the host is asked only until all have had it."""
    if cast(int, state["decomposed"]) >= len(count):
        return []
    counts = torch.stack([c.to(count[0].device) for c in count]).tolist()
    state["decomposed"] = sum(c >= times for c in counts)
    return [i for i in live if counts[i] == times]


def _flat(p: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=vectors.compute_dtype(p.dtype), device=p.device)


estimators.add("shampoo", Shampoo)
