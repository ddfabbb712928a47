"""What the tables of single workloads say together, read from the CSV files beside the page."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from optimizers.ablation import Row, figures
from optimizers.ablation.comparison import compare
from optimizers.ablation.profiles import performance_profiles
from optimizers.ablation.report_tables import Table, comparison_table
from optimizers.ablation.results import spread

Line = dict[str, str]
REFERENCE = "AdamW"


def lines(path: Path) -> list[Line]:
    """Return a CSV file as one dictionary a line; nothing where there is none."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of Markdown."""
    return [
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def against(folder: Path, workloads: Sequence[str], axis: str, kind: str) -> list[str]:
    """Return a table of every cell against AdamW, one column a workload.

    Args:
        folder: where ``WORKLOAD-KIND.csv`` are.
        workloads: the columns.
        axis: such as ``"steps"`` or ``"loss at equal steps"``.
        kind: ``"comparisons"``, on the curve that the target is set on, or ``"training"``.
    """
    found: dict[str, dict[str, str]] = {}
    for workload in workloads:
        for line in lines(folder / f"{workload}-{kind}.csv"):
            if line["against"] != REFERENCE:
                continue
            verdict = line.get(f"verdict: {axis}", "not separated")
            found_text = line.get(axis, "not recorded")
            text = found_text if verdict == "not separated" else f"**{verdict}** {found_text}"
            found.setdefault(line["cell"], {})[workload] = text
    return table(
        ["cell", *workloads],
        [[cell, *(row.get(workload, "not run") for workload in workloads)] for cell, row in found.items()],
    )


def at_equal_rates(rows: Sequence[Row], cell: str, other: str) -> Table:
    """Return a table of one cell against another at every learning rate that both have, by both losses.

    Args:
        rows: one a cell and learning rate.
        cell: label of the one.
        other: label of the other.
    """
    measures = {"validation_loss": "validation loss", "train_loss": "training loss"}
    head = ["learning rate"]
    for name in measures.values():
        head += [f"{other}, {name}", f"{cell}, {name}", f"{cell} less {other}, {name}", f"verdict: {name}"]
    body = []
    for mine in (row for row in rows if row.cell.label == cell):
        (its,) = (row for row in rows if row.cell.label == other and row.learning_rate == mine.learning_rate)
        line = [f"{mine.learning_rate:g}"]
        for measure in measures:
            names, ((*found,),) = comparison_table(compare([mine, its], other, measure))
            said = dict(zip(names, found, strict=True))
            line += [spread(its.values(measure)), spread(mine.values(measure))]
            line += [said["loss at equal steps"], said["verdict: loss at equal steps"]]
        body.append(line)
    return head, body


def as_table(rows: Sequence[Line]) -> list[str]:
    """Return the lines of a CSV file as a table, a verdict before the interval that it is of."""
    names = [name for name in rows[0] if not name.startswith("verdict: ")]
    found = []
    for row in rows:
        items = list(row.items())
        cells = []
        for (name, text), (after, verdict) in zip(items, [*items[1:], ("", "")], strict=True):
            if name.startswith("verdict: "):
                continue
            said = after.startswith("verdict: ") and verdict != "not separated"
            cells.append(f"**{verdict}** {text}" if said else text)
        found.append(cells)
    return table(names, found)


def stability(folder: Path, workloads: Sequence[str]) -> list[str]:
    """Return what the claim of stability is judged by: trials that diverged, width of the rates, spread over seeds."""
    found: dict[str, dict[str, str]] = {}
    for workload in workloads:
        for line in lines(folder / f"{workload}-cells.csv"):
            mean, _, deviation = line["loss at equal steps"].partition(" ± ")
            spread = f"{float(deviation) / abs(float(mean)):.1%}" if deviation else "–"
            found.setdefault(line["cell"], {})[workload] = (
                f"{line['diverged']}, {line['lr width [decades]']}, {spread}"
            )
    return table(
        ["cell", *workloads],
        [[cell, *(row.get(workload, "not run") for workload in workloads)] for cell, row in found.items()],
    )


def profile(folder: Path, workloads: Sequence[str]) -> list[str]:
    """Write the performance profile over the workloads that have a first-order target, and return it as a table.

    The profile is of the cells that every workload has; others are listed without a score.
    """
    costs: dict[str, dict[str, float]] = {}
    for workload in workloads:
        for line in lines(folder / f"{workload}-cells.csv"):
            steps = line["steps to target"]
            costs.setdefault(line["cell"], {})[workload] = (
                math.inf if steps == "–" else max(1.0, float(steps))
            )
    common = [cell for cell, own in costs.items() if len(own) == len(workloads)]
    profiles = performance_profiles({cell: [costs[cell][w] for w in workloads] for cell in common})
    look = figures.styles(list(costs))
    figure = figures.profiles(profiles, look, "steps to target")
    shown = {cell: look[cell] for cell in profiles}
    (folder / "figures" / "performance-profile.png").write_bytes(figures.png(figure, shown))
    ordered = sorted(costs, key=lambda cell: (cell not in profiles, -_score(profiles, cell)))
    rows = [
        [
            cell,
            f"{profiles[cell].score:.3f}" if cell in profiles else "",
            *(_steps(costs[cell], workload) for workload in workloads),
        ]
        for cell in ordered
    ]
    names = ["cell", "score", *workloads]
    with open(folder / "performance-profile.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([names, *rows])
    return table(names, rows)


def _score(profiles: Mapping[str, object], cell: str) -> float:
    return float(getattr(profiles.get(cell), "score", 0.0))


def _steps(own: Mapping[str, float], workload: str) -> str:
    if workload not in own:
        return "not run"
    return f"{own[workload]:g}" if math.isfinite(own[workload]) else "–"
