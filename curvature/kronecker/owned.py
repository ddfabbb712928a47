"""Eigenbases that each rank keeps for its own blocks alone, and an operator that asks their owners.

Legend: a block's *owner* is the rank that decomposes its factors and keeps Q_A and Q_G, and EK-FAC's S; every rank
keeps A and G (which are averaged) and the eigenvalues (which are small). B V = Q_G (Λ ∘ Q_Gᵀ V Q_A) Q_Aᵀ is computed by
the owner of the block and sent to the others: a message of the gradient's size for every product and every solve, in
place of bases that every rank keeps (the MEM-OPT strategy of Pauloski et al. 2021, KAISA, arXiv 2107.01739).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from curvature.kronecker import learning
from curvature.kronecker.eigen import Decomposition, eigh_here
from curvature.kronecker.layout import Block, Layout
from curvature.kronecker.learning import held
from curvature.kronecker.operator import Eigenblock, KroneckerOperator, gather, scatter
from curvature.operators import Operator
from curvature.protocols import CACHE, State
from curvature.shared_work import Team, divided, owners, team


@dataclass
class Bases:
    """What this process keeps beside the state.

    Args:
        place: (rank, size) of the team that the blocks were dealt to.
        owner: of every block of the layout, by its root.
        known: the roots of the blocks whose bases exist, here or elsewhere.
        sizes: of their inputs.
        vectors: (Q_A, Q_G) of this process's own blocks; a tensor without elements is the identity.
        moments: S of this process's own blocks, in these bases; ``None`` where none is measured (K-FAC).
    """

    place: tuple[int, int]
    owner: dict[int, int]
    known: set[int] = field(default_factory=set)
    sizes: dict[int, int] = field(default_factory=dict)
    vectors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    moments: dict[int, Tensor] | None = None

    def owns(self, block: Block) -> bool:
        """Whether the block is this process's."""
        return self.owner[block.root] == self.place[0]

    def tensors(self) -> list[Tensor]:
        """What takes memory."""
        return [x for pair in self.vectors.values() for x in pair] + list((self.moments or {}).values())

    def forget(self, block: Block) -> None:
        """Drop what belonged to a block of another size."""
        self.sizes[block.root] = block.size_in
        self.known.discard(block.root)
        for kept in (self.vectors, self.moments or {}):
            kept.pop(block.root, None)

    def kept(self, block: Block) -> list[Tensor]:
        """What this process keeps of a block of its own: Q_A and Q_G, and S where it is measured."""
        return [*self.vectors[block.root], *([] if self.moments is None else [self.moments[block.root]])]

    def pair(self, block: Block) -> tuple[Tensor | None, Tensor | None]:
        """(Q_G, Q_A) of a block of its own, ``None`` for the identity."""
        Q_A, Q_G = self.vectors[block.root]
        return (Q_G if Q_G.numel() else None), (Q_A if Q_A.numel() else None)


def cost_of(block: Block) -> float:
    """Of a block's eigendecompositions, up to a factor."""
    return float(block.dims.groups * (block.size_in**3 * (not block.diagonal_input) + block.dims.d_out**3))


def bases_of(state: State, layout: Layout) -> Bases:
    """The bases of this process; none yet where the state was loaded, or the team has another size than before.

    Raises:
        RuntimeError: where moments would be lost with the bases that they were measured in.
    """
    processes = team()
    place = (0, 1) if processes is None else (processes.rank, processes.size)
    bases = cast("Bases | None", state.get(CACHE))
    if bases is not None and bases.place != place:
        if processes is None:  # looked at outside of a step: what was divided stays so
            return bases
        if bases.known and bases.moments is not None:
            raise RuntimeError(
                f"the moments are divided among {bases.place[1]} ranks, and this step is taken by {place[1]}: load "
                "what gathered_state_dict() gave before the group of ranks changed"
            )
        bases = None
    if bases is None:
        bases = Bases(place, {})
        state[CACHE] = bases
    for b in layout.blocks:  # a bias that a group brought later makes its block larger: it starts again
        if bases.sizes.setdefault(b.root, b.size_in) != b.size_in:
            bases.forget(b)
    new = [b for b in layout.blocks if b.root not in bases.owner]
    if new:
        load = [0.0] * bases.place[1]
        for b in layout.blocks:
            if b.root in bases.owner:
                load[bases.owner[b.root]] += cost_of(b)
        dealt = owners([cost_of(b) for b in new], bases.place[1], load)
        bases.owner.update((b.root, who) for b, who in zip(new, dealt, strict=True))
    return bases


