"""Write the page of the study, its tables and its pictures, from the raw results: python docs/results/study/page.py.

With folders of runs, ``python docs/results/study/page.py RUNS... [--grid GRID]``, their runs become the raw results
first.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import raw
from glance import REFERENCE, against, lines, profile, stability

from optimizers.ablation import Row, read_outcome, report
from optimizers.ablation.ablate import CONFIGURATION
from optimizers.ablation.comparison import compare
from optimizers.ablation.report_page import comma_separated
from optimizers.ablation.report_tables import comparison_table

HERE = Path(__file__).parent
GRID = "grid"
SHOWN = (
    "validation-loss-against-steps",
    "training-loss-against-steps",
    "radius",
    "steps-to-where-adamw-ends",
)
WORKLOADS = (
    "digits",
    "fashion-mnist-logistic",
    "fashion-mnist",
    "fashion-mnist-2c2d",
    "mnist-autoencoder",
    "mnist-conv-autoencoder",
    "character-gpt",
)
LONGER = "character-gpt-longer"  # few cells of one workload with a larger budget
ORDER = (*WORKLOADS, LONGER)
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


def keep(runs: Sequence[Path], grid: Path | None = None) -> None:
    """Make runs the raw results.

    Args:
        runs: folders of parts, named as their configurations are, or of several of them.
        grid: the folder of the grid.
    """
    for folder in _folders(runs):
        if folder.name not in ORDER:
            raise SystemExit(
                f"{folder}: must be named as a configuration of the study, one of {', '.join(ORDER)}"
            )
        raw.pack(folder, HERE / "raw" / (folder.name + raw.SUFFIX))
    if grid is not None:
        raw.pack(grid, HERE / "raw" / (GRID + raw.SUFFIX))


def write(out: Path, only: Sequence[str] = (*ORDER, GRID)) -> None:
    """Write ``study.md`` and, beside it in ``study``, pictures, tables, and every run as a line of ``runs.csv``.

    Args:
        out: the folder of the page.
        only: which raw results to read; the rest keeps what is written already, as does one without.
    """
    here, page = out / HERE.name, out / f"{HERE.name}.md"
    (here / "figures").mkdir(parents=True, exist_ok=True)
    parts = _kept_parts(page)
    controls = {
        (line["workload"], line["cell"]): list(line.values()) for line in lines(here / "controls.csv")
    }
    # of parts that were run before raw results were kept
    runs: list[list[object]] = [
        [line.get(name, "") for name in RUN_COLUMNS]
        for line in lines(here / "runs.csv")
        if not (HERE / "raw" / (line["workload"] + raw.SUFFIX)).is_file()
    ]
    for name in (name for name in (*ORDER, GRID) if name in only):
        kept = HERE / "raw" / (name + raw.SUFFIX)
        if not kept.is_file():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = raw.unpack(kept, Path(scratch))
            report(folder)
            if name == GRID:
                shutil.copy(folder / "table.csv", here / "grid.csv")
                (heat_map,) = folder.glob("figures/*curvature-x-trust-region.png")
                shutil.copy(heat_map, here / "figures" / "grid.png")
            else:
                parts[name] = _workload(folder, here, name, controls)
            files = sorted(folder.glob("runs/*.json"))
            runs += [_line(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    _write_csv(here / "controls.csv", [CONTROLS, *controls.values()])
    _write_csv(here / "runs.csv", [RUN_COLUMNS, *runs])
    names = [name for name in ORDER if name in parts]
    text = "\n".join([*_together(here, names), *(parts[name] for name in names)])
    head = (HERE / "findings.txt").read_text(encoding="utf-8")
    page.write_text(re.sub(r"\n{3,}", "\n\n", head + "\n" + text).rstrip() + "\n", encoding="utf-8")


def _workload(folder: Path, here: Path, name: str, controls: dict[tuple[str, str], list[str]]) -> str:
    """Copy one workload's pictures and tables; return its part of the page."""
    outcome = read_outcome(folder)
    workload = outcome.ablation.workload
    for picture in (folder / "figures").glob(f"{workload}-*.png"):
        if picture.stem.endswith(SHOWN):
            shutil.copy(picture, here / "figures" / picture.name.replace(workload, name, 1))
    for written in folder.glob(f"{workload}-*.csv"):
        shutil.copy(written, here / written.name.replace(workload, name, 1))
    found = comparison_table(compare(outcome.best, REFERENCE, "train_loss"))
    (here / f"{name}-training.csv").write_text(comma_separated(found), encoding="utf-8")
    for key in [key for key in controls if key[0] == name]:
        del controls[key]
    for line in _controls(outcome.best):
        controls[name, line[0]] = [name, *line]
    return _part((folder / "report.md").read_text(encoding="utf-8"), workload, name)


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)


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


def _together(here: Path, names: Sequence[str]) -> list[str]:
    return [
        "## Against AdamW at a glance",
        STEPS_NOTE,
        *against(here, names, "steps", "comparisons"),
        "",
        "The same of the training loss, for every workload:",
        "",
        *against(here, names, "steps", "training"),
        "",
        "Processor time to where AdamW's run ends, over AdamW's own:",
        "",
        *against(here, names, "processor time", "comparisons"),
        "",
        "## Stability",
        STABILITY_NOTE,
        *stability(here, names),
        "",
        *_all_workloads(here, [name for name in names if name in WORKLOADS]),
    ]


def _all_workloads(here: Path, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    picture = "![Performance profile](study/figures/performance-profile.png)"
    return ["## All workloads", PROFILE_NOTE, *profile(here, names), "", picture, ""]


def _folders(runs: Sequence[Path]) -> list[Path]:
    places = [path for each in runs for path in [*each.glob(CONFIGURATION), *each.glob(f"*/{CONFIGURATION}")]]
    return sorted(path.parent for path in places)


def _kept_parts(page: Path) -> dict[str, str]:
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    named = {
        part.partition("\n")[0].removeprefix("## ").strip(): part
        for part in re.split(r"^(?=## )", text, flags=re.MULTILINE)
    }
    return {name: named[name] for name in ORDER if name in named}


def _part(text: str, workload: str, name: str) -> str:
    """One workload's part of a report, with the pictures that are shown here."""
    text = text[text.index(f"## {workload}\n") :].replace(f"## {workload}\n", f"## {name}\n", 1)
    return re.sub(
        rf"!\[[^\]]*\]\(figures/{workload}-([^)]*)\)(\n\n[^\n]*\n)?",
        lambda found: (
            found[0].replace(f"(figures/{workload}-", f"(study/figures/{name}-")
            if found[1].removesuffix(".png").endswith(SHOWN)
            else ""
        ),
        text,
    )


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="*", help="folders that soaa ablate wrote")
    parser.add_argument("--grid", type=Path, help="the folder of grid.toml's runs")
    asked = parser.parse_args()
    keep(asked.runs, asked.grid)
    write(HERE.parent)
