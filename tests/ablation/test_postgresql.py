"""One study on PostgreSQL that several processes share, some of which are killed."""

from __future__ import annotations

import csv
import getpass
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optimizers.ablation import Ablation, AblationError, ablate
from optimizers.ablation.ledger import MAX_RETRIES, StudyLedger, unpack
from optimizers.ablation.results import COLUMNS
from optimizers.ablation.store import Store

pytest.importorskip("psycopg2")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.skipif(
        shutil.which("initdb") is None or shutil.which("pg_ctl") is None, reason="no PostgreSQL here"
    ),
]
ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable, "-m", "optimizers.ablation", "ablate", "-o", "torch-sgd,torch-adamw", "--lr", "0.01",
    "--seeds", "3", "--steps", "60", "--evaluations", "2",
]  # fmt: skip
ABLATION = Ablation(
    optimizers=("torch-sgd", "torch-adamw"), learning_rates=(0.01,), seeds=3, steps=60, evaluations=2
)


def _account() -> str:
    """The server refuses to run as root: then it runs as one of the accounts that every system has."""
    if os.geteuid() != 0:
        return getpass.getuser()
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    pytest.skip("no account that a server may run as")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server of its own, which ends with the tests."""
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="soaa-postgresql-"))  # a short path: a socket's may have 107 bytes
    data = folder / "data"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    switch = {"user": account, "cwd": folder} if os.geteuid() == 0 else {"cwd": folder}
    if os.geteuid() == 0:
        shutil.chown(folder, account)

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **switch)  # type: ignore[call-overload]
        if done.returncode:
            pytest.fail(f"{command[0]}: {done.stdout}{done.stderr}")

    run("initdb", "-D", str(data), "-A", "trust", "-U", "soaa", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run("pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-o", options, "-w", "start")
    try:
        yield f"postgresql+psycopg2://soaa@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def _start(out: Path, url: str, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), "--storage", url, *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=out.parent, env=environment,
    )  # fmt: skip


def _children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def _table(out: Path) -> list[dict[str, str]]:
    clock = {name for name, depends in COLUMNS if depends}
    with open(out / "table.csv", encoding="utf-8", newline="") as stream:
        return [{k: v for k, v in row.items() if k not in clock} for row in csv.DictReader(stream)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds worker processes through /proc")
def test_killed_workers_and_machines_leave_a_study_in_which_nothing_is_counted_twice(
    tmp_path: Path, server: str
) -> None:
    """Three machines: one is killed with its run, one loses a worker process, and two end with the whole table."""
    alone = ablate(ABLATION, tmp_path / "alone")
    name, keys = f"soaa/{ABLATION.workload}", sorted(run.key for run in ABLATION.runs())
    # the first makes one run, has claimed a second, and is killed
    code = (
        "import json, os, sys; from pathlib import Path; from optimizers.ablation import RunConfig;"
        "from optimizers.ablation.ledger import StudyLedger; from optimizers.ablation.store import Store;"
        "from optimizers.ablation.run import train;"
        "runs = [RunConfig.from_dict(run) for run in json.loads(sys.argv[4])]; store = Store(Path(sys.argv[3]));"
        "ledger = StudyLedger(sys.argv[1], sys.argv[2], store, runs); run = ledger.claim();"
        "store.save(run.key, train(run)); ledger.done(run); assert ledger.claim(); os.kill(os.getpid(), 9)"
    )
    wanted = json.dumps([run.as_dict() for run in ABLATION.runs()])
    arguments = [sys.executable, "-c", code, server, name, str(tmp_path / "dead"), wanted]
    assert subprocess.run(arguments, cwd=ROOT, check=False).returncode == -signal.SIGKILL

    def trials(*states: TrialState) -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(study_name=name, storage=server).get_trials(states=states or None)

    assert len(trials(TrialState.COMPLETE)) == 1
    (claimed,) = trials(TrialState.RUNNING)
    deadline = time.monotonic() + 60
    first, second = _start(tmp_path / "first", server, "--workers", "2"), _start(tmp_path / "second", server)
    while not _children(first.pid) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(_children(first.pid)[0], signal.SIGKILL)
    for process in (first, second):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output

    done = trials(TrialState.COMPLETE)
    assert sorted(trial.user_attrs["key"] for trial in done) == keys  # every run once, and none twice
    assert set(Counter(trial.user_attrs["key"] for trial in done).values()) == {1}
    assert not trials(TrialState.RUNNING, TrialState.WAITING)
    assert [trial.number for trial in trials(TrialState.FAIL)] == [claimed.number]
    assert [t.user_attrs["key"] for t in done if t.user_attrs.get("retry_of") == claimed.number] == [
        claimed.user_attrs["key"]
    ]
    for trial in done:
        record = unpack(trial)
        assert record is not None
        assert record["key"] == trial.user_attrs["key"]
    for out in ("first", "second"):
        assert _table(tmp_path / out) == _table(alone.folder)
        assert Store(tmp_path / out).keys() == keys


def test_a_run_whose_process_dies_each_time_is_given_up_after_the_last_retry(
    tmp_path: Path, server: str
) -> None:
    runs = Ablation(optimizers=("torch-sgd",), learning_rates=(0.01,), seeds=1, steps=4).runs()
    for _ in range(MAX_RETRIES + 1):
        process = os.fork()
        if process == 0:  # dies with the run that it has claimed
            try:
                assert StudyLedger(server, "deadly", Store(tmp_path), runs).claim()
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    with pytest.raises(AblationError, match=rf"torch-sgd.*lost its process {MAX_RETRIES + 1} times.*intact"):
        StudyLedger(server, "deadly", Store(tmp_path), runs)
    states = [trial.state for trial in optuna.load_study(study_name="deadly", storage=server).trials]
    assert states == [TrialState.FAIL] * (MAX_RETRIES + 1)


def test_a_server_that_is_not_there_is_one_error_without_the_password(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"postgresql+psycopg2://me:secret@127.0.0.1:{port}/x"
    with pytest.raises(AblationError, match=r"study database postgresql.*refused.*intact") as caught:
        StudyLedger(address, "s", Store(tmp_path), ABLATION.runs())
    assert "secret" not in str(caught.value)
