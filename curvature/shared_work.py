"""Work that several processes could all do, divided among them: each does a part, and tells the others.

Where every process holds the same factors (data-parallel training), decomposing all of them on all of them is waste.
Inside :func:`divided_among` the work of :func:`divided` is spread by cost; elsewhere it is done here. This package
knows nothing of ``torch.distributed``: a :class:`Team` is what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Team(Protocol):
    """The processes that hold the same state."""

    @property
    def rank(self) -> int:
        """This process's place."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def broadcast_(self, x: Tensor, source: int) -> None:
        """Overwrite ``x`` by that of process ``source``."""
        ...

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any process: the same answer on all."""
        ...

    def sum_(self, x: Tensor) -> Tensor:
        """Σ over the processes, in place."""
        ...


_team: Team | None = None


def team() -> Team | None:
    """The processes among which work is divided at this moment, or ``None``."""
    return _team


@contextmanager
def divided_among(processes: Team | None) -> Iterator[None]:
    """Inside, :func:`divided` spreads its work over ``processes``; with ``None`` it does all of it here."""
    global _team
    before, _team = _team, processes
    try:
        yield
    finally:
        _team = before


def owners(costs: Sequence[float], size: int, before: Sequence[float] = ()) -> list[int]:
    """Who does which piece: the dearest first, each to whom has least to do; the same answer on every process.

    Args:
        costs: of every piece, in any unit.
        size: of the team.
        before: what everyone has to do already; nothing where it is empty.

    >>> owners([1.0, 8.0, 5.0, 3.0], 2)
    [0, 0, 1, 1]
    """
    load = list(before) or [0.0] * size
    owner = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = min(range(size), key=load.__getitem__)
        load[owner[i]] += costs[i]
    return owner


def divided(
    costs: Sequence[float],
    compute: Callable[[Sequence[int]], list[list[Tensor]]],
    like: Callable[[int], list[Tensor]],
    owner: Sequence[int] | None = None,
) -> list[list[Tensor]]:
    """The results of every piece of work, of which this process does its part.

    Args:
        costs: of every piece, in any unit.
        compute: does the pieces with these indices, and returns each one's tensors.
        like: tensors of the shapes and dtypes that a piece will return, whose values do not matter.
        owner: who does which piece; ``None`` deals them by cost.

    Raises:
        RuntimeError: where another process failed at its part; its own error says why.
    """
    processes = _team
    if processes is None or processes.size == 1 or not costs:
        return compute(range(len(costs)))
    owner = owners(costs, processes.size) if owner is None else owner
    mine = [i for i, who in enumerate(owner) if who == processes.rank]
    results = {i: like(i) for i in range(len(costs)) if i not in mine}
    failure: Exception | None = None
    with divided_among(None):
        try:
            results.update(zip(mine, compute(mine) if mine else [], strict=True))
        except Exception as error:  # the others wait for this process: they must hear of it
            failure = error
    device = like(0)[0].device
    if processes.any(failure is not None, device):
        if failure is not None:
            raise failure
        raise RuntimeError("another rank failed at its part of the shared work; its own error says why")
    exchange_(
        processes, [[results[i] for i in range(len(costs)) if owner[i] == r] for r in range(processes.size)]
    )
    return [results[i] for i in range(len(costs))]


def exchange_(processes: Team, by_owner: Sequence[Sequence[Sequence[Tensor]]]) -> None:
    """Overwrite every process's tensors by their owner's, joined to one message a dtype and device.

    Args:
        processes: the team.
        by_owner: for every process the pieces that it did, of the same shapes everywhere.
    """
    for source, pieces in enumerate(by_owner):
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for x in (x for piece in pieces for x in piece if x.numel()):
            kinds.setdefault((x.dtype, x.device), []).append(x)
        for members in kinds.values():
            joined = torch.cat([x.reshape(-1) for x in members])
            processes.broadcast_(joined, source)
            if source == processes.rank:
                continue
            for x, piece in zip(members, joined.split([x.numel() for x in members]), strict=True):
                x.copy_(piece.view_as(x))
