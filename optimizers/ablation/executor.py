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
from typing import Any

from optimizers.ablation.config import RunConfig
from optimizers.ablation.errors import AblationError
from optimizers.ablation.store import Store

RETRIES = 3  # of one run whose worker dies
Listener = Callable[[RunConfig, int], None]


def execute(
    configs: Sequence[RunConfig],
    store: Store,
    workers: int = 1,
    on_progress: Listener = lambda config, step: None,
) -> None:
    """Make every run that is not finished in the store.

    Args:
        configs: the runs.
        store: where finished runs are and go; the caller holds its lock.
        workers: how many run at the same time; 1 runs in this process.
        on_progress: called with a run and how many of its steps are done; with all of them, once, at its end.

    Raises:
        AblationError: a result cannot be written, or a run's worker died more than a few times.
    """
    pending: dict[str, RunConfig] = {}
    for config in configs:
        if store.has(config.key):
            on_progress(config, config.steps)
        else:
            pending[config.key] = config
    if workers == 1:
        from optimizers.ablation.run import train

        for key, config in pending.items():
            report = functools.partial(on_progress, config)
            store.save(key, train(config, report, replayed(config, store)))
            on_progress(config, config.steps)
    elif pending:
        _Pool(list(pending.values()), store, min(workers, len(pending)), on_progress).run()


def replayed(config: RunConfig, store: Store) -> list[float] | None:
    """Return the recorded radius that a run replays: at each step the one that its source's step used."""
    if not config.replay:
        return None
    radius: list[float] = store.load(config.replay)["trace"]["radius"]
    # what is recorded is the radius after a step; the first step uses 1
    return [1.0, *radius[:-1]]


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    config: RunConfig | None = None
    buffer: bytes = b""


@dataclass
class _Pool:
    configs: list[RunConfig]
    store: Store
    size: int
    on_progress: Listener
    deaths: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        waiting = deque(self.configs)
        workers = [self._start() for _ in range(self.size)]
        try:
            with selectors.DefaultSelector() as selector:
                for worker in workers:
                    self._watch(selector, worker)
                    self._assign(worker, waiting)
                while selector.get_map():
                    for event, _ in selector.select():
                        self._read(selector, event.data, waiting, workers)
        finally:
            for worker in workers:
                worker.process.kill()
            for worker in workers:
                worker.process.wait()
                for stream in (worker.process.stdin, worker.process.stdout):
                    if stream is not None:
                        stream.close()

    def _start(self) -> _Worker:
        return _Worker(
            subprocess.Popen(
                [sys.executable, "-m", "optimizers.ablation.worker", str(self.store.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends its workers
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        )

    def _watch(self, selector: selectors.BaseSelector, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _assign(self, worker: _Worker, waiting: deque[RunConfig]) -> None:
        stdin = worker.process.stdin
        assert stdin is not None
        worker.config = waiting.popleft() if waiting else None
        try:
            if worker.config is None:
                stdin.close()  # the worker ends at the end of its input
            else:
                stdin.write(json.dumps(worker.config.as_dict()).encode() + b"\n")
        except BrokenPipeError:
            pass  # it died; reading its output will tell

    def _read(
        self,
        selector: selectors.BaseSelector,
        worker: _Worker,
        waiting: deque[RunConfig],
        workers: list[_Worker],
    ) -> None:
        stdout = worker.process.stdout
        assert stdout is not None
        content = os.read(stdout.fileno(), 1 << 16)
        if not content:
            selector.unregister(stdout)
            self._replace(selector, worker, waiting, workers)
            return
        *lines, worker.buffer = (worker.buffer + content).split(b"\n")
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            if "fatal" in message:
                raise AblationError(message["fatal"])
            if worker.config is not None:
                self.on_progress(worker.config, message["step"])
            if message.get("finished"):
                self._assign(worker, waiting)

    def _replace(
        self,
        selector: selectors.BaseSelector,
        worker: _Worker,
        waiting: deque[RunConfig],
        workers: list[_Worker],
    ) -> None:
        worker.process.wait()
        lost = worker.config
        if lost is None:
            return
        if self.store.has(lost.key):  # it died between writing the run and saying so
            self.on_progress(lost, lost.steps)
        else:
            self.deaths[lost.key] = self.deaths.get(lost.key, 0) + 1
            if self.deaths[lost.key] > RETRIES:
                raise AblationError(
                    f"the worker for {lost.cell.label} (seed {lost.seed}) died {RETRIES + 1} times, last with exit "
                    f"code {worker.process.returncode}: is there enough memory? Finished runs are intact"
                )
            self.on_progress(lost, 0)
            waiting.appendleft(lost)
        if waiting:
            fresh = self._start()
            workers.append(fresh)
            self._watch(selector, fresh)
            self._assign(fresh, waiting)
