"""The table of PyTorch's checks (``docs/reference/pytorch_suite.md``) names tests that exist, and all of those here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/reference/pytorch_suite.md"
FOLDER = Path(__file__).parent


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


def rows() -> list[tuple[str, str]]:
    lines = [
        x for x in PAGE.read_text().split("## Flags")[0].splitlines() if x.startswith("| ") and "test" in x
    ]
    return [(cells[1], cells[2]) for cells in (x.split("|") for x in lines)]


def named(text: str) -> set[str]:
    return set(re.findall(r"`(test_\w+)`", text))


def test_every_answer_exists() -> None:
    every = {name for path in (ROOT / "tests/optimizers").rglob("test_*.py") for name in names_in(path)}
    answers = {name for _, here in rows() for name in named(here)}
    assert len(answers) > 30
    assert answers <= every, answers - every


def test_every_check_has_an_answer() -> None:
    """A test, or a reason: needs hardware, is refused, is about PyTorch itself."""
    found = rows()
    assert len({name for check, _ in found for name in named(check)}) >= 46
    for check, here in found:
        reason = re.search(r"refused|need|about PyTorch|measured", here)
        assert named(here) or reason, check


def test_every_test_of_the_suite_is_on_the_page() -> None:
    own = {name for path in FOLDER.glob("test_pytorch_*.py") for name in names_in(path)}
    assert own <= named(PAGE.read_text()), own - named(PAGE.read_text())