def refresh_(
    state: State, layout: Layout, due: Sequence[Block], decompose: Decomposition = eigh_here
) -> None:
    """New eigenbases for the blocks that are due, and for those that have none though they were observed.

    Each is decomposed by its owner, which keeps the vectors and tells everyone the values.

    Args:
        state: changed in place.
        layout: all blocks.
        due: those to refresh in any case.
        decompose: the matrices of one process, given the bases that they had.
    """
    bases = bases_of(state, layout)
    blocks = list(due)
    lacking = [b for b in layout.blocks if b.root not in bases.known and b not in blocks]
    if lacking:
        count = held(state, "count")
        blocks += [b for b in lacking if float(count[b.root]) > 0]
    if not blocks:
        return

    def compute(indices: Sequence[int]) -> list[list[Tensor]]:
        mine = [blocks[i] for i in indices]
        empty = [a.new_empty(0) for a in held(state, "A_values")]
        own: State = {**state, "A_vectors": list(empty), "G_vectors": list(empty)}
        for b in mine:  # the identity of a G that is not kept is shaped like its vectors
            Q_A, Q_G = bases.vectors.get(b.root, (empty[b.root], empty[b.root]))
            g = held(state, "G_values")[b.root]
            held(own, "A_vectors")[b.root] = Q_A
            held(own, "G_vectors")[b.root] = (
                Q_G if Q_G.numel() else g.new_zeros(()).expand(*g.shape, g.shape[-1])
            )
        learning.refresh_(own, mine, decompose)
        for b in mine:
            Q_A, Q_G = held(own, "A_vectors")[b.root], held(own, "G_vectors")[b.root]
            kept = held(state, "G")[b.root].numel() > 0 or b.transposed is not None
            bases.vectors[b.root] = (Q_A, Q_G if kept else Q_G.new_empty(0))
        return [values_of(state, b) for b in mine]

    found = divided(
        [cost_of(b) for b in blocks],
        compute,
        lambda i: [torch.empty_like(x) for x in values_of(state, blocks[i])],
        [bases.owner[b.root] for b in blocks],
    )
    for b, (values_a, values_g) in zip(blocks, found, strict=True):
        held(state, "A_values")[b.root] = values_a
        held(state, "G_values")[b.root] = values_g
    bases.known.update(b.root for b in blocks)


def values_of(state: State, block: Block) -> list[Tensor]:
    """λ_A and λ_G."""
    return [held(state, "A_values")[block.root], held(state, "G_values")[block.root]]


VECTORS = ("A_vectors", "G_vectors")
"""What a gathered state holds beside the state: as KFAC(inverses="everywhere") keeps it, so that either loads it."""

MEASURED = (*VECTORS, "moments")
"""The same of EK-FAC."""


def gathered(state: State, layout: Layout, keys: Sequence[str] = VECTORS) -> dict[str, list[Tensor]]:
    """All bases, from their owners; every rank must ask. Without elements where there are none.

    Args:
        state: of this process.
        layout: all blocks.
        keys: :data:`VECTORS` or :data:`MEASURED`.

    Returns:
        one tensor a parameter for every key.
    """
    bases = bases_of(state, layout)
    known = [b for b in layout.blocks if b.root in bases.known]
    found = divided(
        [1.0] * len(known),
        lambda indices: [bases.kept(known[i]) for i in indices],
        lambda i: [values_of(state, known[i])[0].new_empty(s) for s in shapes(state, known[i], keys)],
        [bases.owner[b.root] for b in known],
    )
    out = {key: [values.new_empty(0) for values in held(state, "A_values")] for key in keys}
    for block in layout.blocks:  # zeros before a first basis, as they are kept everywhere
        for key, shape in zip(keys, shapes(state, block, keys), strict=True):
            out[key][block.root] = held(state, "A_values")[block.root].new_zeros(shape)
    for block, kept in zip(known, found, strict=True):
        for key, x in zip(keys, kept, strict=True):
            out[key][block.root] = x
    return out


