"""Write the page of the study from folders of its runs: python docs/results/study/page.py RUNS... [--grid GRID]."""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glance import REFERENCE, against, lines, profile, stability

from optimizers.ablation import Row, read_outcome, report
from optimizers.ablation.ablate import CONFIGURATION
from optimizers.ablation.comparison import compare
from optimizers.ablation.report_page import comma_separated
from optimizers.ablation.report_tables import comparison_table

HERE = Path(__file__).parent
PAGE = HERE.parent / "study.md"
SHOWN = (
    "validation-loss-against-steps",
    "training-loss-against-steps",
    "radius",
    "steps-to-where-adamw-ends",
)
ORDER = (
    "digits",
    "fashion-mnist-logistic",
    "fashion-mnist",
    "fashion-mnist-2c2d",
    "mnist-autoencoder",
    "mnist-conv-autoencoder",
    "character-gpt",
)
CONTROLS = [
    "workload",
    "cell",
    "largest difference of its training curve from SOAA's",
    "Fisher branch live at most",
]
RESULTS = (
    "train_loss",
    "validation_loss",
    "validation_metric",
    "test_loss",
    "test_metric",
    "seconds",
    "cpu_seconds",
    "state_bytes",
    "gradients_per_step",
    "diverged",
)


RUN_COLUMNS = [
    "key", "workload", "cell", "lr", "seed", "steps", "tuning", "revision", "status", "error", *RESULTS,
]  # fmt: skip


def main(runs: Sequence[Path], grid: Path | None = None) -> None:
    """Write the page, its pictures, the report's tables, and every run as a line of ``runs.csv``.

    Args:
        runs: folders of workloads, or of several; a workload that none of them holds keeps its committed part.
        grid: the folder of the grid; None keeps the committed map.
    """
    (HERE / "figures").mkdir(exist_ok=True)
    if grid is not None:
        report(grid)
        heat_map = next((grid / "figures").glob("*curvature-x-trust-region.png"))
        shutil.copy(heat_map, HERE / "figures" / "grid.png")
        shutil.copy(grid / "table.csv", HERE / "grid.csv")
    parts = _kept_parts()
    controls = {
        (line["workload"], line["cell"]): list(line.values()) for line in lines(HERE / "controls.csv")
    }
    folders = _folders(runs)
    for folder in folders:
        outcome = read_outcome(folder)
        name = outcome.ablation.workload
        if not any(row.cell.label == REFERENCE for row in outcome.best):
            print(f"{folder}: left out, AdamW's runs are not finished")
            continue
        report(folder)
        for picture in (folder / "figures").glob(f"{name}-*.png"):
            if picture.stem.endswith(SHOWN):
                shutil.copy(picture, HERE / "figures")
        for written in folder.glob(f"{name}-*.csv"):
            shutil.copy(written, HERE)
        found = comparison_table(compare(outcome.best, REFERENCE, "train_loss"))
        (HERE / f"{name}-training.csv").write_text(comma_separated(found), encoding="utf-8")
        for line in _controls(outcome.best):
            controls[name, line[0]] = [name, *line]
        parts[name] = _part((folder / "report.md").read_text(encoding="utf-8"), name)
    with open(HERE / "controls.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([CONTROLS, *controls.values()])
    names = [name for name in ORDER if name in parts]
    text = "\n".join([*_together(names), *(parts[name] for name in names)])
    head = (HERE / "findings.txt").read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"\n{3,}", "\n\n", head + "\n" + text).rstrip() + "\n", encoding="utf-8")
    _write_runs([*folders, *([grid] if grid is not None else [])])


STEPS_NOTE = """
Steps to where AdamW's run of the same seed ends, over AdamW's own: below 1 is faster, ∞ is a miss. Bold where the
interval excludes 1. On the curve that the workload sets its target on: the training loss of the autoencoders, the
validation loss elsewhere.
"""
STABILITY_NOTE = """
Trials of the written space that diverged; decades of learning rate within 5% of the best, a lower bound that three
trials leave coarse; standard deviation of the final loss over seeds, as a fraction of its mean.
"""
PROFILE_NOTE = """
Median steps to the target, r_max = 4. The score is the area under the profile, over all workloads, of the cells that
every workload has.
"""


