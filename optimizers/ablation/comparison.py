"""What an ablation says: one summary a cell, and every cell against the best tuned first-order baseline.

Pure functions of rows and searches. The target is the median over seeds of the best first-order baseline's final loss.
A comparison is paired: for every seed a cell is measured by what *that seed's* run of the reference ended at.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optimizers.ablation import measures, results
from optimizers.ablation.intervals import Interval, Verdict, paired_bootstrap
from optimizers.ablation.protocol import Tuning
from optimizers.ablation.results import Record, Row

BINS = 8  # of the learning rate, where other numbers were searched too


@dataclass(frozen=True)
class Summary:
    """One cell at its best setting.

    Args:
        cell: its label.
        setting: the learning rate and what else was searched, at the best trial.
        seeds: how many.
        loss: final loss, by seed, on the curve that the workload sets its target on: at equal steps.
        loss_at_time: the same at equal time, the median training time of the cell that sets the target.
        validation_metric: by seed.
        test_metric: by seed.
        steps: to the target, median over seeds; infinite for a miss.
        gradients: the same in gradients.
        seconds: the same in seconds.
        processor: the same in seconds of processor time; NaN where a run has not recorded it.
        gradients_per_step: what a step costs.
        seconds_per_step: median over seeds.
        processor_per_step: the same of processor time; NaN as above.
        state_bytes: of the optimizer.
        divergence: fraction of the written space's trials (without tuning: of all runs of the cell) that diverged.
        rate_width: decades of learning rate within 5% of the best.
        trials: how many the cell was tuned with, extensions included.
    """

    cell: str
    setting: dict[str, float]
    seeds: int
    loss: tuple[float, ...]
    loss_at_time: tuple[float, ...]
    validation_metric: tuple[float, ...]
    test_metric: tuple[float, ...]
    steps: float
    gradients: float
    seconds: float
    processor: float
    gradients_per_step: float
    seconds_per_step: float
    processor_per_step: float
    state_bytes: float
    divergence: float
    rate_width: float
    trials: int


@dataclass(frozen=True)
class Comparison:
    """One cell against a reference, seed by seed.

    Args:
        cell: its label.
        reference: whose final loss each seed is measured by.
        loss: mean difference of the final loss at equal steps; below 0 the cell is better.
        loss_at_time: the same at equal time.
        steps: median ratio of the steps after which the cell is first where the reference ends to those after which
            the reference is there first itself; infinite where the cell never is.
        gradients: the same of its cost in gradients.
        seconds: the same of its training time.
        processor: the same of its processor time; None where a run has not recorded it.
        same_clock: whether all runs took turns in one process. Otherwise times differ by when they were taken, and
            none of them separates anything. Processor time leaves out pauses and what others on the machine were
            given, so it is compared, between runs of the same stage, on the CPU.
        same_stage: whether the runs were made in the same stage: what replays another runs after it.
    """

    cell: str
    reference: str
    loss: Interval
    loss_at_time: Interval
    steps: Interval
    gradients: Interval
    seconds: Interval
    processor: Interval | None = None
    same_clock: bool = False
    same_stage: bool = True

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """What may be said of each: an interval that does not exclude equality says nothing."""
        differences = {name: getattr(self, name).verdict(0.0) for name in ("loss", "loss_at_time")}
        fractions = {name: getattr(self, name).verdict(1.0) for name in ("steps", "gradients", "seconds")}
        found = differences | fractions
        if not self.same_clock:
            found |= {"loss_at_time": "not separated", "seconds": "not separated"}
        recorded = self.processor if self.same_stage else None
        found["processor"] = "not separated" if recorded is None else recorded.verdict(1.0)
        return found


def summarise(rows: Sequence[Row], tunings: Sequence[Tuning], measure: str) -> list[Summary]:
    """Return one summary a cell, the best validation loss first.

    Args:
        rows: every finished row of an ablation.
        tunings: its searches; none without tuning.
        measure: which curve the workload sets its target on.
    """
    best = results.best(rows)
    goal, whose = results.target(best, measure)
    budget = next(
        (statistics.median(row.values("seconds")) for row in best if row.cell.label == whose), math.inf
    )
    searches = {tuning.cell.label: tuning for tuning in tunings}
    found = []
    for row in sorted(best, key=lambda row: row.mean("validation_loss")):
        own = [other for other in rows if other.cell == row.cell]
        tuning = searches.get(row.cell.label)

        def to(kind: Any, row: Row = row) -> float:
            return (
                statistics.median(kind(record, measure, goal) for record in row.records)
                if whose
                else math.inf
            )

        found.append(
            Summary(
                cell=row.cell.label,
                setting=_setting(row, tuning),
                seeds=len(row.records),
                loss=tuple(measures.final_loss(record, measure) for record in row.records),
                loss_at_time=tuple(measures.loss_at(record, measure, budget) for record in row.records),
                validation_metric=tuple(row.values("validation_metric")),
                test_metric=tuple(row.values("test_metric")),
                steps=to(measures.steps_to),
                gradients=to(measures.gradients_to),
                seconds=to(measures.seconds_to),
                processor=to(measures.processor_seconds_to),
                gradients_per_step=statistics.median(row.values("gradients_per_step")),
                seconds_per_step=statistics.median(row.values("seconds_per_step")),
                processor_per_step=_recorded(row, "cpu_seconds_per_step"),
                state_bytes=row.values("state_bytes")[0],
                divergence=_divergence(own, tuning),
                rate_width=measures.rate_width(sensitivity(own, tuning)),
                trials=len(tuning.trials) if tuning else 0,
            )
        )
    return found


def sensitivity(rows: Sequence[Row], tuning: Tuning | None) -> dict[float, float]:
    """Return the validation loss of one cell by learning rate.

    Args:
        rows: of this cell, one a learning rate: the mean over seeds.
        tuning: its search, in place of the rows where it has one. Where other numbers were searched too: the least
            loss in each eighth of the range.
    """
    if tuning is not None and tuning.trials:
        points = [(trial.point["lr"], trial.loss) for trial in tuning.trials if "lr" in trial.point]
        return measures.lower_envelope(points, BINS if len(tuning.dimensions) > 1 else 0)
    return {row.learning_rate: row.mean("validation_loss") for row in rows if row.learning_rate is not None}


def _recorded(row: Row, name: str) -> float:
    if any(record["status"] != "failed" and name not in record["result"] for record in row.records):
        return math.nan
    return statistics.median(row.values(name))


def _setting(row: Row, tuning: Tuning | None) -> dict[str, float]:
    if tuning is not None and tuning.best is not None:
        return dict(tuning.best.point)
    rate = row.values("learning_rate")[0]
    return {"lr": rate} if math.isfinite(rate) else {}


def _divergence(rows: Sequence[Row], tuning: Tuning | None) -> float:
    if tuning is not None and tuning.trials:
        return measures.divergence_rate(trial.diverged for trial in tuning.trials if trial.extension == 0)
    return measures.divergence_rate(results.diverged(record) for row in rows for record in row.records)


def references(rows: Sequence[Row], measure: str) -> list[str]:
    """Return what every cell is compared with: the cell that sets the target, and AdamW where that is another."""
    best = results.best(rows)
    _, whose = results.target(best, measure)
    adamw = [row.cell.label for row in best if row.cell.name == "torch-adamw" and not row.cell.replay]
    return list(dict.fromkeys(name for name in (whose, *adamw[:1]) if name))


def compare(rows: Sequence[Row], reference: str, measure: str) -> list[Comparison]:
    """Return every other cell against one, over the seeds that both have.

    Args:
        rows: one row a cell.
        reference: label of the row that the others are compared with.
        measure: which curve.

    Returns:
        The comparisons, in the order of `rows`.
    """
    base = {
        record["config"]["seed"]: record
        for row in rows
        if row.cell.label == reference
        for record in row.records
    }
    found = []
    for row in rows:
        pairs = [(r, base[r["config"]["seed"]]) for r in row.records if r["config"]["seed"] in base]
        if row.cell.label != reference and pairs:
            found.append(_compare(row.cell.label, reference, pairs, measure))
    return found


def _compare(cell: str, reference: str, pairs: Sequence[tuple[Record, Record]], measure: str) -> Comparison:
    losses: list[float] = []
    at_time: list[float] = []
    steps: list[float] = []
    gradients: list[float] = []
    seconds: list[float] = []
    processor: list[float] = []
    on_cpu = all(r["config"].get("device", "cpu") == "cpu" for pair in pairs for r in pair)
    for record, base in pairs:
        goal = measures.final_loss(base, measure)
        budget = results.number(base["result"].get("seconds"))
        losses.append(_minus(measures.final_loss(record, measure), goal))
        at_time.append(_minus(measures.loss_at(record, measure, budget), goal))
        # what never fell behind a reference that failed is no evidence: its goal is infinite
        reachable = goal if math.isfinite(goal) else -math.inf
        # over when the reference is there *first*: a loss that falls and rises again is there long before its end, and
        # over the whole run a cell would beat its own twin
        for ratios, spent in (
            (steps, measures.steps_to), (gradients, measures.gradients_to), (seconds, measures.seconds_to),
            (processor, measures.processor_seconds_to),
        ):  # fmt: skip
            ratios.append(_over(spent(record, measure, reachable), spent(base, measure, reachable)))
    return Comparison(
        cell,
        reference,
        paired_bootstrap(losses, "mean"),
        paired_bootstrap(at_time, "mean"),
        paired_bootstrap(steps, "median"),
        paired_bootstrap(gradients, "median"),
        paired_bootstrap(seconds, "median"),
        paired_bootstrap(processor, "median") if on_cpu and not any(map(math.isnan, processor)) else None,
        all(_took_turns(record, base) for record, base in pairs),
        all(_same_stage(record, base) for record, base in pairs),
    )


def _took_turns(record: Record, base: Record) -> bool:
    """Whether both runs shared one clock: cells that replay another one run after it, in turns of their own."""
    return bool(record.get("interleaved") and base.get("interleaved")) and _same_stage(record, base)


def _same_stage(record: Record, base: Record) -> bool:
    return bool(record["config"].get("replay")) == bool(base["config"].get("replay"))


def _minus(value: float, base: float) -> float:
    if math.isinf(value) and math.isinf(base):
        return 0.0  # both failed
    return value - base


def _over(value: float, base: float) -> float:
    if math.isnan(value) or math.isnan(base):
        return math.nan
    return math.inf if math.isinf(value) or not math.isfinite(base) or base <= 0 else value / base
