"""What is measured of a run or of a search: pure functions of records and numbers.

A miss, a failure and a divergence count as infinite everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from optimizers.ablation.results import Record, number, reached

Measure = Literal["train_loss", "validation_loss"]
TOLERANCE = 0.05


def final_loss(record: Record, measure: str) -> float:
    """Return the last value of a run's curve; infinite for a run that failed, diverged to it or stopped early."""
    return number((record["curve"].get(measure) or [None])[-1])


def loss_at(record: Record, measure: str, budget: float, axis: str = "seconds") -> float:
    """Return the loss that a run had reached when a budget was spent.

    Args:
        record: of the run.
        measure: which curve.
        budget: in the unit of `axis`.
        axis: ``"seconds"`` or ``"step"``.

    Returns:
        The last point of the curve at or before the budget; a run that ended sooner keeps its last.

    >>> record = {"curve": {"seconds": [0.0, 2.0, 4.0], "train_loss": [3.0, 2.0, 1.0]}}
    >>> loss_at(record, "train_loss", 3.0), loss_at(record, "train_loss", 9.0)
    (2.0, 1.0)
    """
    found = math.inf
    for position, value in zip(record["curve"].get(axis, []), record["curve"].get(measure, []), strict=True):
        if position <= budget:
            found = number(value)
    return found


def steps_to(record: Record, measure: str, goal: float) -> float:
    """Return the steps after which a run's curve first is at or below a goal."""
    return reached(record, measure, goal)


def seconds_to(record: Record, measure: str, goal: float) -> float:
    """Return the training time, evaluation excluded, after which a run's curve first is at or below a goal."""
    return reached(record, measure, goal, "seconds")


def processor_seconds_to(record: Record, measure: str, goal: float) -> float:
    """Return the processor time of training after which a run's curve first is at or below a goal.

    NaN where none was recorded: runs from before it was, and those that failed.
    """
    if "cpu_seconds" not in record["curve"]:
        return math.nan
    return reached(record, measure, goal, "cpu_seconds")


def gradients_to(record: Record, measure: str, goal: float) -> float:
    """Return what reaching a goal cost in gradients (one forward and backward pass each); see `cost`."""
    curve = record["curve"].get(measure, [])
    return next(
        (spent for spent, value in zip(spends(record), curve, strict=False) if number(value) <= goal),
        math.inf,
    )


def spends(record: Record) -> list[float]:
    """Return what a run had cost in gradients at every point of its curve; nothing where that was not counted."""
    curve, each = record["curve"], number(record["result"].get("gradients_per_step"))
    if "gradients" in curve:
        return list(curve["gradients"])
    # runs from before it was kept step by step, and all whose steps cost alike
    return [step * each for step in curve.get("step", [])] if math.isfinite(each) else []


def divergence_rate(diverged: Iterable[bool]) -> float:
    """Return the fraction of runs that diverged; NaN for none.

    >>> divergence_rate([True, False, False, False])
    0.25
    """
    found = [bool(value) for value in diverged]
    return sum(found) / len(found) if found else math.nan


def rate_width(losses: Mapping[float, float], tolerance: float = TOLERANCE) -> float:
    """Return how wide the range of learning rates is that do nearly as well as the best: the measure of stability.

    Args:
        losses: final loss by learning rate; not finite where the run diverged.
        tolerance: a rate does nearly as well where its loss exceeds the least by at most this fraction of it.

    Returns:
        Decades between the least and the largest rate of the unbroken run of such rates around the best: a lower bound
        that gets tight as rates are tried more densely. 0 where only the best does; NaN where every rate diverged.

    >>> round(rate_width({0.001: 1.04, 0.01: 1.0, 0.1: 1.02, 1.0: 2.0}), 3)
    2.0
    """
    rates = sorted(losses)
    values = [losses[rate] if math.isfinite(losses[rate]) else math.inf for rate in rates]
    least = min(values, default=math.inf)
    if not math.isfinite(least):
        return math.nan
    first = last = values.index(least)
    limit = least + tolerance * abs(least)
    while first > 0 and values[first - 1] <= limit:
        first -= 1
    while last < len(rates) - 1 and values[last + 1] <= limit:
        last += 1
    return math.log10(rates[last] / rates[first])


def lower_envelope(points: Sequence[tuple[float, float]], bins: int = 0) -> dict[float, float]:
    """Return for each learning rate the least loss found at it, or with `bins` in its part of the logarithmic range.

    Args:
        points: (learning rate, loss) of trials in which other numbers changed too.
        bins: how many equal parts of the logarithmic range; 0 keeps every rate.

    Returns:
        Loss by learning rate, the rate being the one at which it was found.
    """
    if not bins or len(points) < 2:
        return {rate: min(loss for r, loss in points if r == rate) for rate, _ in points}
    low, high = (math.log(f(rate for rate, _ in points)) for f in (min, max))
    width = (high - low) / bins or 1.0
    best: dict[int, tuple[float, float]] = {}
    for rate, loss in points:
        place = min(bins - 1, int((math.log(rate) - low) / width))
        if place not in best or loss < best[place][1]:
            best[place] = (rate, loss)
    return dict(sorted(best.values()))
