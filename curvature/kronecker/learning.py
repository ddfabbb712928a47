"""Running means of factors, and eigenbases refreshed in turns: pure functions on the state of an estimator.

Legend: A, G the running means of a block's factors, held at its root parameter; Q and λ their eigenvectors and
eigenvalues, refreshed in turns: every block once in ``inverse_interval`` steps, more often while steps are few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from curvature.kronecker.eigen import Decomposition, eigh_many
from curvature.kronecker.layout import Block, Layout
from curvature.kronecker.nearest import nearest_product
from curvature.protocols import State
from curvature.running_mean import running_mean_

KEYS = ("A", "G", "A_vectors", "A_values", "G_vectors", "G_values", "diagonal")
#: The factors of the uses with exchanged sides, in a model that has some.
TRANSPOSED_KEYS = ("A_transposed", "G_transposed")


def held(state: State, key: str) -> list[Tensor]:
    """The list of one entry of the state."""
    return cast("list[Tensor]", state[key])


def take_(
    state: State, layout: Layout, observed: Mapping[str, Sequence[Tensor]], live: set[int], beta: float
) -> set[int]:
    """Take A = Σ w a aᵀ / Σ w, G and the diagonal into their running means.

    Args:
        state: changed in place.
        layout: the blocks.
        observed: the statistics of a step.
        live: parameters that got a gradient; the others' state stays.
        beta: the decay.

    Returns:
        the roots of the blocks that were observed for the first time.
    """
    count = held(state, "count")
    seen_before = [c > 0 for c in torch.stack([c.to(count[0].device) for c in count]).tolist()]
    new = set()
    for block in layout.blocks:
        i = block.root
        if not live.intersection(block.members):
            continue
        if not seen_before[i]:
            new.add(i)
        means, values = [held(state, "A")[i]], [normalised(observed, i)]
        if observed["G"][i].numel():
            means.append(held(state, "G")[i])
            values.append(observed["G"][i])
        if block.transposed is not None:
            means.append(held(state, "A_transposed")[i])
            values.append(normalised(observed, i, "_transposed"))
            if observed["G_transposed"][i].numel():
                means.append(held(state, "G_transposed")[i])
                values.append(observed["G_transposed"][i])
        running_mean_(means, values, [count[i].clone() for _ in means], beta)
        count[i].add_(1.0)
    rest = [i for i in layout.diagonal if i in live]
    diagonal = held(state, "diagonal")
    running_mean_(
        [diagonal[i] for i in rest], [observed["diagonal"][i] for i in rest], [count[i] for i in rest], beta
    )
    return new


def normalised(observed: Mapping[str, object], i: int, kind: str = "") -> Tensor:
    """A = Σ w a aᵀ / Σ w of the block with root ``i``."""
    A, mass = (cast("Sequence[Tensor]", observed[key + kind])[i] for key in ("A", "mass"))
    safe = torch.where(mass > 0, mass, torch.ones_like(mass))
    return A / safe.reshape(-1, *[1] * (A.dim() - 1))


def turns(costs: Sequence[float], slots: int) -> list[int]:
    """Whose turn it is in which of some slots: as many members a slot as another, and about as much work.

    The dearest first, each to the slot with the least work that still has room.

    >>> turns([8.0, 1.0, 1.0, 1.0], 2)
    [0, 1, 1, 0]
    """
    room = [-(-len(costs) // slots)] * slots
    load = [0.0] * slots
    turn = [0] * len(costs)
    for j in sorted(range(len(costs)), key=lambda j: -costs[j]):
        slot = min((s for s in range(slots) if room[s]), key=load.__getitem__)
        turn[j] = slot
        room[slot] -= 1
        load[slot] += costs[j]
    return turn


def due_blocks(layout: Layout, step: int, interval: int, new: set[int]) -> list[Block]:
    """The blocks to refresh in this step: those seen for the first time, and those whose turn it is.

    A block's first basis must be there when it is first used, so the step that sees all blocks for the first time alone
    decomposes all of them. After it, no step refreshes more than ⌈blocks / interval⌉.
    """
    blocks = layout.blocks
    if not blocks:
        return []
    share = -(-len(blocks) // interval)
    slots = -(-len(blocks) // share)
    slot = slot_of(step, slots, interval)
    costs = [float(b.dims.groups * (b.size_in**3 * (not b.diagonal_input) + b.dims.d_out**3)) for b in blocks]
    return [
        block
        for block, turn in zip(blocks, turns(costs, slots), strict=True)
        if block.root in new or turn == slot
    ]


def slot_of(step: int, slots: int, interval: int) -> int | None:
    """The slot whose turn it is in this step, or ``None``: every slot once a round, evenly spread over the round.

    While steps are few, one batch more changes all factors, so the first rounds are as short as there are slots. From
    then on a round is half as long as the run before it, up to ``interval``: a basis is never much older than half of
    the run so far.

    >>> [slot_of(step, 2, 6) for step in range(16)]
    [None, 0, 1, 0, 1, 0, 1, 0, 1, None, 0, None, 1, None, None, 0]
    """
    start, length = 1, slots
    while start + length <= step and length < interval:
        start += length
        length = min(max(slots, start // 2), interval)
    start += max(step - start, 0) // length * length  # rounds of the full length, without going over them
    if step < start:
        return None
    # slot k's place in the round is ⌊k · length / slots⌋
    slot = -(-(step - start) * slots // length)
    return slot if slot < slots and slot * length // slots == step - start else None


def refresh_(state: State, blocks: Sequence[Block], decompose: Decomposition = eigh_many) -> None:
    """New eigenbases for ``blocks``: new tensors, since an operator may still hold the old ones.

    Args:
        state: changed in place.
        blocks: those to refresh.
        decompose: the matrices, given the bases that they had.
    """
    work: list[tuple[str, int, Tensor]] = []
    for block in blocks:
        i = block.root
        A, G = factors_of(state, block, held(state, "G_vectors"))
        if block.diagonal_input:
            held(state, "A_values")[i] = A.clone()
        else:
            work.append(("A", i, A))
        if G is not None:
            work.append(("G", i, G))
        else:  # G = I
            held(state, "G_values")[i] = torch.ones_like(held(state, "G_values")[i])
    before = [held(state, f"{key}_vectors")[i] for key, i, _ in work]
    found = decompose([matrix for _, _, matrix in work], before)
    for (key, i, _), (values, basis) in zip(work, found, strict=True):
        held(state, f"{key}_values")[i] = alone(values)
        held(state, f"{key}_vectors")[i] = alone(basis)


def alone(x: Tensor) -> Tensor:
    """Contiguous, in memory of its own: equal sizes are decomposed in one tensor, which each would keep and save."""
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def factors_of(state: State, block: Block, like: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(A, G) of a block as they are now, with ``None`` for a G that is the identity.

    Args:
        state: of the estimator.
        block: which; one with exchanged sides has the product nearest to the sum of both uses.
        like: tensors shaped as the Gs of blocks with exchanged sides are.
    """
    A, G = held(state, "A")[block.root], held(state, "G")[block.root]
    if block.transposed is None:
        return A, G if G.numel() else None
    G, A = nearest_product(
        (G if G.numel() else eye_like(like[block.root]), A),
        exchanged(held(state, "A_transposed")[block.root], held(state, "G_transposed")[block.root], A),
    )
    return A, G


def exchanged(A: Tensor, G: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """An embedding's factors with the sides of the head: frequencies of rows left, gradients right."""
    return torch.diag_embed(A), G if G.numel() else eye_like(like)


def eye_like(x: Tensor) -> Tensor:
    """The identity, (groups, n, n) like ``x``."""
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)


def basis_of(state: State, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """(Q_G, Q_A), ``None`` for the identity."""
    Q_G, Q_A = held(state, "G_vectors")[block.root], held(state, "A_vectors")[block.root]
    return (Q_G if Q_G.numel() else None), (Q_A if Q_A.numel() else None)
