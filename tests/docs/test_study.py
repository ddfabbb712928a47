"""The study's page is what its raw results say; what its findings say of them is true."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from optimizers.ablation import Ablation, RunConfig, ablate, read_outcome

STUDY = Path(__file__).parents[2] / "docs" / "results" / "study"
PART = "character-gpt-longer"
RATES = "fashion-mnist-logistic-rates"  # a part that has a table alone


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    """The script beside the page, which imports its neighbours by name."""
    sys.path.insert(0, str(STUDY))
    import page

    yield page
    sys.path.remove(str(STUDY))


def test_raw_results_give_the_tables_that_the_runs_gave(page: ModuleType, tmp_path: Path) -> None:
    few = Ablation(optimizers=("torch-sgd",), learning_rates=(0.123456789,), seeds=1, steps=2, evaluations=1)
    found = ablate(few, tmp_path / "runs")
    page.raw.pack(found.folder, tmp_path / "kept.jsonl.xz")
    again = read_outcome(page.raw.unpack(tmp_path / "kept.jsonl.xz", tmp_path / "again"))
    assert again.complete
    asked: list[RunConfig] = []
    assert again.table() == found.table()
    ablate(few, again.folder, on_start=lambda runs, steps: asked.extend(runs))  # it can be gone on with
    assert {path.name for path in (again.folder / "runs").iterdir()} == {f"{run.key}.json" for run in asked}


def test_page_and_tables_are_what_the_raw_results_say(page: ModuleType, tmp_path: Path) -> None:
    page.write(tmp_path, only=[PART, RATES])
    remedy = "run python docs/results/study/page.py, and read the findings again"
    written = sorted(path.name for path in (tmp_path / "study").glob(f"{PART}-*.csv"))
    assert len(written) == 4
    for name in written:
        assert (tmp_path / "study" / name).read_text() == (STUDY / name).read_text(), remedy
    part = (tmp_path / "study.md").read_text(encoding="utf-8").partition(f"\n## {PART}\n")[2]
    assert len(part) > 1000
    assert part.strip() in STUDY.with_suffix(".md").read_text(encoding="utf-8"), remedy
    pictures = {path.name for path in (tmp_path / "study" / "figures").glob(f"{PART}-*.png")}
    assert pictures <= {path.name for path in (STUDY / "figures").iterdir()}
    assert all(f"figures/{name}" in part for name in pictures)
    for name in ("runs.csv", f"{RATES}.csv"):
        assert (tmp_path / "study" / name).read_text() == (STUDY / name).read_text(), remedy
