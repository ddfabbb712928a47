"""Write the page of the study, its tables and its pictures, from the raw results: python docs/results/study/page.py.

With folders of runs, ``python docs/results/study/page.py RUNS... [--grid GRID]``, their runs become the raw results
first.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import raw
from glance import REFERENCE, against, as_table, at_equal_rates, lines, profile, stability

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
CLAIM = (
    "digits-1000",
    "fashion-mnist-logistic-1000",
    "fashion-mnist-1000",
)  # the paper's claim with a larger one
ORDER = (*WORKLOADS, LONGER, *CLAIM)
# AdamW at learning rates that a part's search left out
BETWEEN = {"fashion-mnist-logistic-1000": "fashion-mnist-logistic-rates"}
KEPT = (*ORDER, *BETWEEN.values())
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
        if folder.name not in KEPT:
            raise SystemExit(
                f"{folder}: must be named as a configuration of the study, one of {', '.join(KEPT)}"
            )
        raw.pack(folder, HERE / "raw" / (folder.name + raw.SUFFIX))
    if grid is not None:
        raw.pack(grid, HERE / "raw" / (GRID + raw.SUFFIX))


def write(out: Path, only: Sequence[str] = (*KEPT, GRID)) -> None:
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
    runs = [_line(run) for name in (*KEPT, GRID) for run in raw.runs(HERE / "raw" / (name + raw.SUFFIX))]
    for name in (name for name in (*KEPT, GRID) if name in only):
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
            elif name in ORDER:
                parts[name] = _workload(folder, here, name, controls)
    ordered = sorted(controls.values(), key=lambda line: ORDER.index(line[0]))
    _write_csv(here / "controls.csv", [CONTROLS, *ordered])
    _write_csv(here / "runs.csv", [RUN_COLUMNS, *runs])
    for name in (name for name in BETWEEN.values() if name in only):
        _between(here, name)
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


def _between(here: Path, name: str) -> None:
    """Write the table of a part that has learning rates of its own: SOAA against AdamW at each."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = read_outcome(raw.unpack(HERE / "raw" / (name + raw.SUFFIX), Path(scratch))).rows
    (here / f"{name}.csv").write_text(
        comma_separated(at_equal_rates(rows, "SOAA", REFERENCE)), encoding="utf-8"
    )


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


CLAIM_NOTE = """
Few cells, at a larger budget; ten seeds on the digits, five elsewhere. Bold where the interval excludes equality.
"""
CLAIM_TABLES = {
    ("loss at equal steps", "comparisons"): "Final validation loss less AdamW's, mean difference:",
    ("loss at equal steps", "training"): "Final training loss less AdamW's:",
    ("steps", "comparisons"): "Steps to the validation loss at which AdamW ends, over AdamW's own:",
    ("steps", "training"): "The same of the training loss:",
}
RATES_NOTE = """
The same two at equal learning rates on logistic regression, between those that the searches tried, after 1,000 steps
and over the same five seeds. These were run after the result above was seen.
"""


def _claim(here: Path, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    text = ["## The paper's claim at 1,000 steps", CLAIM_NOTE]
    for (axis, kind), title in CLAIM_TABLES.items():
        text += [title, "", *against(here, names, axis, kind), ""]
    rates = [here / f"{BETWEEN[name]}.csv" for name in names if name in BETWEEN]
    for path in (path for path in rates if path.is_file()):
        text += [RATES_NOTE, *as_table(lines(path)), ""]
    return text


def _together(here: Path, together: Sequence[str]) -> list[str]:
    names = [name for name in together if name not in CLAIM]
    return [
        *_claim(here, [name for name in together if name in CLAIM]),
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
        *stability(here, together),
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
