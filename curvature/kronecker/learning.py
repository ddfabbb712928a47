"""Running means of factors, and eigenbases refreshed in turns: pure functions on the state of an estimator.

Legend: A, G the running means of a block's factors, held at its root parameter; Q and λ their eigenvectors and
eigenvalues, refreshed every ``inverse_interval`` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from curvature.kronecker.eigen import eigh_many
from curvature.kronecker.layout import Block, Layout
from curvature.kronecker.nearest import nearest_product
from curvature.protocols import State
from curvature.running_mean import running_mean_

Decomposition = Callable[[Sequence[Tensor]], "list[tuple[Tensor, Tensor]]"]

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


def turns(layout: Layout, interval: int) -> list[int]:
    """The step (modulo ``interval``) at which each block's eigenbasis is refreshed, balanced by cost.

    >>> turns(Layout((), (), (), ()), 3)
    []
    """
    load = [0.0] * interval
    turn = [0] * len(layout.blocks)
    costs = [b.dims.groups * (b.size_in**3 * (not b.diagonal_input) + b.dims.d_out**3) for b in layout.blocks]
    for j in sorted(range(len(costs)), key=lambda j: -costs[j]):
        turn[j] = min(range(interval), key=load.__getitem__)
        load[turn[j]] += costs[j]
    return turn


def due_blocks(layout: Layout, step: int, interval: int, new: set[int]) -> list[Block]:
    """The blocks to refresh in this step: those seen for the first time, all in an early step, then by turns."""
    early = is_early(step, interval)
    return [
        block
        for block, turn in zip(layout.blocks, turns(layout, interval), strict=True)
        if early or block.root in new or (step > 0 and (step - turn) % interval == 0)
    ]


def is_early(step: int, interval: int) -> bool:
    """Whether every basis is refreshed out of turn: while steps are few, one batch more changes all factors.

    The gaps grow by half, up to ``interval``: a basis is never much older than a third of the run so far.

    >>> [step for step in range(60) if is_early(step, 20)]
    [1, 2, 3, 4, 6, 9, 13, 19, 28]
    """
    early = 1
    while early < step and early // 2 < interval:
        early += max(1, early // 2)
    return early == step and early // 2 < interval


def refresh_(state: State, blocks: Sequence[Block], decompose: Decomposition = eigh_many) -> None:
    """New eigenbases for ``blocks``: new tensors, since an operator may still hold the old ones.

    Args:
        state: changed in place.
        blocks: those to refresh.
        decompose: the eigendecompositions of many matrices.
    """
    work: list[tuple[str, int, Tensor]] = []
    for block in blocks:
        i = block.root
        A, G = held(state, "A")[i], held(state, "G")[i]
        if block.transposed is not None:
            G, A = nearest_product(
                (G if G.numel() else eye_like(held(state, "G_vectors")[i]), A),
                exchanged(held(state, "A_transposed")[i], held(state, "G_transposed")[i], A),
            )
        if block.diagonal_input:
            held(state, "A_values")[i] = A.clone()
        else:
            work.append(("A", i, A))
        if G.numel():
            work.append(("G", i, G))
        else:  # G = I
            held(state, "G_values")[i] = torch.ones_like(held(state, "G_values")[i])
    found = decompose([matrix for _, _, matrix in work])
    for (key, i, _), (values, basis) in zip(work, found, strict=True):
        held(state, f"{key}_values")[i] = values.contiguous()
        held(state, f"{key}_vectors")[i] = basis.contiguous()


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
