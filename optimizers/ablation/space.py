"""The written search space: which learning rates, and which other numbers, are tried for what.

Frozen on purpose: a space that is widened for one method after its results were seen is no fair comparison. The
one exception is a rule that holds for every cell alike: where the best trial has the least or the largest value of
all, that range is extended by a decade there and a few more trials are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optimizers.ablation.cell import Cell
from optimizers.ablation.errors import AblationError

DECADE = 10.0


@dataclass(frozen=True)
class Dimension:
    """A number that is searched log-uniformly between two bounds."""

    name: str
    low: float
    high: float


_FIRST_ORDER = (Dimension("lr", 1e-4, 1e-2),)
_NORMALISED = (Dimension("lr", 1e-3, 1e-1),)
_KRONECKER = (Dimension("initial_damping", 1e-3, 10.0), Dimension("radius", 1e-4, 1e-1))

# ``name`` or ``name:option=value``; the second is looked up first
SPACE: dict[str, tuple[Dimension, ...]] = {
    "torch-sgd": (Dimension("lr", 1e-2, 1.0),),
    "torch-adamw": _FIRST_ORDER,
    "torch-muon": _FIRST_ORDER,
    "adam": _FIRST_ORDER,
    "adamw": _FIRST_ORDER,
    "soaa": _FIRST_ORDER,
    "tadam": _FIRST_ORDER,
    "empirical-fisher-diagonal+rms-box": _FIRST_ORDER,
    "empirical-fisher-diagonal+soaa": _FIRST_ORDER,
    "adahessian": (Dimension("lr", 1e-2, 1.0),),
    "sophia-h": _FIRST_ORDER,
    "sophia-g": _FIRST_ORDER,
    # adaptive damping sets the length of the step: its rate stays 1
    "kfac": _KRONECKER,
    "ekfac": _KRONECKER,
    "kfac:damping=fixed": (Dimension("lr", 1e-2, 1.0), *_KRONECKER),
    "ekfac:damping=fixed": (Dimension("lr", 1e-2, 1.0), *_KRONECKER),
    "shampoo": _NORMALISED,
    "soap": (Dimension("lr", 3e-4, 3e-2),),
    "muon": _NORMALISED,
    "lars": (Dimension("lr", 1e-2, 1.0),),
    "lamb": _NORMALISED,
}
UNWRITTEN = (Dimension("lr", 1e-4, 1.0),)
# The replayed control takes the rate of what it replays; the others judge a trial and set their own step: nothing is
# searched, they have one run a seed.
UNSEARCHED = (
    "trust-region-newton",
    "hessian-free",
    "lsr1-trust-region",
    "lbfgs-trust-region",
    "arc",
    "cat",
    "natural-gradient",
    "adamw-replay",
)


def space(cell: Cell) -> tuple[Dimension, ...]:
    """Return what is searched for a cell: what is written for its name, less the options that it fixes.

    >>> [dimension.name for dimension in space(Cell.parse("torch-adamw:lr=0.1"))]
    []
    """
    if cell.name in UNSEARCHED or cell.replay:
        return ()
    fixed = {name for name, _ in cell.options}
    return tuple(dimension for dimension in _written(cell) if dimension.name not in fixed)


def _written(cell: Cell) -> tuple[Dimension, ...]:
    for name, value in cell.options:
        if (special := f"{cell.name}:{name}={value}") in SPACE:
            return SPACE[special]
    return SPACE.get(cell.name, UNWRITTEN)


def is_written(cell: Cell) -> bool:
    """Return whether a space is written for what a cell names, rather than the one for all else."""
    return _written(cell) is not UNWRITTEN


def written(cells: Sequence[Cell]) -> dict[str, object]:
    """Return what is searched for each of some cells, and by what rule, as JSON values for a file."""
    return {
        "fingerprint": fingerprint(),
        "sampler": "quasi-random (scrambled Sobol sequence), log-uniform, the same points for equal ranges",
        "extension": "a decade beyond the edge, for every number whose best value is the least or largest tried",
        "cells": {
            cell.label: {d.name: {"low": d.low, "high": d.high} for d in space(cell)} for cell in cells
        },
    }


def fingerprint() -> str:
    """Return a hash of the whole written space, which every report names."""
    written = {name: [(d.name, d.low, d.high) for d in dimensions] for name, dimensions in SPACE.items()}
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()[:12]


def typical_learning_rates(cell: Cell) -> tuple[float | None, ...]:
    """Return the learning rates that are tried where none were asked for.

    Args:
        cell: the cell; one with the option ``lr`` keeps it.

    Returns:
        Four values, a factor of about 3 apart, from below the middle to the end of the written range; None (the
        optimizer's own default) for what has no range, such as a method that judges a trial.

    >>> typical_learning_rates(Cell("torch-adamw"))
    (0.0003, 0.001, 0.003, 0.01)
    """
    rates = [dimension for dimension in space(cell) if dimension.name == "lr"]
    if not rates or _written(cell) is UNWRITTEN:
        return (None,)
    middle = float(f"{(rates[0].low * rates[0].high) ** 0.5:.3g}")
    return (float(f"{0.3 * middle:.3g}"), middle, float(f"{3 * middle:.3g}"), rates[0].high)


def quasi_random(dimensions: Sequence[Dimension], count: int, seed: int) -> list[dict[str, float]]:
    """Return `count` points of a scrambled Sobol sequence, drawn by Optuna's quasi-Monte-Carlo sampler.

    Args:
        dimensions: what is searched; none gives one empty point.
        count: how many points.
        seed: of the scrambling; the same seed and count give the same points.

    Returns:
        One dictionary a point, with values rounded to 4 digits.
    """
    import warnings

    import optuna

    if not dimensions:
        return [{}]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
    study = optuna.create_study(sampler=sampler)
    asked: dict[str, optuna.distributions.BaseDistribution] = {
        d.name: optuna.distributions.FloatDistribution(d.low, d.high, log=True) for d in dimensions
    }
    points = []
    for number in range(count + 1):
        trial = study.ask(asked)
        study.tell(trial, 0.0)
        if number > 0:  # the first is not quasi-random: the sampler learns the space from it
            points.append({name: float(f"{value:.4g}") for name, value in trial.params.items()})
    return points


def extended(
    dimensions: Sequence[Dimension], tried: Sequence[Mapping[str, float]], best: int
) -> tuple[Dimension, ...]:
    """Return the space to search next where the best value of a number is the least or the largest of all tried.

    Args:
        dimensions: what was searched first.
        tried: every point so far.
        best: which of them is the best.

    Returns:
        The same dimensions, with each that is best at an edge in the decade beyond it; empty where every best is
        inside.

    >>> tried = [{"lr": 0.001}, {"lr": 0.003}, {"lr": 0.008}]
    >>> extended([Dimension("lr", 1e-4, 1e-2)], tried, 2)
    (Dimension(name='lr', low=0.008, high=0.1),)
    >>> extended([Dimension("lr", 1e-4, 1e-2)], tried, 1)
    ()
    """
    found = []
    for dimension in dimensions:
        values = [point[dimension.name] for point in tried]
        chosen = values[best]
        if chosen == max(values):
            found.append(Dimension(dimension.name, chosen, max(dimension.high, chosen) * DECADE))
        elif chosen == min(values):
            found.append(Dimension(dimension.name, min(dimension.low, chosen) / DECADE, chosen))
        else:
            found.append(dimension)
    return () if tuple(found) == tuple(dimensions) else tuple(found)


def extension_trials(trials: int) -> int:
    """Return how many trials an extension makes: a quarter of the first ones, two at least.

    >>> extension_trials(12), extension_trials(3)
    (3, 2)
    """
    return max(2, trials // 4)


def check_budget(trials: int, extensions: int) -> None:
    """Raise AblationError where a tuning budget is not possible."""
    if trials < 0 or trials in (1, 2):
        raise AblationError(f"tune must be 0 (no tuning) or >= 3 trials a cell, got {trials}")
    if extensions < 0:
        raise AblationError(f"extensions must be >= 0, got {extensions}")
