"""Runs as Optuna trials: one study that processes on one or many machines share.

A trial is a run; it waits, is claimed, and is completed with the run's whole record as its attributes. A trial
whose process died is queued again: at once where the process was on this machine, after its heartbeat has
stopped where it was on another.

No process can be known to be dead: one that was only cut off may finish its run when another has begun it anew, and
two may queue the same run again. Two rules, which all processes apply alike, keep each run from counting twice: of
several open trials of a run only the lowest-numbered is ever made, and of several finished ones the lowest-numbered is
the run's.
"""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import os
import socket
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState

from optimizers.ablation.config import RunConfig
from optimizers.ablation.errors import AblationError
from optimizers.ablation.store import Store, finite

HEARTBEAT_SECONDS = 20
GRACE_SECONDS = 90
SQLITE_WAIT_SECONDS = 10.0
MAX_RETRIES = 3
CHUNK = 30_000  # characters: an attribute must fit a TEXT column of MySQL


class StudyLedger:
    """Hands out the runs of one workload through an Optuna study.

    Args:
        url: of the database, such as ``sqlite:///out/study.db`` or ``postgresql://...``.
        name: of the study; processes with the same name and database share their work.
        store: where this machine's finished runs are; what others finish is copied into it.
        configs: the runs that are wanted now.

    Raises:
        AblationError: the database cannot be opened, is locked, or was made by another version of Optuna.
    """

    def __init__(self, url: str, name: str, store: Store, configs: Sequence[RunConfig]) -> None:
        self.store = store
        self.wanted = {config.key: config for config in configs}
        self._claimed: dict[str, int] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with database_errors(url):
            self._storage = _open(url)
            self._study = optuna.create_study(study_name=name, storage=self._storage, load_if_exists=True)
            self.pull()
            self._requeue_orphans()
            self._publish()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()
        self._url = url

    def close(self) -> None:
        """Give back what is claimed and not made, stop the heartbeat and let go of the database."""
        self._stop.set()
        self._heart.join()
        for number in self._claimed.values():
            # an interrupt is no death of a process: it must not use up a run's retries
            with contextlib.suppress(
                Exception
            ):  # the process ends anyhow: what is left is queued as an orphan's
                trial = self._trials()[number]
                if self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL):
                    self._study.add_trial(again(trial, int(trial.user_attrs.get("retries", 0))))
        self._storage.remove_session()
        self._storage.engine.dispose()

    def claim(self) -> RunConfig | None:
        """Return a run that is now this process's; wait where all that is left is running elsewhere."""
        with database_errors(self._url):
            while True:
                self.pull()
                if all(self.store.has(key) for key in self.wanted):
                    return None
                config = self._ask()
                if config is not None:
                    return config
                if not self._others_work():
                    self._publish()
                    continue
                time.sleep(0.5)
                self._requeue_orphans()

    def done(self, config: RunConfig) -> None:
        number = self._claimed.pop(config.key, None)
        if number is None:
            return
        with database_errors(self._url):
            if not self._complete(self._trials()[number], self.store.load(config.key)):
                self._adopt(finished(self._trials())[config.key])  # in place of what was made here

    def pull(self) -> None:
        """Copy what counts of others' runs into this machine's store."""
        for key, trials in finished(self._trials()).items():
            if key not in self.wanted:
                continue
            # of two that ended in one moment one may have been taken for the run's before the other was there
            if not self.store.has(key) or len(trials) > 1:
                self._adopt(trials)

    def _adopt(self, trials: Sequence[FrozenTrial]) -> None:
        record = unpack(trials[0])
        assert record is not None
        key = trials[0].user_attrs["key"]
        if not self.store.has(key) or self.store.load(key) != record:
            self.store.save(key, record)

    def _complete(self, trial: FrozenTrial, record: dict[str, Any]) -> bool:
        """Complete a claimed trial with its run's record; return whether this record is the run's."""
        key, trial_id = trial.user_attrs["key"], trial._trial_id
        attributes, state, values = packed(record)
        try:
            for name, value in attributes.items():
                self._storage.set_trial_user_attr(trial_id, name, value)
            if key in finished(self._trials()):
                self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
                return False
            self._storage.set_trial_state_values(trial_id, state, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            # this process was taken for dead and the trial given away: whoever has it finds the run finished
            if key in finished(self._trials()):
                return False
            late = optuna.trial.create_trial(
                state=state,
                value=values[0] if values else None,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={**described(trial), **attributes, "retry_of": trial.number},
            )
            self._study.add_trial(late)
        return unpack(finished(self._trials())[key][0]) == record

    def _ask(self) -> RunConfig | None:
        everything = self._trials()
        counted, first = finished(everything), dict[str, int]()
        for trial in everything:
            if trial.state in (TrialState.WAITING, TrialState.RUNNING):
                first.setdefault(trial.user_attrs.get("key", ""), trial.number)
        for trial in everything:
            key = trial.user_attrs.get("key", "")
            if key not in self.wanted or trial.state != TrialState.WAITING:
                continue
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                if key in counted or first[key] != trial.number:
                    # a second trial of a run: never made, never counted
                    self._storage.set_trial_state_values(trial._trial_id, TrialState.PRUNED)
                # atomic in the database: of several processes one is told that it has the trial
                elif self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    self._storage.set_trial_user_attr(trial._trial_id, "owner", owner())
                    self._storage.record_heartbeat(trial._trial_id)
                    self._claimed[key] = trial.number
                    if not self.store.has(key):
                        return self.wanted[key]
                    self.done(
                        self.wanted[key]
                    )  # made here before, by a process that died before it could say so
        return None

    def _others_work(self) -> bool:
        missing = {key for key in self.wanted if not self.store.has(key)}
        open_keys = {
            trial.user_attrs.get("key") for trial in self._trials(TrialState.WAITING, TrialState.RUNNING)
        }
        return missing <= open_keys

    def _publish(self) -> None:
        trials = self._trials()
        known = {*finished(trials), *(t.user_attrs.get("key") for t in trials if not t.state.is_finished())}
        for key, config in self.wanted.items():
            if key not in known and not self.store.has(key):
                self._study.add_trial(waiting(config))

    def _requeue_orphans(self) -> None:
        """Queue again what was running in a process that has died."""
        here = socket.gethostname()
        for trial in self._trials(TrialState.RUNNING):
            host, _, process = str(trial.user_attrs.get("owner", "")).rpartition(":")
            if trial.number in self._claimed.values() or host != here or alive(int(process)):
                continue
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another did it
                if self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL):
                    requeue(self._study, trial)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._study.get_trials(deepcopy=False, states=states or None)
        return trials

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            for number in list(self._claimed.values()):
                with contextlib.suppress(
                    Exception
                ):  # the next beat tries again; the grace time covers several
                    self._storage.record_heartbeat(self._trials()[number]._trial_id)


