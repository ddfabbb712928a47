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
from curvature.protocols import State
from curvature.running_mean import running_mean_

Decomposition = Callable[[Sequence[Tensor]], "list[tuple[Tensor, Tensor]]"]

KEYS = ("A", "G", "A_vectors", "A_values", "G_vectors", "G_values", "diagonal")


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
        running_mean_(means, values, [count[i].clone() for _ in means], beta)
        count[i].add_(1.0)
    rest = [i for i in layout.diagonal if i in live]
    diagonal = held(state, "diagonal")
    running_mean_(
        [diagonal[i] for i in rest], [observed["diagonal"][i] for i in rest], [count[i] for i in rest], beta
    )
    return new


def normalised(observed: Mapping[str, object], i: int) -> Tensor:
    """A = Σ w a aᵀ / Σ w of the block with root ``i``."""
    A, mass = (cast("Sequence[Tensor]", observed[key])[i] for key in ("A", "mass"))
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
    """The blocks to refresh in this step: those seen for the first time, and those whose turn it is."""
    return [
        block
        for block, turn in zip(layout.blocks, turns(layout, interval), strict=True)
        if block.root in new or (step > 0 and (step - turn) % interval == 0)
    ]


def refresh_(state: State, blocks: Sequence[Block], decompose: Decomposition = eigh_many) -> None:
    """New eigenbases for ``blocks``: new tensors, since an operator may still hold the old ones.

    Args:
        state: changed in place.
        blocks: those to refresh.
        decompose: the eigendecompositions of many matrices.
    """
    work: list[tuple[str, int]] = []
    for block in blocks:
        i = block.root
        if block.diagonal_input:
            held(state, "A_values")[i] = held(state, "A")[i].clone()
        else:
            work.append(("A", i))
        if held(state, "G")[i].numel():
            work.append(("G", i))
        else:  # G = I
            held(state, "G_values")[i] = torch.ones_like(held(state, "G_values")[i])
    for (key, i), (values, basis) in zip(
        work, decompose([held(state, key)[i] for key, i in work]), strict=True
    ):
        held(state, f"{key}_values")[i] = values.contiguous()
        held(state, f"{key}_vectors")[i] = basis.contiguous()


def basis_of(state: State, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """(Q_G, Q_A), ``None`` for the identity."""
    Q_G, Q_A = held(state, "G_vectors")[block.root], held(state, "A_vectors")[block.root]
    return (Q_G if Q_G.numel() else None), (Q_A if Q_A.numel() else None)
