"""K-FAC with factored damping: two formed inverses a layer in place of eigenbases.

Legend: A (groups, n, n), G (groups, d, d) the factors as they were when their layer was last refreshed,
V (groups, d, n) a vector as [weight, bias] matrices. With π² = (tr A / n) / (tr G / d) the damped block is
(A + π√λ I) ⊗ (G + √λ/π I), so its inverse is a product too, and (G + √λ/π I)⁻¹ V (A + π√λ I)⁻¹ are two products where
an eigenbasis takes four. A Cholesky factorisation inverts at n³ multiplications, far fewer than eigenvectors take.

The inverses belong to one λ. They are kept beside the state, which determines them: another λ, a refreshed layer and a
load form them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from curvature.kronecker.eigen import eigh_here
from curvature.kronecker.layout import Block, Layout
from curvature.kronecker.learning import factors_of, held
from curvature.kronecker.operator import KroneckerOperator, balance, gather, refuse_singular, scatter
from curvature.kronecker.rules import LayerRule
from curvature.operators import check_damping
from curvature.protocols import CACHE, State
from curvature.shared_work import divided, team

#: The factors that a layer's inverses are formed from, as they were at its last refresh.
KEYS = ("A_used", "G_used")


@dataclass(frozen=True)
class Factorblock:
    """A block by its factors.

    Args:
        block: its place in the model.
        A: (groups, n, n), or (groups, n) where it is diagonal.
        G: (groups, d, d), or ``None`` for the identity.
    """

    block: Block
    A: Tensor
    G: Tensor | None

    @property
    def values(self) -> Tensor:
        """A tensor of the block's dtype and device."""
        return self.A

    def product(self, V: Tensor) -> Tensor:
        """G V A."""
        V = V if self.G is None else self.G @ V
        return V * self.A.unsqueeze(-2) if self.block.diagonal_input else V @ self.A

    def diagonal(self) -> Tensor:
        """The diagonal of the block, as a (groups, d, n) matrix."""
        a = self.A if self.block.diagonal_input else self.A.diagonal(dim1=-2, dim2=-1)
        if self.G is None:
            return a.unsqueeze(-2).expand(-1, self.block.dims.d_out, -1).clone()
        return self.G.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * a.unsqueeze(-2)

    def dense(self) -> Tensor:
        """The block of every group, (groups, d n, d n), rows in C order."""
        groups, d_out, size_in = self.block.dims.groups, self.block.dims.d_out, self.block.size_in
        n = d_out * size_in
        eye = torch.eye(n, dtype=self.A.dtype, device=self.A.device).reshape(-1, 1, d_out, size_in)
        return self.product(eye.expand(-1, groups, -1, -1)).reshape(-1, groups, n).permute(1, 2, 0)


@dataclass
class Entry:
    """A block's inverses, and what they were formed from."""

    of: Factorblock
    damping: float
    A: Tensor
    G: Tensor

    def holds(self, block: Factorblock, damping: float) -> bool:
        """Whether they are those of these very factors and of this λ."""
        return self.of.A is block.A and self.of.G is block.G and self.damping == damping

    def apply(self, V: Tensor) -> Tensor:
        """(G + √λ/π I)⁻¹ V (A + π√λ I)⁻¹."""
        V = V * self.G if self.of.G is None else self.G @ V
        return V * self.A.unsqueeze(-2) if self.of.block.diagonal_input else V @ self.A

    def solve_into(self, out: list[Tensor], v: Sequence[Tensor], like: Sequence[Tensor]) -> None:
        """The block's part of a vector solved for; new tensors, or views of one, in the places of its members."""
        block, dtype = self.of.block, self.A.dtype
        if block.bias is None or block.weight is None or not is_matrix(block, v[block.weight]):
            scatter(block, self.apply(gather(block, v).to(dtype)), like, out)
            return
        # [W, b] A⁻¹ by parts: nothing is copied to be lengthened by a column, and W's part stands by itself.
        W, b, A, d = v[block.weight].to(dtype), v[block.bias].to(dtype), self.A[0], block.dims.d_in
        if self.of.G is None:
            W, b = W * self.G[0], b * self.G[0, 0]
        else:
            W, b = self.G[0] @ W, self.G[0] @ b
        out[block.weight] = (W @ A[:d, :d]).addr_(b, A[d, :d])
        out[block.bias] = torch.addmv(b * A[d, d], W, A[:d, d])


