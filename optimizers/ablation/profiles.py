"""Performance profiles: how often a method is within a factor of the best, over several problems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LARGEST_RATIO = 4.0


@dataclass(frozen=True)
class Profile:
    """How one method does over all problems.

    Args:
        ratios: its cost over the least cost of any method, one a problem; infinite for a miss.
        largest_ratio: r_max, where the profile ends.
    """

    ratios: tuple[float, ...]
    largest_ratio: float = LARGEST_RATIO

    def fraction(self, ratio: float) -> float:
        """Return ρ(τ): the fraction of problems that cost at most `ratio` times the least."""
        return sum(own <= ratio for own in self.ratios) / len(self.ratios)

    @property
    def score(self) -> float:
        """The mean of ρ(τ) over τ from 1 to r_max: 1 for a method that is best on every problem.

        >>> Profile((1.0, 2.5, math.inf)).score
        0.5
        """
        # the area under a sum of steps, each from its ratio to r_max
        area = sum(max(0.0, self.largest_ratio - ratio) for ratio in self.ratios)
        return area / ((self.largest_ratio - 1) * len(self.ratios))

    def steps(self) -> tuple[list[float], list[float]]:
        """Return the corners of the graph of ρ from 1 to r_max, to be drawn as steps."""
        inside = sorted({ratio for ratio in self.ratios if ratio < self.largest_ratio} | {1.0})
        places = [*inside, self.largest_ratio]
        return places, [self.fraction(place) for place in places]


def performance_profiles(
    costs: Mapping[str, Sequence[float]], largest_ratio: float = LARGEST_RATIO
) -> dict[str, Profile]:
    """Return the profile of every method.

    Args:
        costs: for every method its cost on each problem (> 0; in the same order), infinite for a miss. A problem that
            every method misses tells nothing and counts as missed by all.
        largest_ratio: r_max > 1: a method that needs more than this times the least counts as having missed.

    Returns:
        The profiles, by method.

    Raises:
        ValueError: where methods have different numbers of problems, a cost is not positive, or there is none.

    >>> {name: p.score for name, p in performance_profiles({"a": [1.0, 4.0], "b": [2.0, 2.0]}).items()}
    {'a': 0.8333333333333334, 'b': 0.8333333333333334}

    References: Dolan & Moré 2002; Dahl et al. 2023 (AlgoPerf), arXiv 2306.07179, section 4.
    """
    lengths = {len(row) for row in costs.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"costs must give every method the same problems, at least one, got {sorted(lengths)} of them"
        )
    if not largest_ratio > 1:
        raise ValueError(f"largest_ratio must be > 1, got {largest_ratio}")
    for name, row in costs.items():
        for cost in row:
            if not cost > 0:
                raise ValueError(f"costs must be > 0, got {cost} for {name}")
    least = [min(column) for column in zip(*costs.values(), strict=True)]
    return {
        name: Profile(
            tuple(c / low if math.isfinite(low) else math.inf for c, low in zip(row, least, strict=True)),
            largest_ratio,
        )
        for name, row in costs.items()
    }