def waiting(config: RunConfig) -> FrozenTrial:
    """Return a trial that waits for a run to be made."""
    params = {name: value for name, value in config.cell.options if isinstance(value, float)}
    if config.learning_rate is not None:
        params["lr"] = config.learning_rate
    wide = optuna.distributions.FloatDistribution(-1e300, 1e300)
    return optuna.trial.create_trial(
        state=TrialState.WAITING,
        params=params,
        distributions=dict.fromkeys(params, wide),
        user_attrs={"key": config.key, "cell": config.cell.label, "config": finite(config.as_dict())},
    )


def requeue(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial's run again, where it is not finished and was not already tried too often."""
    if trial.user_attrs.get("key") in finished(study.get_trials(deepcopy=False)):
        return
    retries = int(trial.user_attrs.get("retries", 0)) + 1
    if retries > MAX_RETRIES:
        raise AblationError(
            f"the run {trial.user_attrs.get('key')} ({trial.user_attrs.get('cell')}) lost its process {retries} times: "
            "is there enough memory? Finished runs are intact"
        )
    study.add_trial(again(trial, retries))


def again(trial: FrozenTrial, retries: int) -> FrozenTrial:
    """Return a waiting trial of the same run."""
    return optuna.trial.create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={**described(trial), "retries": retries, "retry_of": trial.number},
    )


