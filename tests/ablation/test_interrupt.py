"""An ablation that is interrupted by a real signal and continued gives the table of one that was not."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optimizers.ablation import Ablation, RunConfig, ablate
from optimizers.ablation.results import COLUMNS
from tests.ablation.processes import HAS_PROC, ROOT, children, ended, forked, soaa, until

ABLATION = Ablation(
    optimizers=("torch-sgd", "torch-adamw"), learning_rates=(0.003, 0.01), seeds=2, steps=100, evaluations=3
)
RUNS = 8
WORDS = [
    "ablate", "-o", "torch-sgd,torch-adamw", "--lr", "0.003,0.01", "--seeds", "2", "--steps", "100",
    "--evaluations", "3", "--out", "out",
]  # fmt: skip
needs_proc = pytest.mark.skipif(not HAS_PROC, reason="finds worker processes through /proc")


def _files(out: Path) -> list[Path]:
    return sorted((out / "runs").glob("*.json"))


def _table(out: Path) -> list[dict[str, str]]:
    clock = {name for name, depends in COLUMNS if depends}
    with open(out / "table.csv", encoding="utf-8", newline="") as stream:
        return [{k: v for k, v in row.items() if k not in clock} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ablate(ABLATION, tmp_path_factory.mktemp("whole") / "out").folder


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_interrupted_and_continued_gives_the_same_table(
    tmp_path: Path, uninterrupted: Path, kind: int
) -> None:
    out = tmp_path / "out"
    with soaa(WORDS, tmp_path) as process:
        assert until(lambda: len(_files(out)) >= 3 or process.poll() is not None, 120)
        process.send_signal(kind)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    assert ("continues" in errors) == (kind == signal.SIGINT)
    before = {path.name: path.stat().st_mtime_ns for path in _files(out)}
    assert 3 <= len(before) < RUNS
    assert not (out / "table.csv").exists()

    ablate(ABLATION, out)  # what the same command does
    assert {path.name: path.stat().st_mtime_ns for path in _files(out) if path.name in before} == before
    assert [path.name for path in _files(out)] == [path.name for path in _files(uninterrupted)]
    assert _table(out) == _table(uninterrupted)
    assert list(out.rglob("*.tmp")) == []


@needs_proc
def test_killed_workers_are_replaced_and_nothing_is_counted_twice(
    tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "out"
    process = forked(lambda: ablate(Ablation(**{**vars(ABLATION), "workers": 2}), out))
    killed: set[int] = set()
    for _ in range(2):  # the first while it starts, the second when there are results
        assert until(lambda: set(children(process)) - killed)
        victim = max(set(children(process)) - killed)
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
        assert until(lambda: _files(out))
    assert ended(process) == 0
    assert len(killed) == 2
    assert [path.name for path in _files(out)] == [path.name for path in _files(uninterrupted)]
    assert _table(out) == _table(uninterrupted)


@needs_proc
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    endless = Ablation(**{**vars(ABLATION), "workers": 2, "steps": 10**6, "evaluations": 10**5})
    seen = tmp_path / "seen"
    seen.mkdir()

    def note(run: RunConfig, step: int) -> None:
        if step:
            (seen / run.key).touch()

    started: list[int] = []
    process = forked(lambda: ablate(endless, out, note))
    try:
        assert until(lambda: len(list(seen.iterdir())) == 2, 120)  # both train
        started = children(process)
        assert len(started) == 2
    finally:
        os.kill(process, signal.SIGKILL)
        ended(process)
    assert until(lambda: not any(_alive(child) for child in started), 30)


def test_a_worker_whose_parent_died_before_it_looked_makes_no_run(tmp_path: Path) -> None:
    """Its first run and the end of its input are there at once; it must not train on alone."""
    run = RunConfig.from_dict({**ABLATION.runs()[0].as_dict(), "steps": 10**6})
    done = subprocess.run(
        [sys.executable, "-m", "optimizers.ablation.worker", str(tmp_path)],
        input=json.dumps(run.as_dict()).encode() + b"\n", capture_output=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert _files(tmp_path) == []


def _alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
