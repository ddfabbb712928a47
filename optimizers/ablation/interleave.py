"""Runs that take turns: between two evaluations of one run, every other run of its seed trains as long.

A machine that slows down for a while then slows every run down alike, and times may be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from optimizers.ablation.config import RunConfig
from optimizers.ablation.run import isolated, segments


class _Turns:
    """One run, advanced a segment at a time with the random state that it had."""

    def __init__(
        self, config: RunConfig, progress: Callable[[int], None], factors: list[float] | None
    ) -> None:
        self.config = config
        self.steps = segments(config, progress, factors)
        self.random: list[torch.Tensor] = []

    def advance(self) -> dict[str, Any] | None:
        """Train until the next evaluation; return the record after the last one."""
        device = torch.device(self.config.device)
        with isolated(self.config):
            if self.random:
                torch.set_rng_state(self.random[0])
                if device.type == "cuda":
                    torch.cuda.set_rng_state(self.random[1], device)
            try:
                next(self.steps)
            except StopIteration as end:
                record: dict[str, Any] = end.value
                return record
            self.random = [torch.get_rng_state()]
            if device.type == "cuda":
                self.random.append(torch.cuda.get_rng_state(device))
        return None


def train_in_turns(
    runs: Sequence[tuple[RunConfig, Callable[[int], None], list[float] | None]],
) -> Iterator[tuple[RunConfig, dict[str, Any]]]:
    """Train several runs in turns in this process.

    Args:
        runs: configuration, what is told how many steps are done, and the replayed factors of each; see `run.train`.

    Returns:
        Each run with its record, as soon as it has ended. But for the clock the numbers are those of `run.train`.
    """
    waiting = [_Turns(*run) for run in runs]
    forward = True
    while waiting:
        # A B B A: a drift within a round cancels too
        for turns in list(waiting if forward else waiting[::-1]):
            record = turns.advance()
            if record is not None:
                waiting.remove(turns)
                yield turns.config, {**record, "interleaved": True}
        forward = not forward
