"""From finished runs to rows of a table: one row a cell, at its best learning rate."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from optimizers.ablation import baselines, workload
from optimizers.ablation.cell import Cell
from optimizers.ablation.config import RunConfig
from optimizers.ablation.errors import AblationError
from optimizers.ablation.store import Store

Record = dict[str, Any]
# name, whether it depends on the clock (and so differs between two equal runs)
COLUMNS = (
    ("cell", False),
    ("lr", False),
    ("seeds", False),
    ("train loss", False),
    ("validation loss", False),
    ("validation metric", False),
    ("test metric", False),
    ("steps to target", False),
    ("diverged", False),
    ("state bytes", False),
    ("ms/step", True),
    ("CPU ms/step", True),
    ("seconds to target", True),
)


@dataclass(frozen=True)
class Row:
    """A cell at one learning rate over its seeds."""

    cell: Cell
    learning_rate: float | None
    records: tuple[Record, ...] = field(repr=False)  # hundreds of numbers each

    def values(self, name: str) -> list[float]:
        """Return a result of every run, by seed; infinite where a run has none (it failed or diverged)."""
        return [number(record["result"].get(name)) for record in self.records]

    def mean(self, name: str) -> float:
        """Return the mean of a result over seeds."""
        return statistics.fmean(self.values(name))

    @property
    def error(self) -> str:
        """Why the first failed run failed, or nothing."""
        return next((str(record["error"]) for record in self.records if record["status"] == "failed"), "")

    @property
    def diverged(self) -> float:
        """The fraction of runs that failed or diverged."""
        bad = [diverged(record) for record in self.records]
        return float(sum(bad) / len(bad))


def diverged(record: Record) -> bool:
    """Return whether a run failed, or ended above its initial training loss or at no finite one."""
    return record["status"] == "failed" or bool(record["result"].get("diverged", True))


def number(value: object) -> float:
    """Return a JSON value as a number; infinity for a missing one: a miss counts as infinite."""
    return float(value) if isinstance(value, int | float) else math.inf


def collect(configs: Sequence[RunConfig], store: Store) -> list[Row]:
    """Return a row for every cell and learning rate whose runs are all finished, in the order of `configs`.

    Args:
        configs: the runs of an ablation.
        store: where they are.

    Returns:
        The rows; within a row the runs are sorted by seed.
    """
    groups: dict[tuple[Cell, float | None, str, float], list[RunConfig]] = {}
    for config in configs:
        group = (config.cell, config.learning_rate, config.schedule, config.warmup)
        groups.setdefault(group, []).append(config)
    rows = []
    for (cell, rate, *_), members in groups.items():
        if all(store.has(config.key) for config in members):
            members = sorted(members, key=lambda config: config.seed)
            rows.append(Row(cell, rate, tuple(_whole(store, config.key) for config in members)))
    return rows


def _whole(store: Store, key: str) -> Record:
    record = store.load(key)
    lacking = [part for part in ("config", "environment", "trace") if part not in record]
    if lacking:
        raise AblationError(
            f"{store.path(key)} lacks {lacking[0]!r}: remove this file, and soaa ablate makes the run again"
        )
    return record


def best(rows: Sequence[Row]) -> list[Row]:
    """Return for each cell the row with the least validation loss; the test is not looked at."""
    chosen: dict[Cell, Row] = {}
    for row in rows:
        rival = chosen.get(row.cell)
        if rival is None or row.mean("validation_loss") < rival.mean("validation_loss"):
            chosen[row.cell] = row
    return list(chosen.values())


def target(rows: Sequence[Row], measure: str) -> tuple[float, str]:
    """Return the target: the median over seeds of the best first-order baseline's final loss, and whose it is.

    Args:
        rows: one row a cell.
        measure: ``"train_loss"`` or ``"validation_loss"``: which curve.

    Returns:
        The target and the cell's label; infinity (everything reaches it) and nothing without a baseline.
    """
    finals = {
        row.cell.label: statistics.median(number(r["curve"].get(measure, [None])[-1]) for r in row.records)
        for row in rows
        if baselines.is_first_order(row.cell.name) and not row.cell.replay
    }
    if not finals:
        return math.nan, ""
    label = min(finals, key=lambda name: finals[name])
    return finals[label], label


def reached(record: Record, measure: str, goal: float, axis: str = "step") -> float:
    """Return the step (or second) at which a run's curve first is at or below a target; infinity for a miss."""
    curve = record["curve"]
    for position, value in zip(curve.get(axis, []), curve.get(measure, []), strict=True):
        if number(value) <= goal:
            return float(position)
    return math.inf


def table(rows: Sequence[Row], problem: workload.Workload) -> list[dict[str, str]]:
    """Return the table as text: one dictionary a cell, with the names in `COLUMNS`.

    Args:
        rows: one row a cell.
        problem: the workload, for its metric and the curve that its target is set on.

    Returns:
        The rows, sorted by validation loss; columns of `COLUMNS` marked with the clock differ between equal runs.
    """
    goal, _ = target(rows, problem.target)
    return [
        {
            "cell": row.cell.label,
            "lr": "default" if row.learning_rate is None else f"{row.learning_rate:g}",
            "seeds": str(len(row.records)),
            "train loss": spread(row.values("train_loss")),
            "validation loss": spread(row.values("validation_loss")),
            "validation metric": spread(row.values("validation_metric")),
            "test metric": spread(row.values("test_metric")),
            "steps to target": _median([reached(r, problem.target, goal) for r in row.records]),
            "diverged": f"{row.diverged:.0%}",
            "state bytes": _finite(row.values("state_bytes")[0], ".0f"),
            "ms/step": _finite(1e3 * statistics.median(row.values("seconds_per_step")), ".2f"),
            "CPU ms/step": _processor(row),
            "seconds to target": _median([reached(r, problem.target, goal, "seconds") for r in row.records]),
        }
        for row in sorted(rows, key=lambda row: row.mean("validation_loss"))
    ]


def _processor(row: Row) -> str:
    if any("cpu_seconds_per_step" not in record["result"] for record in row.records):
        return "-"  # a run from before it was recorded, or one that failed
    return f"{1e3 * statistics.median(row.values('cpu_seconds_per_step')):.2f}"


def spread(values: Sequence[float]) -> str:
    """Return the mean and the standard deviation over seeds as text.

    >>> spread([1.0, 1.2])
    '1.100 ± 0.14'
    """
    if not all(math.isfinite(value) for value in values):
        return "-"
    middle = digits(statistics.fmean(values), 4)
    return middle if len(values) == 1 else f"{middle} ± {digits(statistics.stdev(values), 2)}"


def digits(value: float, count: int) -> str:
    """Return a finite number with this many significant digits, zeros too: numbers of a column look alike.

    >>> digits(0.8, 3), digits(1805.2, 4), digits(0.0, 3)
    ('0.800', '1805', '0.00')
    """
    return f"{value:#.{count}g}".removesuffix(".")


def _median(values: Sequence[float]) -> str:
    return _finite(statistics.median(values), ".4g")


def _finite(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return a table as Markdown."""
    names = [name for name, _ in COLUMNS]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(row[name] for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def comma_separated(rows: Sequence[dict[str, str]]) -> str:
    """Return a table as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [name for name, _ in COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
