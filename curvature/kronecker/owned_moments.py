"""EK-FAC's moments where ranks keep eigenbases divided among them: bases go from rank to rank, one block at a time.

Legend: S = Σ_n (Q_Gᵀ ∇_n Q_A)² over the samples of all ranks. A rank knows its own samples' inputs and gradients, and
the owner of a block alone its basis. So a measurement keeps what the layers saw and got (:class:`Held`); at its end the
owner of every block lends Q_G and Q_A to all, each rank forms its samples' sum, and the owner keeps the mean of these.
At no time does a rank hold more than one basis that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import Tensor

from curvature.kronecker import owned
from curvature.kronecker.layout import Block, Layout
from curvature.kronecker.learning import held
from curvature.kronecker.moments import Held
from curvature.protocols import State, Statistics
from curvature.shared_work import team


def measured(
    state: State,
    layout: Layout,
    blocks: Sequence[Block],
    seen: Held,
    once_more: Callable[[], Statistics] | None = None,
) -> dict[int, Tensor]:
    """S of this process's own among ``blocks``, in their present bases, as the mean over ranks; every rank must ask.

    Args:
        state: of the estimator.
        layout: all blocks.
        blocks: that have bases.
        seen: what this rank's samples left, which loses what belongs to these blocks.
        once_more: where any rank could not hold it all: the statistics of a second look with all bases at hand.

    Raises:
        RuntimeError: where another rank could not form its part; its own error says why.

    Cost: a message of the bases' size and one of the weight's a block.
    """
    ranks, bases = team(), owned.bases_of(state, layout)
    device = held(state, "A_values")[blocks[0].root].device
    full = seen.full if ranks is None else ranks.any(seen.full, device)
    terms = seen.without([b.root for b in blocks])
    whole = cast("list[Tensor]", once_more()["moments"]) if full and once_more is not None else None
    found: dict[int, Tensor] = {}
    failure: Exception | None = None
    for block in blocks:
        if whole is not None:
            S = whole[block.root]
        else:
            S = held(state, "A_values")[block.root].new_zeros(owned.shapes(state, block, owned.MEASURED)[-1])
            basis = owned.lent(state, layout, block)
            try:
                for term in terms.get(block.root, ()):
                    term.add_to_(S, *basis)
            except Exception as error:  # the others wait for this rank: they must hear of it
                failure = error
        if ranks is not None:
            ranks.sum_(S).div_(ranks.size)
        if bases.owns(block):
            found[block.root] = S
    if failure is not None if ranks is None else ranks.any(failure is not None, device):
        raise failure or RuntimeError("another rank could not form its moments; its own error says why")
    return found


def add_(into: dict[int, Tensor], found: Mapping[int, Tensor]) -> None:
    """Add a micro-batch's moments to those of the earlier ones."""
    for root, S in found.items():
        into[root] = into[root].add_(S) if root in into else S
