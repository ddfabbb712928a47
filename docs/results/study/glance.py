"""What the tables of single workloads say together, read from the CSV files beside the page."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from optimizers.ablation import figures
from optimizers.ablation.profiles import performance_profiles

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
