"""Learning-rate schedules, as a factor on the learning rate at each step."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine")


def factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """Return the learning rate of a step as a fraction of the largest.

    Args:
        schedule: ``"constant"`` or ``"cosine"`` (to zero at the end), each after the warm-up.
        step: from 0 to steps - 1.
        steps: length of the run.
        warmup: fraction of the run in which the rate rises linearly.

    Returns:
        A number in (0, 1].

    >>> [round(factor("cosine", step, 4, 0.25), 2) for step in range(4)]
    [1.0, 1.0, 0.75, 0.25]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
