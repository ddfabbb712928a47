from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizers.ablation import Cell, Row, measures, workload
from optimizers.ablation.comparison import compare, references, sensitivity, summarise
from optimizers.ablation.profiles import Profile, performance_profiles
from optimizers.ablation.protocol import Trial, Tuning
from optimizers.ablation.report_tables import comparison_table, summary_table
from optimizers.ablation.space import Dimension

STEPS = [0, 10, 20, 30, 40]


def _record(
    seed: int, losses: list[float | None], cost: float = 1.0, pace: float = 0.1, **result: Any
) -> dict[str, Any]:
    final = losses[-1]
    return {
        "key": f"{seed}", "status": "done", "config": {"seed": seed},
        "curve": {"step": STEPS, "seconds": [pace * s for s in STEPS], "train_loss": losses, "validation_loss": losses},
        "result": {
            "validation_loss": final, "train_loss": final, "validation_metric": 0.5, "test_metric": 0.4, "steps": 40,
            "seconds": pace * 40, "seconds_per_step": pace, "state_bytes": 8, "gradients_per_step": cost,
            "learning_rate": 0.1, "diverged": final is None, **result,
        },
    }  # fmt: skip


def _row(name: str, curves: list[list[float | None]], rate: float | None = 0.1, **options: Any) -> Row:
    return Row(Cell(name), rate, tuple(_record(seed, curve, **options) for seed, curve in enumerate(curves)))


def _five(curves: list[list[float | None]]) -> list[list[float | None]]:
    """Fewer than 5 seeds separate nothing: the first and the third once more."""
    return [*curves, curves[0], curves[2]]


ADAMW = _row("torch-adamw", _five([[2, 1, 0.8, 0.6, 0.5], [2, 1, 0.9, 0.7, 0.55], [2, 1, 0.9, 0.65, 0.6]]))
FAST = _row(
    "kfac",
    _five([[2, 0.5, 0.3, 0.2, 0.1], [2, 0.7, 0.5, 0.2, 0.1], [2, 0.6, 0.3, 0.2, 0.1]]),
    cost=3.0,
    pace=0.5,
)
MISSES = _row("tadam", _five([[2, 1.5, 1.2, 1.1, 1.0], [2, None, None, None, None], [2, 1.5, 1.2, 1.1, 1.0]]))


def test_summaries_measure_by_the_median_final_loss_of_the_best_first_order_baseline() -> None:
    sgd = _row("torch-sgd", [[2, 1.9, 1.8, 1.7, 1.6]] * 5)
    found = {s.cell: s for s in summarise([MISSES, FAST, sgd, ADAMW], [], "train_loss")}
    # target 0.55: kfac is there at steps 10, 20, 20, 10, 20; at 3 gradients and half a second a step
    assert (found["kfac"].steps, found["kfac"].gradients, found["kfac"].seconds) == (20, 60, 10)
    assert found["torch-adamw"].steps == 40
    assert found["torch-sgd"].steps == found["tadam"].steps == math.inf
    # equal time: AdamW trains for 4 seconds, in which kfac takes 8 steps
    assert found["kfac"].loss_at_time == (2,) * 5
    assert found["torch-adamw"].loss_at_time == found["torch-adamw"].loss
    assert found["tadam"].divergence == pytest.approx(1 / 5)
    assert next(s.cell for s in summarise([MISSES, FAST, ADAMW], [], "train_loss")) == "kfac"


def test_without_a_baseline_nothing_reaches_a_target() -> None:
    (only,) = summarise([FAST], [], "train_loss")
    assert only.steps == math.inf
    assert references([FAST], "train_loss") == []


def _interleaved(row: Row, **config: Any) -> Row:
    return Row(
        row.cell,
        row.learning_rate,
        tuple({**r, "interleaved": True, "config": {**r["config"], **config}} for r in row.records),
    )


