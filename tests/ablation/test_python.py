"""What the reference says one can write in a notebook is run as it is written there."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "ablation.rst"


def _block() -> str:
    after = PAGE.read_text(encoding="utf-8").partition("in a notebook too")[2].partition("::\n")[2]
    lines = []
    for line in after.splitlines():
        if line and not line.startswith("   "):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines)).strip()


def test_the_five_lines_of_the_reference_run_and_show_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = _block()
    assert len([line for line in code.splitlines() if line and not line.startswith("from ")]) <= 5
    # as written, but for the length of a run
    short = code.replace("seeds=3", "seeds=1, steps=20, evaluations=2")
    assert short != code
    *lines, last = short.splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    outcome = eval(last, names)
    shown = outcome._repr_markdown_()
    assert shown in repr(outcome)  # what a terminal shows, and a notebook keeps beside the other
    assert len(repr(outcome)) < len(shown) + 200
    assert shown.startswith("| cell | lr |")
    assert "| soaa |" in shown
    assert "| torch-adamw |" in shown
    assert (tmp_path / "results" / "report.html").stat().st_size > 10_000
