"""Write the page of the study from the folder of its runs: python docs/results/study/page.py RUNS GRID."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optimizers.ablation import Row, read_outcome, report
from optimizers.ablation.comparison import compare
from optimizers.ablation.report_page import comma_separated
from optimizers.ablation.report_tables import comparison_table

HERE = Path(__file__).parent
PAGE = HERE.parent / "study.md"
SHOWN = (
    "validation-loss-against-steps",
    "training-loss-against-steps",
    "learning-rate-sensitivity",
    "radius",
    "steps-to-where-adamw-ends",
    "performance-profile",
)
RESULTS = (
    "train_loss",
    "validation_loss",
    "validation_metric",
    "test_loss",
    "test_metric",
    "seconds",
    "state_bytes",
    "gradients_per_step",
    "diverged",
)


def main(runs: Path, grid: Path) -> None:
    """Write the page, its pictures, the report's tables, and every run as a line of ``runs.csv``."""
    report(runs)
    report(grid)
    kept = [path for path in (runs / "figures").glob("*.png") if path.stem.endswith(SHOWN)]
    shutil.rmtree(HERE / "figures", ignore_errors=True)
    (HERE / "figures").mkdir()
    for path in kept:
        shutil.copy(path, HERE / "figures")
    heat_map = next((grid / "figures").glob("*curvature-x-trust-region.png"))
    shutil.copy(heat_map, HERE / "figures" / "grid.png")
    shutil.copy(grid / "table.csv", HERE / "grid.csv")
    for table in runs.glob("*.csv"):
        shutil.copy(table, HERE)
    controls = [
        [
            "workload",
            "cell",
            "largest difference of its training curve from SOAA's",
            "Fisher branch live at most",
        ]
    ]
    for folder in sorted(path.parent for path in runs.glob("*/configuration.json")):
        best = read_outcome(folder).best
        found = comparison_table(compare(best, "AdamW", "train_loss"))
        (HERE / f"{folder.name}-training.csv").write_text(comma_separated(found), encoding="utf-8")
        controls += [[folder.name, *line] for line in _controls(best)]
    with open(HERE / "controls.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(controls)
    text = (runs / "report.md").read_text(encoding="utf-8").partition("\n")[2]
    text = re.sub(
        r"!\[[^\]]*\]\(figures/([^)]*)\)(\n\n[^\n]*\n)?",
        lambda found: (
            found[0].replace("(figures/", "(study/figures/")
            if (HERE / "figures" / found[1]).is_file()
            else ""
        ),
        text,
    )
    head = (HERE / "findings.txt").read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"\n{3,}", "\n\n", head + text), encoding="utf-8")
    with open(HERE / "runs.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            [
                "key",
                "workload",
                "cell",
                "lr",
                "seed",
                "steps",
                "tuning",
                "revision",
                "status",
                "error",
                *RESULTS,
            ]
        )
        for path in sorted([*runs.glob("*/runs/*.json"), *grid.glob("runs/*.json")]):
            writer.writerow(_line(json.loads(path.read_text(encoding="utf-8"))))


def _controls(rows: Sequence[Row]) -> Iterator[list[str]]:
    records = {row.cell.label: row.records for row in rows}
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
    main(Path(sys.argv[1]), Path(sys.argv[2]))