def test_a_time_separates_nothing_unless_the_cells_took_turns() -> None:
    (found,) = compare([ADAMW, FAST], "torch-adamw", "train_loss")
    assert found.verdicts["seconds"] == found.verdicts["loss_at_time"] == "not separated"
    assert found.verdicts["steps"] == "better"
    (found,) = compare([_interleaved(ADAMW), FAST], "torch-adamw", "train_loss")
    assert found.verdicts["seconds"] == "not separated"
    # cells that replay a radius run after the others
    (found,) = compare([_interleaved(ADAMW), _interleaved(FAST, replay="key")], "torch-adamw", "train_loss")
    assert found.verdicts["seconds"] == "not separated"


def test_a_comparison_pairs_the_seeds() -> None:
    (found,) = compare([_interleaved(ADAMW), _interleaved(FAST)], "torch-adamw", "train_loss")
    # by seed: reaches 0.5, 0.55, 0.6 at steps 10, 20, 10, 10, 10 of 40
    assert found.steps.estimate == 0.25
    assert (found.steps.low, found.steps.high) == (0.25, 0.5)
    assert found.gradients.estimate == 0.75
    assert found.seconds.estimate == 0.25 * 5
    assert found.loss.estimate == pytest.approx(np.mean([-0.4, -0.45, -0.5, -0.4, -0.5]))
    assert found.verdicts == {
        "loss": "better", "loss_at_time": "worse", "steps": "better", "gradients": "not separated",
        "seconds": "worse", "processor": "not separated",
    }  # fmt: skip


def _timed(row: Row, pace: float, **config: Any) -> Row:
    """The same runs, with the processor time that they took a step."""
    return Row(
        row.cell,
        row.learning_rate,
        tuple(
            {
                **r,
                "config": {**r["config"], **config},
                "curve": {**r["curve"], "cpu_seconds": [pace * step for step in STEPS]},
                "result": {**r["result"], "cpu_seconds_per_step": pace},
            }
            for r in row.records
        ),
    )


def test_processor_time_is_compared_where_runs_did_not_take_turns() -> None:
    adamw, fast = _timed(ADAMW, 1.0), _timed(FAST, 2.0)
    (found,) = compare([adamw, fast], "torch-adamw", "train_loss")
    assert found.processor is not None
    # steps 0.25 to 0.5 of the reference's, each at twice its time
    assert (found.processor.estimate, found.processor.low, found.processor.high) == (0.5, 0.5, 1.0)
    assert found.verdicts["processor"] == "not separated"
    (found,) = compare([adamw, _timed(FAST, 1.5)], "torch-adamw", "train_loss")
    assert found.verdicts["processor"] == "better"
    assert found.verdicts["seconds"] == "not separated"
    summary = {s.cell: s for s in summarise([adamw, fast], [], "train_loss")}["kfac"]
    assert (summary.processor, summary.processor_per_step) == (40, 2.0)


def test_processor_time_of_a_replay_or_of_a_host_beside_a_device_separates_nothing() -> None:
    (found,) = compare([_timed(ADAMW, 1.0), _timed(FAST, 1.0, replay="key")], "torch-adamw", "train_loss")
    assert found.verdicts["processor"] == "not separated"
    (found,) = compare([_timed(ADAMW, 1.0), _timed(FAST, 1.0, device="cuda")], "torch-adamw", "train_loss")
    assert found.processor is None


def test_older_runs_without_processor_time_are_read_and_called_so() -> None:
    for rows in ([ADAMW, FAST], [_timed(ADAMW, 1.0), FAST], [ADAMW, _timed(FAST, 1.0)]):
        (found,) = compare(rows, "torch-adamw", "train_loss")
        assert found.processor is None
        assert found.verdicts["processor"] == "not separated"
        assert "not recorded" in comparison_table([found])[1][0]
    summary = summarise([ADAMW, FAST], [], "train_loss")
    names, lines = summary_table(summary, workload.get("digits"))
    places = [names.index("CPU ms/step"), names.index("CPU seconds to target")]
    assert all(line[place] == "not recorded" for line in lines for place in places)


