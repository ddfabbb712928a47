"""A disk that fills up in the middle of an ablation: one error, finished runs intact, and the same call continues."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimizers.ablation import Ablation, AblationError, ablate

TUNED = Ablation(optimizers=("torch-adamw",), tune=3, extensions=0, seeds=2, steps=3, evaluations=1)
PLAIN = Ablation(optimizers=("torch-adamw",), learning_rates=(0.01, 0.003), seeds=2, steps=3, evaluations=1)


@pytest.mark.parametrize(("ablation", "runs"), [(PLAIN, 4), (TUNED, 5)], ids=["plain", "tuned"])
def test_a_disk_that_fills_up_after_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ablation: Ablation, runs: int
) -> None:
    out, replace, written = tmp_path / "out", os.replace, []

    def full_after_two(source: str, target: str) -> None:
        if Path(target).parent.name == "runs":
            if len(written) == 2:
                raise OSError(28, "No space left on device")
            written.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_after_two)
        with pytest.raises(AblationError, match=r"No space left on device.*finished runs are intact"):
            ablate(ablation, out)
    assert {str(path) for path in (out / "runs").iterdir()} == set(map(str, written))
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    outcome = ablate(ablation, out)
    assert outcome.complete
    assert len(list((out / "runs").glob("*.json"))) == runs
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if (
        mount is None
        or os.geteuid() != 0
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("no right to mount a file system here")
    yield folder
    # a database that could not be opened is still in the frames of the error: the folder goes when they do
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_real_full_disk_is_one_error_with_finished_runs_intact(small_disk: Path) -> None:
    more = Ablation(optimizers=("torch-adamw",), learning_rates=(0.01,), seeds=30, steps=3, evaluations=1)
    with pytest.raises(AblationError, match=r"No space left on device.*intact"):
        ablate(more, small_disk / "out")
    kept = sorted((small_disk / "out" / "runs").iterdir())
    assert 0 < len(kept) < 30
    assert all(path.suffix == ".json" and path.stat().st_size > 1000 for path in kept)
    (small_disk / "out" / "curves.png").unlink(missing_ok=True)


def test_a_database_on_a_real_full_disk_is_one_error_that_says_so(small_disk: Path) -> None:
    with pytest.raises(AblationError, match=r"study database.*full.*make room on its disk.*intact"):
        ablate(TUNED, small_disk / "out")
