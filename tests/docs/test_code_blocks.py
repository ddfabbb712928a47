"""Every Python block of the README and of the pages runs, block after block, in one namespace a page."""

from __future__ import annotations

import re
import runpy
from doctest import ELLIPSIS, IGNORE_EXCEPTION_DETAIL, NORMALIZE_WHITESPACE
from pathlib import Path

import pytest
import torch
from sybil import Document, Sybil
from sybil.parsers import myst, rest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ELLIPSIS | NORMALIZE_WHITESPACE | IGNORE_EXCEPTION_DETAIL
MARKDOWN = Sybil([myst.PythonCodeBlockParser(doctest_optionflags=FLAGS), myst.SkipParser()])
RESTRUCTURED = Sybil([rest.PythonCodeBlockParser(), rest.DocTestParser(optionflags=FLAGS), rest.SkipParser()])
OPENS_PYTHON = re.compile(
    r"^\s*(?:[`~:]{3,}\s*(?:python|py|pycon|\{code-block\} python)|\.\. code-block:: python)\b", re.MULTILINE
)


def pages() -> list[Path]:
    found = [
        path
        for pattern in ("*.md", "*.rst")
        for path in (ROOT / "docs").rglob(pattern)
        if "_build" not in path.parts
    ]
    return [ROOT / "README.md", *sorted(found)]


def parse(path: Path) -> Document:
    return (MARKDOWN if path.suffix == ".md" else RESTRUCTURED).parse(path)


def has_code(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return bool(OPENS_PYTHON.search(text) or ">>> " in text)


PAGES_WITH_CODE = [path for path in pages() if has_code(path)]


@pytest.mark.parametrize("path", PAGES_WITH_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = parse(path)
    examples = list(document.examples())
    text = path.read_text(encoding="utf-8")
    blocks = len(OPENS_PYTHON.findall(text))
    assert len(examples) >= blocks, "a block opens as Python, but the parser did not take it"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for example in examples:
            example.evaluate()


def test_readme_has_blocks_to_run() -> None:
    assert OPENS_PYTHON.search((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "examples").glob("*.py")), ids=lambda path: path.name
)
def test_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runpy.run_path(str(path), run_name="__main__")
    plt.close("all")