def is_matrix(block: Block, weight: Tensor) -> bool:
    """Whether the weight is its block's matrix as it stands."""
    plain = type(block.rule).to_matrix is LayerRule.to_matrix and block.dims.groups == 1
    return plain and not block.diagonal_input and weight.shape == (block.dims.d_out, block.dims.d_in)


@dataclass
class Inverses:
    """The inverses that this process keeps beside the state.

    Args:
        place: (rank, size) of the team that formed them: those formed for a single process's own use are not kept in a
            team's, since all ranks must find alike what is missing.
        entries: by a block's root.
        seen: the last λ that was read, with its tensor and that tensor's version: what has not changed is not read
            again, since on an accelerator a read waits.
        refreshed: roots of the blocks whose factors in use the last update replaced.
    """

    place: tuple[int, int]
    entries: dict[int, Entry] = field(default_factory=dict)
    seen: tuple[Tensor, int, float] | None = None
    refreshed: frozenset[int] = frozenset()

    def tensors(self) -> list[Tensor]:
        """What takes memory."""
        return [x for entry in self.entries.values() for x in (entry.A, entry.G)]

    def value_of(self, damping: float | Tensor) -> float:
        """λ as a number."""
        if not isinstance(damping, Tensor):
            return float(damping)
        if self.seen is None or self.seen[0] is not damping or self.seen[1] != damping._version:
            self.seen = (damping, damping._version, float(damping))
        return self.seen[2]


def place_now() -> tuple[int, int]:
    """(rank, size) of the team at work."""
    processes = team()
    return (0, 1) if processes is None else (processes.rank, processes.size)


def inverses_of(state: State) -> Inverses:
    """Those kept beside the state; none yet where it was loaded, or the team has another size than before."""
    kept, place = cast("Inverses | None", state.get(CACHE)), place_now()
    if kept is None or (kept.place != place and team() is not None):
        kept = Inverses(place)
        state[CACHE] = kept
    return kept


def refresh_(state: State, blocks: Sequence[Block]) -> None:
    """The running means become the factors in use: new tensors, since an operator may still hold the old ones."""
    inverses_of(state).refreshed = frozenset(block.root for block in blocks)
    for block in blocks:
        A, G = factors_of(state, block, held(state, "G_used"))
        held(state, "A_used")[block.root] = A.clone()
        if G is not None:
            held(state, "G_used")[block.root] = G.clone()


def factorblock(state: State, block: Block) -> Factorblock:
    """A block by the factors in use."""
    G = held(state, "G_used")[block.root]
    return Factorblock(block, held(state, "A_used")[block.root], G if G.numel() else None)