def test_seeds_are_paired_by_number_and_not_by_place() -> None:
    shuffled = Row(FAST.cell, 0.1, FAST.records[::-1])
    assert compare([ADAMW, shuffled], "torch-adamw", "train_loss") == compare(
        [ADAMW, FAST], "torch-adamw", "train_loss"
    )
    fewer = Row(FAST.cell, 0.1, FAST.records[1:])
    assert compare([ADAMW, fewer], "torch-adamw", "train_loss")[0].loss.count == 4


def test_what_misses_is_never_better_and_a_failed_reference_lends_no_win() -> None:
    (found,) = compare([ADAMW, MISSES], "torch-adamw", "train_loss")
    assert found.steps.estimate == math.inf
    assert found.verdicts["steps"] == "worse"
    failed = _row("torch-adamw", [[2, None, None, None, None]] * 5)
    (against,) = compare([failed, FAST], "torch-adamw", "train_loss")
    assert against.steps.estimate == math.inf
    assert against.verdicts["steps"] != "better"


def test_a_twin_of_a_reference_that_overfits_does_not_beat_it() -> None:
    """Its loss is where it ends at step 20, and lower at 30: over all 40 steps every twin would take half."""
    overfits = _row("torch-adamw", [[2, 1.0, 0.5, 0.4 + 0.01 * seed, 0.5] for seed in range(5)])
    (found,) = compare([overfits, Row(Cell("soaa"), 0.1, overfits.records)], "torch-adamw", "train_loss")
    assert found.steps == found.gradients == found.seconds
    assert (found.steps.estimate, found.steps.low, found.steps.high) == (1, 1, 1)
    assert set(found.verdicts.values()) == {"not separated"}


def test_equal_cells_are_not_separated() -> None:
    twin = Row(Cell("soaa"), 0.1, ADAMW.records)
    (found,) = compare([ADAMW, twin], "torch-adamw", "train_loss")
    assert set(found.verdicts.values()) == {"not separated"}


@pytest.mark.parametrize(
    ("losses", "decades"),
    [
        ({0.01: 1.0}, 0.0),
        ({0.001: 1.05, 0.01: 1.0, 0.1: 1.06}, 1.0),
        ({0.001: 1.0, 0.01: 2.0, 0.1: 1.0}, 0.0),  # broken: the far one is no part of the range
        ({0.001: 1.0, 0.01: math.inf, 0.1: math.nan}, 0.0),
        ({0.01: -1.0, 0.1: -0.96}, 1.0),  # a negative loss is a loss
    ],
)
def test_width_of_the_range_within_five_percent(losses: dict[float, float], decades: float) -> None:
    assert measures.rate_width(losses) == pytest.approx(decades)


@given(st.lists(st.floats(0.9, 1.2) | st.just(math.inf), min_size=1, max_size=7))
def test_width_is_that_of_the_widest_unbroken_run_of_good_rates_around_the_best(losses: list[float]) -> None:
    by_rate = {10.0 ** (0.5 * i - 4): loss for i, loss in enumerate(losses)}
    least = min(losses)
    # written out: of all intervals of rates that hold the first best and nothing bad, the widest
    best = losses.index(least)
    written = max(
        (
            0.5 * (last - first)
            for first in range(best + 1)
            for last in range(best, len(losses))
            if all(loss <= 1.05 * least for loss in losses[first : last + 1])
        ),
        default=math.nan,
    )
    if math.isinf(least):
        written = math.nan
    assert measures.rate_width(by_rate) == pytest.approx(written, nan_ok=True)


def test_width_where_everything_diverged_is_no_number() -> None:
    assert math.isnan(measures.rate_width({0.1: math.inf}))


