from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optimizers.ablation import Ablation, AblationError, RunConfig, ablate
from optimizers.ablation.executor import execute
from optimizers.ablation.ledger import StudyLedger, again, packed, requeue
from optimizers.ablation.store import Store

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
ABLATION = Ablation(
    optimizers=("torch-sgd", "torch-adamw"), learning_rates=(0.01,), seeds=2, steps=4, evaluations=1
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def pair(tmp_path: Path, url: str) -> Iterator[tuple[StudyLedger, StudyLedger]]:
    """Two machines: each with its own results folder, on one database."""
    runs = ABLATION.runs()
    ledgers = [StudyLedger(url, "s", Store(tmp_path / name), runs) for name in ("a", "b")]
    yield ledgers[0], ledgers[1]
    for ledger in ledgers:
        ledger.close()


def _trials(url: str, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="s", storage=url).get_trials(states=states or None)


def _make(ledger: StudyLedger, config: RunConfig) -> None:
    from optimizers.ablation.run import train

    ledger.store.save(config.key, train(config))
    ledger.done(config)


def test_every_run_is_claimed_once_and_its_record_reaches_both_machines(
    pair: tuple[StudyLedger, StudyLedger], url: str
) -> None:
    first, second = pair
    # all are claimed before any is made: a run that is being made is nobody else's
    pairs = [(ledger, ledger.claim()) for ledger in (first, second, second, first)]
    claimed = []
    for ledger, config in pairs:
        assert config is not None
        claimed.append(config.key)
        _make(ledger, config)
    assert sorted(claimed) == sorted(run.key for run in ABLATION.runs())
    assert first.claim() is None
    assert second.claim() is None
    assert first.store.keys() == second.store.keys() == sorted(claimed)
    assert all(first.store.load(key) == second.store.load(key) for key in claimed)
    assert [trial.state for trial in _trials(url)] == [TrialState.COMPLETE] * 4


def test_run_of_a_process_that_died_is_queued_again_and_counted_once(tmp_path: Path, url: str) -> None:
    code = (
        "import os, sys; from pathlib import Path; from optimizers.ablation import Ablation;"
        "from optimizers.ablation.ledger import StudyLedger; from optimizers.ablation.store import Store;"
        "runs = Ablation(optimizers=('torch-sgd', 'torch-adamw'), learning_rates=(0.01,), seeds=2, steps=4,"
        "evaluations=1).runs();"
        "ledger = StudyLedger(sys.argv[1], 's', Store(Path(sys.argv[2])), runs);"
        "ledger.claim(); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, url, str(tmp_path / "dead")], cwd=root, check=False)
    assert done.returncode == -9
    assert len(_trials(url, TrialState.RUNNING)) == 1
    store = Store(tmp_path / "alive")
    ledger = StudyLedger(url, "s", store, ABLATION.runs())
    execute(ABLATION.runs(), store, ledger=ledger)
    ledger.close()
    assert store.keys() == sorted(run.key for run in ABLATION.runs())
    assert len(_trials(url, TrialState.COMPLETE)) == 4
    assert len(_trials(url, TrialState.FAIL)) == 1
    assert len(_trials(url)) == 5


def test_a_second_trial_of_a_finished_run_is_neither_made_nor_counted(tmp_path: Path, url: str) -> None:
    """A process that was taken for dead ends its run after all: then the run's trial waits a second time."""
    runs, store = ABLATION.runs(), Store(tmp_path / "a")
    ledger = StudyLedger(url, "s", store, runs)
    first = ledger.claim()
    assert first is not None
    _make(ledger, first)
    (finished,) = _trials(url, TrialState.COMPLETE)
    optuna.load_study(study_name="s", storage=url).add_trial(again(finished, 1))
    others = [ledger.claim() for _ in range(3)]  # all that is left is claimed, but for the second trial
    assert ledger._ask() is None
    for config in others:
        assert config is not None
        _make(ledger, config)
    assert ledger.claim() is None
    ledger.close()
    assert sorted(config.key for config in [first, *others] if config) == sorted(run.key for run in runs)
    states = [trial.state for trial in _trials(url)]
    assert states == [TrialState.COMPLETE] * 4 + [TrialState.PRUNED]


def _given_away(url: str, key: str) -> None:
    """What another process does that takes the one which has this run for dead."""
    study = optuna.load_study(study_name="s", storage=url)
    (trial,) = [t for t in _trials(url, TrialState.RUNNING) if t.user_attrs["key"] == key]
    study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    requeue(study, trial)


def _marked(ledger: StudyLedger, config: RunConfig, by: str) -> None:
    record = {"key": config.key, "by": by, "result": {"validation_loss": 1.0}}
    ledger.store.save(config.key, record)
    ledger.done(config)


@pytest.mark.parametrize("order", ["late first", "late last", "late before the next has begun"])
def test_run_of_a_process_that_was_taken_for_dead_and_ends_it_counts_once(
    pair: tuple[StudyLedger, StudyLedger], url: str, order: str
) -> None:
    late, other = pair
    config = late.claim()
    assert config is not None
    _given_away(url, config.key)
    rest = [other.claim() for _ in range(3)]
    if order != "late before the next has begun":
        assert other.claim() == config
    ends = [(late, "late"), (other, "other")][:: -1 if order == "late last" else 1]
    for ledger, name in ends[:1] if "before" in order else ends:
        _marked(ledger, config, name)
    if "before" in order:
        assert other._ask() is None  # the run that waits is finished: nobody makes it again
    late.pull()
    other.pull()
    by = "other" if order == "late last" else "late"
    assert late.store.load(config.key)["by"] == other.store.load(config.key)["by"] == by
    complete = [trial for trial in _trials(url, TrialState.COMPLETE) if trial.user_attrs["key"] == config.key]
    assert len(complete) == 1
    assert len([run for run in rest if run]) == 3


def test_of_two_trials_that_ended_in_one_moment_every_machine_counts_the_lowest_numbered(
    pair: tuple[StudyLedger, StudyLedger], url: str
) -> None:
    first, second = pair
    config = first.claim()
    assert config is not None
    _given_away(url, config.key)
    (again_waiting,) = [t for t in _trials(url, TrialState.WAITING) if t.user_attrs["key"] == config.key]
    study = optuna.load_study(study_name="s", storage=url)
    record = {"key": config.key, "by": "lower", "result": {"validation_loss": 1.0}}
    _marked(first, config, "higher")
    second.pull()
    assert second.store.load(config.key)["by"] == "higher"
    attributes, state, values = packed(record)  # as a process does that looked before the other had ended
    for name, value in attributes.items():
        study._storage.set_trial_user_attr(again_waiting._trial_id, name, value)
    study._storage.set_trial_state_values(again_waiting._trial_id, state, values)
    for ledger in pair:
        ledger.pull()
        assert ledger.store.load(config.key)["by"] == "lower"


def test_run_that_two_processes_queue_again_is_made_by_one(
    pair: tuple[StudyLedger, StudyLedger], url: str
) -> None:
    first, second = pair
    config = first.claim()
    assert config is not None
    _given_away(url, config.key)
    (dead,) = _trials(url, TrialState.FAIL)
    requeue(optuna.load_study(study_name="s", storage=url), dead)
    claimed = [second._ask() for _ in range(4)]
    assert sorted(run.key for run in claimed if run) == sorted(run.key for run in ABLATION.runs())
    assert second._ask() is None
    assert not _trials(url, TrialState.WAITING)


def test_run_whose_process_died_before_it_could_say_so_is_told_from_the_disk(
    tmp_path: Path, url: str
) -> None:
    runs = ABLATION.runs()[:1]
    store = Store(tmp_path / "a")
    store.save(runs[0].key, {"key": runs[0].key, "result": {"validation_loss": 1.0}})
    other = StudyLedger(url, "s", Store(tmp_path / "b"), runs)  # queues it
    ledger = StudyLedger(url, "s", store, runs)
    assert ledger._ask() is None
    assert other.claim() is None
    assert other.store.load(runs[0].key) == store.load(runs[0].key)
    ledger.close()
    other.close()


def test_an_interrupt_gives_the_run_back_and_uses_up_no_retry(tmp_path: Path, url: str) -> None:
    runs = ABLATION.runs()
    for number in range(6):  # more often than a run is retried
        ledger = StudyLedger(url, "s", Store(tmp_path / "a"), runs)
        claimed = ledger.claim()
        assert claimed is not None
        ledger.close()
        waiting = _trials(url, TrialState.WAITING)
        assert len(waiting) == 4
        assert not any(trial.user_attrs.get("retries") for trial in waiting)
        assert len(_trials(url, TrialState.FAIL)) == number + 1
        assert not _trials(url, TrialState.RUNNING)
    store = Store(tmp_path / "a")
    ledger = StudyLedger(url, "s", store, runs)
    execute(runs, store, ledger=ledger)
    ledger.close()
    assert len(_trials(url, TrialState.COMPLETE)) == 4


def test_a_tuned_ablation_is_a_study_in_sqlite_by_default(tmp_path: Path) -> None:
    tuned = Ablation(optimizers=("torch-adamw",), tune=3, extensions=0, seeds=2, steps=4, evaluations=1)
    outcome = ablate(tuned, tmp_path / "out")
    address = f"sqlite:///{tmp_path / 'out' / 'study.db'}"
    trials = optuna.load_study(study_name="soaa/digits", storage=address).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5
    (tuning,) = outcome.tunings
    by_key = {trial.user_attrs["key"]: trial for trial in trials}
    for trial in tuning.trials:
        assert by_key[trial.config.key].value == trial.loss
        assert by_key[trial.config.key].params["lr"] == trial.point["lr"]
    taken_in_turns = dataclasses.replace(tuned, interleave=True)
    ablate(taken_in_turns, tmp_path / "turns")
    assert not (tmp_path / "turns" / "study.db").exists()


def test_shared_and_unshared_ablation_give_the_same_numbers(tmp_path: Path, url: str) -> None:
    alone = ablate(ABLATION, tmp_path / "alone")
    shared = ablate(dataclasses.replace(ABLATION, storage=url), tmp_path / "shared")
    clock = ("ms/step", "CPU ms/step", "seconds to target")
    tables = [
        [{k: v for k, v in row.items() if k not in clock} for row in o.table()] for o in (alone, shared)
    ]
    assert tables[0] == tables[1]


def test_locked_database_is_one_error_that_says_what_to_do(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimizers.ablation.ledger.SQLITE_WAIT_SECONDS", 0.1)
    StudyLedger(url, "s", Store(tmp_path / "a"), ABLATION.runs()).close()
    holder = sqlite3.connect(tmp_path / "study.db")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(AblationError, match=r"locked.*close that program.*intact"):
            StudyLedger(url, "s", Store(tmp_path / "b"), ABLATION.runs())
    finally:
        holder.close()


def test_database_of_another_version_is_one_error(tmp_path: Path, url: str) -> None:
    StudyLedger(url, "s", Store(tmp_path / "a"), ABLATION.runs()).close()
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    database.close()
    with pytest.raises(AblationError, match="another version of Optuna"):
        StudyLedger(url, "s", Store(tmp_path / "b"), ABLATION.runs())


def test_a_database_with_foreign_content_is_one_error(tmp_path: Path, url: str) -> None:
    """Attributes are JSON: what is none is refused, and nothing in it is run."""
    StudyLedger(url, "s", Store(tmp_path / "a"), ABLATION.runs()).close()
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE trial_user_attributes SET value_json = '__import__(\"os\")'")
        database.execute("UPDATE trial_system_attributes SET value_json = '__import__(\"os\")'")
    database.close()
    with pytest.raises(AblationError, match=r"no JSON, which no study writes: remove it.*intact"):
        StudyLedger(url, "s", Store(tmp_path / "b"), ABLATION.runs())


@pytest.mark.parametrize("address", ["nonsense", "nosuch://host/db", "sqlite:////nonexistent/folder/x.db"])
def test_bad_address_is_one_error(tmp_path: Path, address: str) -> None:
    with pytest.raises(AblationError, match="study database"):
        StudyLedger(address, "s", Store(tmp_path), ABLATION.runs())