def _together(names: Sequence[str]) -> list[str]:
    return [
        "## Against AdamW at a glance",
        STEPS_NOTE,
        *against(HERE, names, "steps", "comparisons"),
        "",
        "The same of the training loss, for every workload:",
        "",
        *against(HERE, names, "steps", "training"),
        "",
        "Processor time to where AdamW's run ends, over AdamW's own:",
        "",
        *against(HERE, names, "processor time", "comparisons"),
        "",
        "## Stability",
        STABILITY_NOTE,
        *stability(HERE, names),
        "",
        "## All workloads",
        PROFILE_NOTE,
        *profile(HERE, names),
        "",
        "![Performance profile](study/figures/performance-profile.png)",
        "",
    ]


def _folders(runs: Sequence[Path]) -> list[Path]:
    places = [path for each in runs for path in [*each.glob(CONFIGURATION), *each.glob(f"*/{CONFIGURATION}")]]
    return sorted(path.parent for path in places)


def _kept_parts() -> dict[str, str]:
    found = (
        re.split(r"^(?=## )", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE) if PAGE.is_file() else []
    )
    named = {part.partition("\n")[0].removeprefix("## ").strip(): part for part in found}
    return {name: named[name] for name in ORDER if name in named}


def _part(text: str, name: str) -> str:
    """One workload's part of a report, with the pictures that are shown here."""
    text = text[text.index(f"## {name}\n") :]
    return re.sub(
        r"!\[[^\]]*\]\(figures/([^)]*)\)(\n\n[^\n]*\n)?",
        lambda found: (
            found[0].replace("(figures/", "(study/figures/")
            if (HERE / "figures" / found[1]).is_file()
            else ""
        ),
        text,
    )


def _write_runs(folders: Sequence[Path]) -> None:
    """Add every run to ``runs.csv``, by its key; those of parts that were run elsewhere stay."""
    path = HERE / "runs.csv"
    known: dict[str, list[object]] = {}
    for line in lines(path):
        known[line["key"]] = [line.get(name, "") for name in RUN_COLUMNS]
    for run in sorted(run for folder in folders for run in folder.glob("runs/*.json")):
        line_of = _line(json.loads(run.read_text(encoding="utf-8")))
        known[str(line_of[0])] = line_of
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([RUN_COLUMNS, *known.values()])


def _controls(rows: Sequence[Row]) -> Iterator[list[str]]:
    records = {row.cell.label: row.records for row in rows}
    if "SOAA" not in records:
        return
    for label in (name for name in records if "SOAA" in name):
        apart = max(
            abs(ours - its)
            for mine, other in zip(records["SOAA"], records[label], strict=True)
            for ours, its in zip(mine["curve"]["train_loss"], other["curve"]["train_loss"], strict=True)
        )
        live = [
            value for record in records[label] for value in record["trace"].get("fisher_active_fraction", [])
        ]
        yield [label, f"{apart:.3g}", f"{max(value or 0.0 for value in live):g}" if live else ""]


def _line(record: dict[str, Any]) -> list[object]:
    config, cell = record["config"], record["config"]["cell"]
    name = cell["optimizer"] or f"{cell['curvature']}+{cell['trust_region']}"
    options = ",".join(f"{key}={value}" for key, value in sorted(cell["options"].items()))
    replay = f" replay={config['replay']}" if config["replay"] else ""
    return [
        record["key"],
        config["workload"],
        f"{name}:{options}{replay}",
        config["learning_rate"],
        config["seed"],
        config["steps"],
        not config["read_test"],
        record["environment"].get("git_revision", "")[:7],
        record["status"],
        record.get("error", ""),
        *(f"{v:.6g}" if isinstance(v := record["result"].get(key), float) else v for key in RESULTS),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that soaa ablate wrote")
    parser.add_argument("--grid", type=Path, help="the folder of grid.toml's runs")
    asked = parser.parse_args()
    main(asked.runs, asked.grid)