def _tuning(points: list[tuple[dict[str, float], float, int]], names: tuple[str, ...]) -> Tuning:
    trials = [
        Trial(None, point, extension, loss, not math.isfinite(loss)) for point, loss, extension in points
    ]  # type: ignore[arg-type]
    return Tuning(Cell("torch-adamw"), tuple(Dimension(name, 0.1, 1) for name in names), trials)


def test_divergence_counts_the_written_space_only_and_setting_is_the_best_trial() -> None:
    tuning = _tuning(
        [
            ({"lr": 0.1}, 0.7, 0),
            ({"lr": 1.0}, math.inf, 0),
            ({"lr": 0.01}, 0.5, 1),
            ({"lr": 10.0}, math.inf, 1),
        ],
        ("lr",),
    )
    (found,) = summarise([ADAMW], [tuning], "train_loss")
    assert found.divergence == 0.5
    assert found.setting == {"lr": 0.01}
    assert found.trials == 4
    assert sensitivity([], tuning) == {0.1: 0.7, 1.0: math.inf, 0.01: 0.5, 10.0: math.inf}


def test_where_other_numbers_were_searched_the_rate_is_judged_by_the_best_near_it() -> None:
    points = [({"lr": 10 ** (-i / 16), "radius": 1.0}, 1.0 if i % 2 else 9.0, 0) for i in range(32)]
    found = sensitivity([], _tuning(points, ("lr", "radius")))
    assert len(found) == 8
    assert set(found.values()) == {1.0}


def test_measures_of_a_curve() -> None:
    record = FAST.records[0]
    assert measures.steps_to(record, "train_loss", 0.3) == 20
    assert measures.gradients_to(record, "train_loss", 0.3) == 60
    assert measures.seconds_to(record, "train_loss", 0.05) == math.inf
    assert measures.loss_at(record, "train_loss", 25, "step") == 0.3
    assert measures.final_loss(_record(0, [1, None, None, None, None]), "train_loss") == math.inf
    assert measures.final_loss({"curve": {}}, "train_loss") == math.inf


costs = st.lists(
    st.lists(st.floats(0.1, 100) | st.just(math.inf), min_size=3, max_size=3), min_size=1, max_size=4
)


@given(costs)
def test_profile_score_is_the_integral_of_its_fraction(rows: list[list[float]]) -> None:
    named = {str(i): row for i, row in enumerate(rows)}
    for name, profile in performance_profiles(named).items():
        grid = np.linspace(1, 4, 30_001)
        integral = np.trapezoid([profile.fraction(tau) for tau in grid[::100]], grid[::100]) / 3
        assert profile.score == pytest.approx(integral, abs=0.02), name
        # written out: τ is reached where no method is τ times cheaper
        for tau in (1.0, 2.0, 4.0):
            written = [
                math.isfinite(own) and all(own <= tau * other[i] * (1 + 1e-12) for other in rows)
                for i, own in enumerate(named[name])
            ]
            assert profile.fraction(tau * (1 + 1e-12)) == pytest.approx(np.mean(written))


def test_profile_of_the_best_everywhere_and_of_one_that_always_misses() -> None:
    found = performance_profiles({"a": [1.0, 2.0], "b": [math.inf, math.inf], "c": [4.0, 16.0]})
    assert found["a"].score == 1.0
    assert found["b"].score == 0.0
    assert found["c"].score == 0.0  # at r_max = 4 it has just been reached
    assert found["c"].fraction(4.0) == 0.5
    assert performance_profiles({"a": [math.inf], "b": [math.inf]})["a"].fraction(4.0) == 0.0
    assert Profile((1.0, 2.0)).steps() == ([1.0, 2.0, 4.0], [0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    "rows", [{}, {"a": []}, {"a": [1.0], "b": [1.0, 2.0]}, {"a": [0.0]}, {"a": [math.nan]}]
)
def test_costs_that_have_no_profile_are_refused(rows: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="costs must"):
        performance_profiles(rows)