def described(trial: FrozenTrial) -> dict[str, Any]:
    """Return the attributes that say which run a trial is of."""
    return {name: trial.user_attrs[name] for name in ("key", "cell", "config")}


def finished(trials: Sequence[FrozenTrial]) -> dict[str, list[FrozenTrial]]:
    """Return the trials that ended with a record, by the key of their run and in the order of their numbers."""
    found: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and "record.0" in trial.user_attrs:
            found.setdefault(trial.user_attrs["key"], []).append(trial)
    return found


def packed(record: dict[str, Any]) -> tuple[dict[str, str], TrialState, list[float] | None]:
    """Return a run's record as attributes of a trial, and the trial's last state and values."""
    text = base64.b85encode(zlib.compress(json.dumps(record).encode())).decode()
    parts = range(0, len(text), CHUNK)
    attributes = {f"record.{n}": text[start : start + CHUNK] for n, start in enumerate(parts)}
    loss = record["result"].get("validation_loss")
    if loss is not None:
        return attributes, TrialState.COMPLETE, [loss]
    return {**attributes, "outcome": record.get("error", "diverged")}, TrialState.PRUNED, None


def unpack(trial: FrozenTrial) -> dict[str, Any] | None:
    """Return the record of a finished trial, or None where it has none."""
    parts: list[str] = []
    while (part := trial.user_attrs.get(f"record.{len(parts)}")) is not None:
        parts.append(part)
    if not parts or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    record: dict[str, Any] = json.loads(zlib.decompress(base64.b85decode("".join(parts))))
    return record


def owner() -> str:
    """Return what names this process among all machines."""
    return f"{socket.gethostname()}:{os.getpid()}"


def alive(process: int) -> bool:
    """Return whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _open(url: str) -> Any:
    callback: Callable[[optuna.Study, FrozenTrial], None] = requeue
    names = inspect.signature(optuna.storages.RDBStorage.__init__).parameters
    # the callback's argument was renamed in Optuna 5
    argument = next(n for n in ("heartbeat_stale_trial_callback", "failed_trial_callback") if n in names)
    arguments: dict[str, Any] = {argument: callback}
    if url.startswith("sqlite"):
        arguments["engine_kwargs"] = {"connect_args": {"timeout": SQLITE_WAIT_SECONDS}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.storages.RDBStorage(
            url, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS, **arguments
        )


@contextlib.contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Turn what a database raises into one AblationError that says what to do."""
    try:
        yield
    except (
        optuna.exceptions.StorageInternalError,
        sqlalchemy.exc.SQLAlchemyError,
        RuntimeError,
        ImportError,
        json.JSONDecodeError,
    ) as error:
        cause = error.__cause__ or error
        text = " ".join(str(getattr(cause, "orig", None) or cause).split())
        safe = _without_password(url)
        if "locked" in text:
            remedy = "another program has locked it: close that program, or give another --storage"
        elif "disk is full" in text or "disk I/O error" in text or "No space left" in text:
            remedy = "make room on its disk, then give the same command once more"
        elif "version" in text or "schema" in text:
            remedy = f"it was made by another version of Optuna: optuna storage upgrade --storage {safe}, or a new one"
        elif isinstance(error, json.JSONDecodeError):
            text = "it holds an attribute that is no JSON, which no study writes"
            remedy = "remove it, or give another --storage"
        elif isinstance(cause, ImportError) or "Can't load plugin" in text:
            remedy = "install the driver that this kind of address needs, or use sqlite:///FILE"
        else:
            remedy = "check the address, or use sqlite:///FILE"
        raise AblationError(
            f"study database {safe}: {text[:200]}: {remedy}; finished runs are intact"
        ) from error


def _without_password(url: str) -> str:
    try:
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return url
