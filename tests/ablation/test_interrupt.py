"""An ablation that is interrupted by a real signal and continued gives the table of one that was not."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimizers.ablation.results import COLUMNS

ROOT = Path(__file__).parents[2]
RUNS = 8
COMMAND = [
    sys.executable, "-m", "optimizers.ablation", "ablate", "-o", "torch-sgd,torch-adamw", "--lr", "0.003,0.01",
    "--seeds", "2", "--steps", "300", "--evaluations", "3",
]  # fmt: skip


def _start(out: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=out.parent,
        env=environment,
        # A job that a shell started in the background ignores SIGINT, and so would all its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _finish(out: Path, *more: str) -> None:
    with _start(out, *more) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors


def _files(out: Path) -> list[Path]:
    return sorted((out / "runs").glob("*.json"))


def _wait_for(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(_files(out)) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def _table(out: Path) -> list[dict[str, str]]:
    clock = {name for name, depends in COLUMNS if depends}
    with open(out / "table.csv", encoding="utf-8", newline="") as stream:
        return [{k: v for k, v in row.items() if k not in clock} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    _finish(out)
    return out


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_interrupted_and_continued_gives_the_same_table(
    tmp_path: Path, uninterrupted: Path, kind: int
) -> None:
    out = tmp_path / "out"
    with _start(out) as process:
        _wait_for(out, 3, process)
        process.send_signal(kind)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    assert ("continues" in errors) == (kind == signal.SIGINT)
    before = {path.name: path.stat().st_mtime_ns for path in _files(out)}
    assert 3 <= len(before) < RUNS
    assert not (out / "table.csv").exists()

    _finish(out)
    assert {path.name: path.stat().st_mtime_ns for path in _files(out) if path.name in before} == before
    assert [path.name for path in _files(out)] == [path.name for path in _files(uninterrupted)]
    assert _table(out) == _table(uninterrupted)
    assert list(out.rglob("*.tmp")) == []


def _children(process: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds worker processes through /proc")
def test_killed_workers_are_replaced_and_nothing_is_counted_twice(
    tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "out"
    killed = 0
    with _start(out, "--workers", "2") as process:
        _wait_for(out, 1, process)
        for _ in range(2):
            children = _children(process)
            if children:
                os.kill(children[-1], signal.SIGKILL)
                killed += 1
            time.sleep(0.3)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    assert killed == 2
    assert [path.name for path in _files(out)] == [path.name for path in _files(uninterrupted)]
    assert _table(out) == _table(uninterrupted)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds worker processes through /proc")
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _start(out, "--workers", "2", "--steps", "100000") as process:
        deadline = time.monotonic() + 30
        while len(_children(process)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(3)  # until they train
        children = _children(process)
        assert len(children) == 2
        process.kill()
        process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(child) for child in children)


def _alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except OSError:
        return False