class FactoredKroneckerOperator(KroneckerOperator):
    """B by its factors; ``solve`` damps each factor and multiplies by formed inverses.

    Args:
        like: tensors shaped like the parameters.
        layout: the blocks.
        blocks: their factors.
        diagonal: the diagonal at the parameters without a block.
        inverses: those at hand; missing ones are added.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        layout: Layout,
        blocks: Sequence[Factorblock],
        diagonal: Sequence[Tensor],
        inverses: Inverses,
    ) -> None:
        super().__init__(like, layout, (), diagonal, factored=True)
        self.blocks = list(blocks)  # type: ignore[arg-type]
        self._inverses = inverses

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """G V A a block: O(Σ d_out size_in (d_out + size_in))."""
        self.check_vector(v)
        out = list(v)
        for block in cast("list[Factorblock]", self.blocks):
            V = gather(block.block, v).to(block.values.dtype)
            scatter(block.block, block.product(V), self.like, out)
        if self._rest is not None:
            self._put(out, self._rest.matvec([v[i] for i in self.layout.diagonal]))
        return out

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        """(A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹ v, by two products a block once the inverses are formed.

        Reference: Martens & Grosse 2015, arXiv 1503.05671, section 6.3.
        """
        self.check_vector(v)
        check_damping(damping)
        entries = self._entries(damping)
        out = self.solve_rest(v, damping)
        for block in self.factorblocks:
            entries[block.block.root].solve_into(out, v, self.like)
        return out

    @property
    def factorblocks(self) -> list[Factorblock]:
        """The blocks by their factors."""
        return cast("list[Factorblock]", self.blocks)

    def solve_rest(self, v: Sequence[Tensor], damping: float | Tensor) -> list[Tensor]:
        """``v`` with the parameters without a block solved for by the diagonal."""
        out = list(v)
        if self._rest is not None:
            self._put(out, self._rest.solve([v[i] for i in self.layout.diagonal], damping))
        return out

    def inverses(self, damping: float | Tensor) -> tuple[float, dict[int, Entry], frozenset[int]]:
        """λ as a number, the inverses for it by a block's root, and the roots that the last update refreshed."""
        entries = self._entries(damping)
        return self._inverses.value_of(damping), entries, self._inverses.refreshed

    def _entries(self, damping: float | Tensor) -> dict[int, Entry]:
        """The inverses for this λ; those that are missing are formed, each by one of the ranks."""
        kept, value = self._inverses, self._inverses.value_of(damping)
        blocks = cast("list[Factorblock]", self.blocks)
        found = {root: kept.entries[root] for root in (b.block.root for b in blocks) if root in kept.entries}
        missing = [b for b in blocks if b.block.root not in found or not found[b.block.root].holds(b, value)]
        if missing:
            formed = divided(
                [cost_of(b.block) for b in missing],
                lambda indices: [list(inverted(missing[i], value)) for i in indices],
                lambda i: [torch.empty_like(x) for x in shaped_like(missing[i])],
            )
            new = {b.block.root: Entry(b, value, A, G) for b, (A, G) in zip(missing, formed, strict=True)}
            found |= new
            if kept.place == place_now():
                kept.entries |= new
        return found


def cost_of(block: Block) -> float:
    """Of a block's inverses, up to a factor."""
    return float(block.dims.groups * (block.size_in**3 * (not block.diagonal_input) + block.dims.d_out**3))


def shaped_like(block: Factorblock) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes of a block's inverses."""
    return block.A, block.A.new_empty(block.A.shape[0], 1, 1) if block.G is None else block.G


def inverted(block: Factorblock, damping: float) -> tuple[Tensor, Tensor]:
    """((A + π√λ I)⁻¹, (G + √λ/π I)⁻¹); where A is diagonal the first is, and for G = I the second is a number a group.

    Raises:
        SingularCurvatureError: for λ = 0 and a singular factor.
        ValueError: for a factor with a NaN or an infinity.
    """
    mean_A = mean_of_diagonal(block.A, block.block.diagonal_input)
    mean_G = torch.ones_like(mean_A) if block.G is None else mean_of_diagonal(block.G, False)
    pi, root = balance(mean_A, mean_G), damping**0.5
    if block.block.diagonal_input:
        values = block.A + (root * pi).unsqueeze(-1)
        if not damping > 0:
            refuse_singular(block.block, values, damping)
        A = values.reciprocal()
    else:
        A = inverse(block, block.A, root * pi, damping)
    if block.G is None:
        return A, (1.0 + root / pi).reciprocal()[:, None, None]
    return A, inverse(block, block.G, root / pi, damping)


def mean_of_diagonal(factor: Tensor, diagonal: bool) -> Tensor:
    """tr / n of every group."""
    return (factor if diagonal else factor.diagonal(dim1=-2, dim2=-1)).mean(-1)


def inverse(block: Factorblock, factor: Tensor, shift: Tensor, damping: float) -> Tensor:
    """(factor + shift I)⁻¹ by Cholesky; by eigenvalues where rounding has made the sum indefinite, or λ = 0."""
    if damping > 0:
        damped = factor.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
        triangle, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            return torch.cholesky_inverse(triangle)
    values, vectors = eigh_here([factor])[0]
    values = values + shift.unsqueeze(-1)
    if not damping > 0:
        refuse_singular(block.block, values, damping)
    return (vectors / values.unsqueeze(-2)) @ vectors.mT
