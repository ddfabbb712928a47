from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from optimizers.ablation import Ablation, AblationError, Cell, ablate
from optimizers.ablation.report import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    cells = (Cell("soaa", title="<script>alert(1)</script> & more"), Cell("torch-adamw"), Cell("torch-sgd"))
    ablate(Ablation(cells=cells, tune=3, extensions=0, seeds=2, steps=30, evaluations=3), folder)
    return report(folder)


def test_page_refers_to_nothing_outside_and_escapes_what_it_is_given(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", text)
    assert references
    for first, second in references:
        assert (first or second).strip("\"'").startswith(("#", "data:")), first or second
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert text.count("<svg") > 8


def test_markdown_tables_and_pictures_lie_beside_it(written: Path) -> None:
    text = (written.parent / "report.md").read_text(encoding="utf-8")
    for path in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text):
        assert (written.parent / path).read_bytes().startswith(b"\x89PNG")
    for name in ("cells", "comparisons", "tuning"):
        assert (written.parent / f"digits-{name}.csv").is_file()


def test_a_folder_without_results_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(AblationError, match="holds no results"):
        report(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_browser_draws_the_page_without_a_console_error(written: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--window-size=500,900", f"--user-data-dir={tmp_path / 'profile'}",
         f"--screenshot={picture}", written.as_uri()],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG"), done.stderr
    assert "CONSOLE" not in done.stderr
