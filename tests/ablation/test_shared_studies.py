"""One study on a database server that several machines share, some of which are killed."""

from __future__ import annotations

import csv
import dataclasses
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optimizers.ablation import Ablation, AblationError, ablate
from optimizers.ablation.ledger import MAX_RETRIES, StudyLedger, unpack
from optimizers.ablation.results import COLUMNS
from optimizers.ablation.run import train
from optimizers.ablation.store import Store
from tests.ablation.processes import HAS_PROC, children, ended, forked, until
from tests.ablation.servers import SERVERS, free_port

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
ABLATION = Ablation(
    optimizers=("torch-sgd", "torch-adamw"), learning_rates=(0.01,), seeds=3, steps=20, evaluations=2
)
NAME = f"soaa/{ABLATION.workload}"


@pytest.fixture(scope="module", params=sorted(SERVERS))
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    with SERVERS[request.param]() as address:
        yield address


def _table(out: Path) -> list[dict[str, str]]:
    clock = {name for name, depends in COLUMNS if depends}
    with open(out / "table.csv", encoding="utf-8", newline="") as stream:
        return [{k: v for k, v in row.items() if k not in clock} for row in csv.DictReader(stream)]


def _trials(server: str, name: str, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=server).get_trials(states=states or None)


def _machine(server: str, out: Path, workers: int = 1) -> int:
    shared = dataclasses.replace(ABLATION, storage=server, workers=workers)
    return forked(lambda: ablate(shared, out))


@pytest.mark.skipif(not HAS_PROC, reason="finds worker processes through /proc")
def test_killed_workers_and_machines_leave_a_study_in_which_nothing_is_counted_twice(
    tmp_path: Path, server: str
) -> None:
    """Three machines: one is killed with its run, one loses a worker process, and two end with the whole table."""
    alone = ablate(ABLATION, tmp_path / "alone")
    runs, keys = ABLATION.runs(), sorted(run.key for run in ABLATION.runs())

    def dies_with_its_second_run() -> None:
        store = Store(tmp_path / "dead")
        ledger = StudyLedger(server, NAME, store, runs)
        made = ledger.claim()
        assert made is not None
        store.save(made.key, train(made))
        ledger.done(made)
        assert ledger.claim() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(dies_with_its_second_run)) == -signal.SIGKILL
    assert len(_trials(server, NAME, TrialState.COMPLETE)) == 1
    (claimed,) = _trials(server, NAME, TrialState.RUNNING)
    # worker processes read no database: on one server is enough
    loses_a_worker = server.startswith("postgresql")
    first = _machine(server, tmp_path / "first", 2 if loses_a_worker else 1)
    if loses_a_worker:
        assert until(lambda: children(first))
        os.kill(children(first)[0], signal.SIGKILL)
    second = _machine(server, tmp_path / "second")
    assert (ended(first), ended(second)) == (0, 0)

    done = _trials(server, NAME, TrialState.COMPLETE)
    assert sorted(trial.user_attrs["key"] for trial in done) == keys  # every run once, and none twice
    assert set(Counter(trial.user_attrs["key"] for trial in done).values()) == {1}
    assert not _trials(server, NAME, TrialState.RUNNING, TrialState.WAITING)
    assert [trial.number for trial in _trials(server, NAME, TrialState.FAIL)] == [claimed.number]
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

    def dies() -> None:
        assert StudyLedger(server, "deadly", Store(tmp_path), runs).claim()
        os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(MAX_RETRIES + 1):
        assert ended(forked(dies)) == -signal.SIGKILL
    with pytest.raises(AblationError, match=rf"torch-sgd.*lost its process {MAX_RETRIES + 1} times.*intact"):
        StudyLedger(server, "deadly", Store(tmp_path), runs)
    states = [trial.state for trial in optuna.load_study(study_name="deadly", storage=server).trials]
    assert states == [TrialState.FAIL] * (MAX_RETRIES + 1)


def test_a_record_longer_than_a_column_reaches_the_other_machine_whole(tmp_path: Path, server: str) -> None:
    """A text column of MySQL takes 64 KiB; a long run's radius alone may have more."""
    (run,) = Ablation(optimizers=("torch-sgd",), learning_rates=(0.01,), seeds=1, steps=4).runs()
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    record = {
        "key": run.key, "status": "done", "result": {"validation_loss": 0.5},
        "trace": {"radius": [random.Random(i).random() for i in range(20_000)]},
    }  # fmt: skip
    ledger = StudyLedger(server, "long", here, [run])
    assert ledger.claim() == run
    here.save(run.key, record)
    ledger.done(run)
    ledger.close()
    other = StudyLedger(server, "long", there, [run])
    assert other.claim() is None
    other.close()
    assert there.load(run.key) == record


@pytest.mark.parametrize("kind", ["postgresql+psycopg2", "mysql+pymysql"])
def test_a_server_that_is_not_there_is_one_error_without_the_password(tmp_path: Path, kind: str) -> None:
    pytest.importorskip(kind.partition("+")[2])
    address = f"{kind}://me:secret@127.0.0.1:{free_port()}/x"
    with pytest.raises(AblationError, match=r"study database (postgresql|mysql).*refused.*intact") as caught:
        StudyLedger(address, "s", Store(tmp_path), ABLATION.runs())
    assert "secret" not in str(caught.value)
