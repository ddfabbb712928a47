"""Making the runs that are not on disk yet: one after the other here, or in worker processes."""

from __future__ import annotations

import functools
import json
import os
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from optimizers.ablation.config import RunConfig
from optimizers.ablation.errors import AblationError
from optimizers.ablation.store import Store

RETRIES = 3  # of one run whose worker dies
Listener = Callable[[RunConfig, int], None]


class Ledger(Protocol):
    """Who says which run is next: a list in this process, or a study that several machines share."""

    def claim(self) -> RunConfig | None:
        """Return a run that is now the caller's to make, or None where none is left."""
        ...

    def done(self, config: RunConfig) -> None:
        """Say that a claimed run is in the store."""
        ...


class LocalLedger:
    """The runs that are not in the store, in order."""

    def __init__(self, configs: Sequence[RunConfig], store: Store) -> None:
        unfinished = {config.key: config for config in configs if not store.has(config.key)}
        self._waiting = deque(unfinished.values())

    def claim(self) -> RunConfig | None:
        return self._waiting.popleft() if self._waiting else None

    def done(self, config: RunConfig) -> None:
        pass


def execute(
    configs: Sequence[RunConfig],
    store: Store,
    workers: int = 1,
    on_progress: Listener = lambda config, step: None,
    ledger: Ledger | None = None,
    interleave: bool = False,
) -> None:
    """Make every run that is not finished in the store.

    Args:
        configs: the runs.
        store: where finished runs are and go; the caller holds its lock.
        workers: how many run at the same time; 1 runs in this process.
        on_progress: called with a run and how many of its steps are done; with all of them at its end.
        ledger: hands out the runs; None for those of `configs` that are not in the store.
        interleave: the runs of one seed take turns in this process.

    Raises:
        AblationError: a result cannot be written, or a run's worker died more than a few times.
    """
    missing = 0
    for config in configs:
        if store.has(config.key):
            on_progress(config, config.steps)
        else:
            missing += 1
    chosen = LocalLedger(configs, store) if ledger is None else ledger
    if workers > 1 and missing:
        _Pool(chosen, store, min(workers, missing), on_progress).run()
        return
    if interleave:
        _in_turns(configs, store, on_progress)
        return
    from optimizers.ablation.run import train

    while (config_or_none := chosen.claim()) is not None:
        claimed = config_or_none
        if not store.has(claimed.key):
            report = functools.partial(on_progress, claimed)
            store.save(claimed.key, train(claimed, report, replayed(claimed, store)))
        chosen.done(claimed)
        on_progress(claimed, claimed.steps)


def _in_turns(configs: Sequence[RunConfig], store: Store, on_progress: Listener) -> None:
    from optimizers.ablation.interleave import train_in_turns

    for seed in dict.fromkeys(config.seed for config in configs):
        runs = [
            (config, functools.partial(on_progress, config), replayed(config, store))
            for config in configs
            if config.seed == seed and not store.has(config.key)
        ]
        for config, record in train_in_turns(runs):
            store.save(config.key, record)
            on_progress(config, config.steps)


def replayed(config: RunConfig, store: Store) -> list[float] | None:
    """Return the recorded radius that a run replays: at each step the one that its source's step used."""
    if not config.replay:
        return None
    radius: list[float | None] = store.load(config.replay)["trace"].get("radius", [])
    if any(value is None for value in radius):  # the run failed, or what it ran has no radius
        return []
    # what is recorded is the radius after a step; the first step uses 1
    return [1.0, *(value for value in radius[:-1] if value is not None)] if radius else []


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    config: RunConfig | None = None
    buffer: bytes = b""


@dataclass
class _Pool:
    ledger: Ledger
    store: Store
    size: int
    on_progress: Listener
    deaths: dict[str, int] = field(default_factory=dict)
    lost: deque[RunConfig] = field(default_factory=deque)  # claimed runs whose worker died
    workers: list[_Worker] = field(default_factory=list)

    def run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                for _ in range(self.size):
                    self._start(selector)
                while selector.get_map():
                    for event, _ in selector.select():
                        self._read(selector, event.data)
        finally:
            for worker in self.workers:
                worker.process.kill()
            for worker in self.workers:
                worker.process.wait()
                for stream in (worker.process.stdin, worker.process.stdout):
                    if stream is not None:
                        stream.close()

    def _start(self, selector: selectors.BaseSelector) -> None:
        worker = _Worker(
            subprocess.Popen(
                [sys.executable, "-m", "optimizers.ablation.worker", str(self.store.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends its workers
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        )
        self.workers.append(worker)
        assert worker.process.stdout is not None
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        self._assign(worker)

    def _next(self) -> RunConfig | None:
        while True:
            config = self.lost.popleft() if self.lost else self.ledger.claim()
            if config is None or not self.store.has(config.key):
                return config
            self.ledger.done(config)

    def _assign(self, worker: _Worker) -> None:
        stdin = worker.process.stdin
        assert stdin is not None
        worker.config = self._next()
        try:
            if worker.config is None:
                stdin.close()  # the worker ends at the end of its input
            else:
                stdin.write(json.dumps(worker.config.as_dict()).encode() + b"\n")
        except BrokenPipeError:
            pass  # it died; reading its output will tell

    def _read(self, selector: selectors.BaseSelector, worker: _Worker) -> None:
        stdout = worker.process.stdout
        assert stdout is not None
        content = os.read(stdout.fileno(), 1 << 16)
        if not content:
            selector.unregister(stdout)
            self._replace(selector, worker)
            return
        *lines, worker.buffer = (worker.buffer + content).split(b"\n")
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            if "fatal" in message:
                raise AblationError(message["fatal"])
            if worker.config is None:
                continue
            self.on_progress(worker.config, message["step"])
            if message.get("finished"):
                self.ledger.done(worker.config)
                self._assign(worker)

    def _replace(self, selector: selectors.BaseSelector, worker: _Worker) -> None:
        worker.process.wait()
        config = worker.config
        if config is None:
            return
        if self.store.has(config.key):  # it died between writing the run and saying so
            self.ledger.done(config)
            self.on_progress(config, config.steps)
        else:
            self.deaths[config.key] = self.deaths.get(config.key, 0) + 1
            if self.deaths[config.key] > RETRIES:
                raise AblationError(
                    f"the worker for {config.cell.label} (seed {config.seed}) died {RETRIES + 1} times, last with "
                    f"exit code {worker.process.returncode}: is there enough memory? Finished runs are intact"
                )
            self.on_progress(config, 0)
            self.lost.append(config)
        self._start(selector)