def lent(state: State, layout: Layout, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """(Q_G, Q_A) of one block, from its owner; every rank must ask, and lets it go when it has used it."""
    bases = bases_of(state, layout)
    ((Q_A, Q_G),) = divided(
        [1.0],
        lambda indices: [list(bases.vectors[block.root]) for _ in indices],
        lambda _: [values_of(state, block)[0].new_empty(s) for s in shapes(state, block, VECTORS)],
        [bases.owner[block.root]],
    )
    return (Q_G if Q_G.numel() else None), (Q_A if Q_A.numel() else None)


def shapes(state: State, block: Block, keys: Sequence[str]) -> list[tuple[int, ...]]:
    """Of Q_A and Q_G, where (0,) is the identity, and of S where it is among the keys."""
    values_a, values_g = values_of(state, block)
    kept = held(state, "G")[block.root].numel() > 0 or block.transposed is not None
    whole = [(*values.shape, values.shape[-1]) for values in (values_a, values_g)]
    found = [(0,) if block.diagonal_input else whole[0], whole[1] if kept else (0,)]
    return [*found, (*values_g.shape, values_a.shape[-1])][: len(keys)]


def check_gathered(
    state: State, layout: Layout, given: dict[str, list[Tensor]] | None, keys: Sequence[str], refusal: str
) -> None:
    """Refuse a loaded state whose bases are missing, where the run would go on otherwise, or are of other shapes.

    Args:
        state: as it would be loaded.
        layout: all blocks.
        given: what was saved of ``keys``, or ``None``.
        keys: :data:`VECTORS` or :data:`MEASURED`.
        refusal: what cannot go on without them; empty where it can.

    Raises:
        ValueError: naming the remedy.
    """
    observed = any(float(held(state, "count")[b.root]) > 0 for b in layout.blocks)
    if given is None:
        if observed and refusal:
            raise ValueError(
                f"{refusal} cannot go on from a state_dict without its eigenbases: save "
                "optimizer.gathered_state_dict(), called on every rank, in place of state_dict()"
            )
        return
    for block in layout.blocks:
        for key, shape in zip(keys, shapes(state, block, keys), strict=True):
            found = tuple(given[key][block.root].shape)
            if found != shape:
                raise ValueError(
                    f"loaded {key!r} of {block.modules[0]!r} must have shape {shape}, got {found}"
                )


def take_gathered(state: State, layout: Layout, given: dict[str, list[Tensor]]) -> None:
    """Keep this process's own of the loaded bases, and moments where there are some."""
    state.pop(CACHE, None)
    bases = bases_of(state, layout)
    measured = MEASURED[-1] in given
    bases.moments = {} if measured else None
    for block in layout.blocks:
        if not float(held(state, "count")[block.root]) > 0:
            continue
        bases.known.add(block.root)
        if bases.owns(block):
            like = held(state, "A_values")[block.root]
            Q_A, Q_G, *S = (given[key][block.root].to(like.device, like.dtype, copy=True) for key in given)
            bases.vectors[block.root] = (Q_A, Q_G)
            if bases.moments is not None:
                bases.moments[block.root] = S[0]


def eigenblock(state: State, bases: Bases, block: Block) -> Eigenblock:
    """A block with its basis if it is this process's, else with its eigenvalues alone."""
    values_a, values_g = values_of(state, block)
    Q_A, Q_G = bases.vectors.get(block.root, (values_a.new_empty(0), values_a.new_empty(0)))
    product = values_g.unsqueeze(-1) * values_a.unsqueeze(
        -2
    )  # what is not this process's own only needs its shape
    S = None if bases.moments is None else bases.moments.get(block.root)
    return Eigenblock(
        block,
        product if S is None else S.clone(),
        Q_G if Q_G.numel() else None,
        Q_A if Q_A.numel() else None,
        values_g,
        values_a,
    )


class OwnedKroneckerOperator(KroneckerOperator):
    """A :class:`KroneckerOperator` whose blocks are multiplied by their owners; all ranks must call it alike.

    Args:
        like: tensors shaped like the parameters.
        layout: the blocks.
        blocks: their eigenvalues, and the bases of this process's own.
        diagonal: the diagonal at the parameters without a block.
        factored: whether ``solve`` damps each factor.
        bases: who owns which block.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        layout: Layout,
        blocks: Sequence[Eigenblock],
        diagonal: Sequence[Tensor],
        factored: bool,
        bases: Bases,
    ) -> None:
        super().__init__(like, layout, blocks, diagonal, factored)
        self._bases = bases

    def diagonal(self) -> list[Tensor]:
        """The diagonal of B, by the owners of its blocks."""
        out = list(self.like)
        self._by_owners(out, lambda block: block.diagonal())
        if self._rest is not None:
            self._put(out, self._rest.diagonal())
        return out

    def to_dense(self) -> Tensor:
        """B as a (P, P) matrix, by P products."""
        return Operator.to_dense(self)

    def _apply(
        self, v: Sequence[Tensor], out: list[Tensor], multiplier: Callable[[Eigenblock], Tensor]
    ) -> None:
        shared = self.blocks if self._bases.moments is None else []
        factors = {b.block.root: multiplier(b) for b in shared}  # raises on all ranks or on none

        def product(block: Eigenblock) -> Tensor:
            root = block.block.root
            factor = factors[root] if root in factors else multiplier(block)
            return block.from_basis(factor * block.to_basis(gather(block.block, v).to(factor.dtype)))

        self._by_owners(out, product)

    def _by_owners(self, out: list[Tensor], compute: Callable[[Eigenblock], Tensor]) -> None:
        processes: Team | None = team()
        place = (0, 1) if processes is None else (processes.rank, processes.size)
        if place != self._bases.place:
            raise RuntimeError(
                f"the eigenbases are divided among {self._bases.place[1]} ranks, and this product is taken by "
                f'{place[1]}: take it inside a step, or keep them everywhere (inverses="everywhere")'
            )
        found = divided(
            [1.0] * len(self.blocks),
            lambda indices: [[compute(self.blocks[i]).contiguous()] for i in indices],
            lambda i: [torch.empty_like(self.blocks[i].values)],
            [self._bases.owner[block.block.root] for block in self.blocks],
        )
        for block, (V,) in zip(self.blocks, found, strict=True):
            scatter(block.block, V, self.like, out)
