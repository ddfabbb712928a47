"""The README's commands, links and table stay true."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import optimizers
from tests.docs.tables import readme_figures, readme_with_figures

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def marked_command(name: str) -> str:
    block = rf"^<!-- ci:{name} -->\n```\w*\n(.*?)^```\n<!-- ci:end -->$"
    match = re.search(block, README, re.DOTALL | re.MULTILINE)
    assert match, f"README.md has no command marked ci:{name}"
    return match[1]


@pytest.mark.parametrize("name", ["ablate", "tests"])
def test_command_is_a_complete_set_up_with_the_tested_versions(name: str) -> None:
    command = marked_command(name)
    assert "python3 -m venv" in command
    installs = re.findall(r"pip install [^&\n]*", command)
    assert installs
    assert all("-c constraints.txt" in install for install in installs)


def test_commands_do_what_they_are_marked_as() -> None:
    assert re.search(r"bin/soaa ablate\s*$", marked_command("ablate"))
    assert re.search(r"bin/pytest -n 2\s*$", marked_command("tests"))


def test_ci_script_reads_exactly_these_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = re.search(r"^readme_command\(\) \{.*?^\}", script, re.DOTALL | re.MULTILINE)
    assert function
    for name in ("ablate", "tests"):
        shell = f"root={ROOT}\n{function[0]}\nreadme_command {name}"
        printed = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
        assert printed == marked_command(name).removeprefix("$ ")


def test_relative_links_resolve() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    targets += re.findall(r'(?:src|srcset|href)="([^"#]+)"', README)
    local = [target for target in targets if "://" not in target]
    assert local
    assert not [target for target in local if not (ROOT / target).exists()]


def test_table_of_presets_lists_what_is_available() -> None:
    section = README.split("<!-- presets -->")[1].split("<!-- presets end -->")[0]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert listed
    assert not [name for name in sorted(listed) if not hasattr(optimizers, name)]
    rows = {name.lower() for name in listed}
    unlisted = [name for name in optimizers.available()["optimizers"] if name.replace("-", "") not in rows]
    assert not unlisted, f"add these presets to the README's table: {unlisted}"


def test_figures_are_those_of_the_benchmark() -> None:
    remedy = "run python -m tests.docs.tables"
    assert readme_with_figures(README) == README, remedy
    assert len(re.findall(r"\d\.\d\d", readme_figures())) >= 12


def test_no_measured_figure_stands_outside_of_the_generated_table() -> None:
    prose = README.replace(readme_figures(), "")
    prose = re.sub(r"^```.*?^```", "", prose, flags=re.DOTALL | re.MULTILINE)  # code
    prose = re.sub(r"arXiv[: ]\d{4}\.\d{5}|version \d\.\d|Python \d\.\d+|abs/\d{4}\.\d{5}", "", prose)
    assert not re.findall(r"\d+\.\d+|\d+ ?%|\d+x\b", prose)
