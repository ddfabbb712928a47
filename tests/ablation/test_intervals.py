from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from optimizers.ablation.intervals import Interval, paired_bootstrap

SAMPLE = [0.3, -0.2, 0.9, 0.4, 1.1, 0.1, 0.25, 0.8]


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_plain_interval_is_scipys_percentile_bootstrap(statistic: str) -> None:
    function = {"mean": np.mean, "median": np.median}[statistic]
    ours = paired_bootstrap(SAMPLE, statistic, expanded=False, resamples=100_000, seed=1)  # type: ignore[arg-type]
    theirs = scipy.stats.bootstrap(
        (SAMPLE,),
        function,
        method="percentile",
        n_resamples=100_000,
        rng=np.random.default_rng(2),
        vectorized=True,
    ).confidence_interval
    assert ours.estimate == pytest.approx(function(SAMPLE))
    # Monte Carlo error of a percentile over 100,000 resamples: below 0.01 for these numbers
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_interval_of_differences_is_scipys_paired_bootstrap_of_both_cells() -> None:
    cell, reference = np.array(SAMPLE) + 0.2, np.array([0.1, 0.3, 0.2, 0.7, 0.4, 0.1, 0.9, 0.2])
    ours = paired_bootstrap(list(cell - reference), expanded=False, resamples=100_000, seed=1)
    theirs = scipy.stats.bootstrap(
        (cell, reference), lambda a, b, axis: np.mean(a, axis) - np.mean(b, axis), paired=True, vectorized=True,
        method="percentile", n_resamples=20_000, rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    # standard error of the percentile over 20,000 resamples: about 0.004 for these numbers, 100,000 half that
    assert ours.low == pytest.approx(theirs.low, abs=0.015)
    assert ours.high == pytest.approx(theirs.high, abs=0.015)


def test_up_to_six_seeds_every_resample_is_gone_through() -> None:
    sample = SAMPLE[:4]
    means = sorted(np.mean(rows) for rows in itertools.product(sample, repeat=4))
    ours = paired_bootstrap(sample, expanded=False, confidence=0.9)
    assert ours.low == pytest.approx(np.quantile(means, 0.05, method="lower"))
    assert ours.high == pytest.approx(np.quantile(means, 0.95, method="higher"))
    assert paired_bootstrap(sample, seed=1) == paired_bootstrap(sample, seed=2)


def test_expanded_interval_covers_where_the_plain_one_does_not() -> None:
    """Coverage of the mean of 5 normal numbers, 400 samples, seed 0: plain about 0.83, expanded about 0.92."""
    samples = np.random.default_rng(0).normal(size=(400, 5))
    covered = {
        expanded: np.mean([
            found.low <= 0 <= found.high for found in (paired_bootstrap(list(s), expanded=expanded) for s in samples)
        ])
        for expanded in (True, False)
    }  # fmt: skip
    # standard errors: 0.013 and 0.019
    assert 0.89 < covered[True] < 0.98
    assert covered[False] < 0.87


def test_expanded_percentiles_are_those_of_hesterberg() -> None:
    # his equation: α'/2 = Φ(-√(n/(n-1)) t_{α/2,n-1}); n = 10 gives 0.0086 in his table 5
    from optimizers.ablation.intervals import _tail

    assert _tail(0.95, 10) == pytest.approx(0.0086, abs=5e-5)
    assert _tail(0.95, 10**6) == pytest.approx(0.025, rel=1e-4)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_shift_and_scale_carry_over(statistic: str) -> None:
    base = paired_bootstrap(SAMPLE, statistic)  # type: ignore[arg-type]
    moved = paired_bootstrap([2 * value + 3 for value in SAMPLE], statistic)  # type: ignore[arg-type]
    for name in ("estimate", "low", "high"):
        assert getattr(moved, name) == pytest.approx(2 * getattr(base, name) + 3)


def test_misses_are_infinite_and_never_better() -> None:
    one = paired_bootstrap([0.5, 0.5, 0.5, 0.5, math.inf], "median")
    assert one.estimate == 0.5
    assert one.high == math.inf
    assert one.verdict(1.0) == "not separated"
    assert paired_bootstrap([math.inf] * 5, "median").verdict(1.0) == "worse"
    assert paired_bootstrap([0.5, math.nan], "mean").estimate == math.inf
    assert paired_bootstrap([math.inf, -math.inf, 0.0], "mean").verdict(0.0) == "not separated"


def test_one_seed_separates_nothing() -> None:
    assert paired_bootstrap([-5.0]).verdict(0.0) == "not separated"
    assert Interval(0.1, 0.1, 0.1, 1).verdict(1.0) == "not separated"


def test_direction_of_a_verdict() -> None:
    assert Interval(0.5, 0.4, 0.6, 5).verdict(1.0) == "better"
    assert Interval(0.5, 0.4, 0.6, 5).verdict(1.0, lower_is_better=False) == "worse"
    assert Interval(1.5, 1.4, 1.6, 5).verdict(1.0) == "worse"
    assert Interval(1.0, 0.9, 1.6, 5).verdict(1.0) == "not separated"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_fewer_than_five_seeds_separate_nothing(count: int) -> None:
    """All of n equal cells' differences have one sign with probability 2^(1-n): that is no evidence at 3."""
    found = paired_bootstrap([-1.0 - 0.01 * i for i in range(count)])
    assert found.high < 0
    assert found.verdict(0.0) == "not separated"
    assert paired_bootstrap([-1.0 - 0.01 * i for i in range(5)]).verdict(0.0) == "better"


def test_false_wins_are_rare_where_there_is_no_difference() -> None:
    """Two-sided, 5 seeds, 400 pairs of equal cells, seed 3: about 8% (standard error 1.4%), not 17%."""
    pairs = np.random.default_rng(3).normal(size=(400, 5))
    called = np.mean([paired_bootstrap(list(p)).verdict(0.0) != "not separated" for p in pairs])
    assert called < 0.11


@pytest.mark.parametrize("arguments", [{"pairs": []}, {"pairs": [1.0, 2.0], "confidence": 1.0}])
def test_what_has_no_interval_is_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"pairs must|confidence must"):
        paired_bootstrap(**arguments)
