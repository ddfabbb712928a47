"""The tables of a report and the facts above them, as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optimizers.ablation import results, workload
from optimizers.ablation.ablate import Outcome
from optimizers.ablation.comparison import Comparison, Summary
from optimizers.ablation.intervals import Interval
from optimizers.ablation.space import fingerprint

AXES = {
    "loss": "loss at equal steps",
    "loss_at_time": "loss at equal time",
    "steps": "steps",
    "gradients": "gradients",
    "seconds": "time",
    "processor": "processor time",
}
Table = tuple[list[str], list[list[str]]]  # names of columns, rows


def facts(outcome: Outcome, goal: float, whose: str, measure: str) -> list[tuple[str, str]]:
    """Return what the reader must know of how it was run: names and texts."""
    ablation = outcome.ablation
    config = outcome.rows[0].records[0]["config"]
    environments = [record["environment"] for row in outcome.rows for record in row.records]
    baseline = (
        f"{measure.replace('_', ' ')} <= {goal:.5g}: the median of {whose}, the best first-order baseline"
    )
    found = [
        (
            "run",
            f"{config['steps']} steps of batch {config['batch_size']}, {config['dtype']}, {config['device']}",
        ),
        ("schedule", f"{config['schedule']}, warm-up over {config['warmup']:.0%} of the steps"),
        (
            "seeds",
            f"{', '.join(map(str, ablation.seed_list))}; the same initial values and batches for every cell",
        ),
        ("target", baseline if whose else "none: no first-order baseline was run"),
        ("times", clock_note(outcome)),
        ("machine", _each(environments, lambda seen: _machine(seen, config["threads"]))),
        ("versions", _each(environments, _versions)),
        ("revision", _each(environments, _revision)),
    ]
    if ablation.tune:
        budget = f"{ablation.tune} trials a cell, seed {ablation.tune_seed}, by validation loss"
        text = f"{budget}; search space {fingerprint()}"
        found.insert(3, ("tuning", text))
    return found


def _each(environments: Sequence[Mapping[str, Any]], text: Callable[[Mapping[str, Any]], str]) -> str:
    """Every machine, version or revision once: an ablation that was continued, or shared, may have several."""
    return "; and ".join(dict.fromkeys(text(environment) for environment in environments))


def _machine(environment: Mapping[str, Any], threads: int) -> str:
    cores = f"{environment['cpu_count']} cores, {threads} thread(s) a run"
    return f"{environment['processor']}, {cores}; {environment['machine']}"


def _versions(environment: Mapping[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in environment["versions"].items() if version]
    return ", ".join([f"Python {environment['python']}", *versions])


def _revision(environment: Mapping[str, Any]) -> str:
    if not environment["git_revision"]:
        return "not from a checkout"
    dirty = " (with changes that are not committed)" if environment["git_dirty"] else ""
    return f"{environment['git_revision']}{dirty}"


def clock_note(outcome: Outcome) -> str:
    """Return how far the times may be compared."""
    if all(record.get("interleaved") for row in outcome.rows for record in row.records):
        return "Cells took turns in one process; evaluation is excluded."
    if outcome.ablation.workers > 1:
        return f"{outcome.ablation.workers} runs shared the machine: compare times with care. Evaluation is excluded."
    return "One run after the other, in alternating order; evaluation is excluded."


def interval_note() -> str:
    """Return what the intervals are."""
    return (
        "Paired over seeds, 95% by the bootstrap with percentiles expanded for few seeds; each interval stands for "
        "itself, so of many comparisons some separate by chance. Losses: mean difference. Steps, gradients, time: "
        "median of when a cell first is where the reference ends, over when the reference first is; ∞ is a miss. "
        "Only an interval that excludes equality and rests on 5 seeds or more is called better or worse, and one of "
        "times only where the cells took turns in one process. Processor time leaves out pauses and other "
        "work's share, though not what that work does to caches; older runs have not recorded it."
    )


def tuning_note(outcome: Outcome) -> str:
    """Return how the cells were tuned."""
    return (
        f"{outcome.ablation.tune} quasi-random trials in the written space for every cell, and more where the best lay "
        "at an edge. Divergence is the fraction of the written space's trials; the width is how many decades of "
        "learning rate do within 5% of the best."
    )


def number(value: float) -> str:
    """Return a number in four digits, or a dash for a miss."""
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _recorded(value: float) -> str:
    return "not recorded" if math.isnan(value) else number(value)


def _interval(found: Interval | None) -> str:
    if found is None:
        return "not recorded"

    def end(value: float) -> str:
        return results.digits(value, 3) if math.isfinite(value) else ("∞" if value > 0 else "-∞")

    return f"{end(found.estimate)} [{end(found.low)}, {end(found.high)}]"


def summary_note(measure: str) -> str:
    """Return what the table of cells shows."""
    return (
        f"Best validation loss first. Loss is the {measure.replace('_', ' ')}; ± is the standard deviation over seeds; "
        "a dash is a miss or a divergence. A gradient is one forward and backward pass of a batch."
    )


def summary_table(summaries: Sequence[Summary], problem: workload.Workload) -> Table:
    """Return one row a cell."""
    names = [
        "cell", "loss at equal steps", "loss at equal time", f"validation {problem.metric_name}",
        f"test {problem.metric_name}",
        "steps to target", "gradients to target", "seconds to target", "CPU seconds to target", "gradients/step",
        "ms/step", "CPU ms/step", "state bytes",
        "diverged", "lr width [decades]", "seeds",
    ]  # fmt: skip
    return names, [
        [
            s.cell,
            *(_spread(values) for values in (s.loss, s.loss_at_time, s.validation_metric, s.test_metric)),
            number(s.steps), number(s.gradients), number(s.seconds), _recorded(s.processor),
            number(s.gradients_per_step), number(1e3 * s.seconds_per_step), _recorded(1e3 * s.processor_per_step),
            f"{s.state_bytes:.0f}" if math.isfinite(s.state_bytes) else "–",
            f"{s.divergence:.0%}", number(s.rate_width), str(s.seeds),
        ]
        for s in summaries
    ]  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    return results.spread(values) if all(math.isfinite(value) for value in values) else "–"


def comparison_table(compared: Sequence[Comparison]) -> Table:
    """Return one row a cell and reference, with an interval and a verdict on each axis."""
    names = ["cell", "against", *(name for axis in AXES.values() for name in (axis, f"verdict: {axis}"))]
    return names, [
        [
            entry.cell,
            entry.reference,
            *(text for axis in AXES for text in (_interval(getattr(entry, axis)), entry.verdicts[axis])),
        ]
        for entry in compared
    ]  # fmt: skip


def tuning_table(outcome: Outcome, summaries: Sequence[Summary]) -> Table:
    """Return what was searched for each cell, and what was found."""
    order = {summary.cell: position for position, summary in enumerate(summaries)}
    rows = []
    for tuning in sorted(outcome.tunings, key=lambda tuning: order.get(tuning.cell.label, len(order))):
        best = tuning.best
        searched = "; ".join(f"{d.name} {d.low:g} to {d.high:g}" for d in tuning.dimensions) or "nothing"
        setting = ", ".join(f"{name} {value:g}" for name, value in best.point.items()) if best else "as given"
        extensions = max((trial.extension for trial in tuning.trials), default=0)
        rows.append([
            tuning.cell.label, searched, str(len(tuning.trials)), str(extensions), setting,
            number(best.loss) if best else "–", f"{sum(trial.diverged for trial in tuning.trials)}",
        ])  # fmt: skip
    return ["cell", "searched", "trials", "extensions", "best", "its validation loss", "diverged"], rows
