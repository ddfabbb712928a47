"""Paired bootstrap intervals, and the only way here in which a difference is called one.

Two cells see the same initial values and the same batches for one seed, so what is resampled are seeds: the paired
differences (or ratios) of a cell and its reference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# n seeds that all point one way do so by chance with probability 2^(1-n): 1/4 for 3 seeds, 1/16 for 5
FEWEST = 5
ENUMERATED = 6  # n^n resamples of up to so many seeds are all gone through: no random number is drawn
Verdict = Literal["better", "worse", "not separated"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Args:
        estimate: the statistic of the sample.
        low: lower end.
        high: upper end.
        count: how many seeds it rests on.
    """

    estimate: float
    low: float
    high: float
    count: int

    def verdict(self, null: float, *, lower_is_better: bool = True) -> Verdict:
        """Return whether the interval lies on one side of `null`; one that touches it separates nothing.

        Nor does one that rests on fewer than 5 seeds: no interval of so few covers 95% of the time.

        >>> Interval(0.5, 0.4, 0.9, 5).verdict(1.0)
        'better'
        >>> Interval(0.5, 0.4, 1.0, 5).verdict(1.0)
        'not separated'
        """
        if self.count >= FEWEST and self.high < null:
            return "better" if lower_is_better else "worse"
        if self.count >= FEWEST and self.low > null:
            return "worse" if lower_is_better else "better"
        return "not separated"


def paired_bootstrap(
    pairs: Sequence[float],
    statistic: Literal["mean", "median"] = "mean",
    *,
    confidence: float = 0.95,
    expanded: bool = True,
    resamples: int = 20_000,
    seed: int = 0,
) -> Interval:
    """Return a percentile bootstrap interval for the mean or the median of paired differences or ratios.

    Args:
        pairs: one number a seed, such as the loss of a cell minus that of its reference; infinite ones are kept, NaN
            counts as infinite.
        statistic: of the numbers.
        confidence: in (0, 1).
        expanded: correct the percentiles for few seeds, where the plain interval is too narrow (at 5 seeds of normal
            differences it covers 84% of the time, the corrected one 92%): by α' = 2 Φ(-√(n/(n-1)) t_{α/2,n-1}).
        resamples: how many, where there are more than 6 seeds; up to 6 every resample is gone through once.
        seed: of the resampling.

    Returns:
        The interval. One seed gives an infinite one, that separates nothing.

    Raises:
        ValueError: for no numbers, or a confidence out of range.

    >>> paired_bootstrap([-1.0, -2.0, -3.0, -2.0, -2.0]).verdict(0.0)
    'better'

    Cost: O(min(nⁿ, resamples) n).
    Reference: Efron & Tibshirani 1993; Hesterberg 2015, arXiv 1411.5279, section 5.3 (the expanded percentiles).
    """
    if not pairs:
        raise ValueError("pairs must hold at least one number, got none")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    values = np.nan_to_num(np.asarray(pairs, dtype=np.float64), nan=np.inf, posinf=np.inf, neginf=-np.inf)
    estimate = float(_statistic(values[None], statistic)[0])
    count = len(values)
    if count == 1:
        return Interval(estimate, -math.inf, math.inf, 1)
    tail = _tail(confidence, count) if expanded else (1 - confidence) / 2
    drawn = _statistic(values[_indices(count, resamples, seed)], statistic)
    # outwards to an observed value: infinities cannot be interpolated, and the interval may only get wider
    low = float(np.quantile(drawn, tail, method="lower"))
    high = float(np.quantile(drawn, 1 - tail, method="higher"))
    return Interval(estimate, low, high, count)


def _tail(confidence: float, count: int) -> float:
    from scipy.stats import norm, t

    quantile = t.ppf((1 - confidence) / 2, count - 1)
    return float(norm.cdf(math.sqrt(count / (count - 1)) * quantile))


def _indices(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    if count <= ENUMERATED:
        return np.array(list(itertools.product(range(count), repeat=count)), dtype=np.int64)
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def _statistic(rows: NDArray[np.float64], statistic: str) -> NDArray[np.float64]:
    if statistic == "mean":
        with np.errstate(invalid="ignore"):  # +inf and -inf together are NaN, which separates nothing
            return np.asarray(rows.mean(axis=1))
    if statistic != "median":
        raise ValueError(f"statistic must be 'mean' or 'median', got {statistic!r}")
    ordered = np.sort(rows, axis=1)
    middle = rows.shape[1] // 2
    if rows.shape[1] % 2:
        return np.asarray(ordered[:, middle])
    return np.asarray((ordered[:, middle - 1] + ordered[:, middle]) / 2)
