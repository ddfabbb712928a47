"""An ablation from start to end: check, run stage by stage what is missing, tabulate, draw."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optimizers.ablation import plot, results, space, workload
from optimizers.ablation.config import Ablation, RunConfig
from optimizers.ablation.errors import AblationError
from optimizers.ablation.executor import Ledger, Listener, LocalLedger, execute
from optimizers.ablation.protocol import Protocol, Tuning, samples
from optimizers.ablation.results import Row
from optimizers.ablation.run import check
from optimizers.ablation.store import Store, read_json, write_bytes, write_json

CONFIGURATION = "configuration.json"
STUDY = "study.db"
Starter = Callable[[list[RunConfig], int], None]


@dataclass(frozen=True)
class Outcome:
    """What an ablation found.

    Args:
        ablation: what was asked.
        folder: where the results are.
        rows: one row for every cell and learning rate; with tuning one for every cell.
        tunings: with tuning, the search of every cell.
        complete: whether every run is there.
    """

    ablation: Ablation
    folder: Path
    rows: tuple[Row, ...]
    tunings: tuple[Tuning, ...] = ()
    complete: bool = True

    @property
    def best(self) -> list[Row]:
        """One row a cell: at the learning rate with the least validation loss."""
        return results.best(self.rows)

    def table(self) -> list[dict[str, str]]:
        """The table, one dictionary a cell."""
        return results.table(self.best, workload.get(self.ablation.workload))

    def __repr__(self) -> str:
        state = "" if self.complete else ", not finished"
        head = f"{len(self.best)} cells on {self.ablation.workload}, results in {self.folder}{state}:"
        return f"{head}\n{self._repr_markdown_()}"

    def _repr_markdown_(self) -> str:
        return results.markdown(self.table())

    def write(self) -> None:
        """Write ``table.md``, ``table.csv`` and ``curves.png`` into the folder."""
        rows = self.table()
        write_bytes(self.folder / "table.md", results.markdown(rows).encode())
        write_bytes(self.folder / "table.csv", results.comma_separated(rows).encode())
        write_bytes(self.folder / "curves.png", plot.curves(self.best, workload.get(self.ablation.workload)))


def ablate(
    ablation: Ablation,
    out: str | Path,
    on_progress: Listener = lambda config, step: None,
    on_start: Starter = lambda runs, steps: None,
) -> Outcome:
    """Make every run of an ablation that is not on disk, and write its table and picture.

    Calling it again, after it was interrupted or with more seeds, makes only what is missing.

    Args:
        ablation: what to run.
        out: the results folder, made where it does not exist.
        on_progress: called with a run and how many of its steps are done.
        on_start: called, after all checks, with the runs of each stage and the steps of all stages as far as known.

    Returns:
        The outcome, with its rows and table.

    Raises:
        AblationError: before any training: an unknown name, a bad value, missing data, a folder in use.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     outcome = ablate(Ablation(optimizers=["torch-sgd"], learning_rates=[0.1], seeds=1, steps=20), folder)
    >>> outcome.table()[0]["cell"]
    'torch-sgd'
    """
    for run in samples(ablation):
        check(run)
    store = Store(Path(out))
    with store.lock():
        write_json(store.folder / CONFIGURATION, ablation.as_dict())
        if ablation.tune:
            write_json(store.folder / "search_space.json", space.written(ablation.all_cells()))
        protocol = Protocol(ablation, store)
        begun = 0
        for runs in protocol.stages():
            begun += sum(run.steps for run in runs)
            on_start(runs, max(begun, protocol.expected()))
            with _ledger(ablation, runs, store) as ledger:
                execute(runs, store, ablation.workers, on_progress, ledger, ablation.interleave)
        outcome = _outcome(protocol, complete=True)
        outcome.write()
    return outcome


def ablate_study(
    ablations: Sequence[Ablation],
    out: str | Path,
    on_progress: Listener = lambda config, step: None,
    on_start: Starter = lambda runs, steps: None,
) -> list[Outcome]:
    """Make the ablations of a study, one workload after the other, each in a folder of its own.

    Args:
        ablations: what `read_study` returns.
        out: the folder of the whole; each workload's results are in ``out/WORKLOAD``, a single one's in ``out``.
        on_progress: as of `ablate`.
        on_start: as of `ablate`.

    Returns:
        The outcomes, in the order of `ablations`.

    Raises:
        AblationError: as `ablate`; every workload is checked before the first is trained.
    """
    if len(ablations) == 1:
        return [ablate(ablations[0], out, on_progress, on_start)]
    for ablation in ablations:
        for run in samples(ablation):
            check(run)
    return [ablate(ablation, Path(out) / ablation.workload, on_progress, on_start) for ablation in ablations]


def read_outcome(folder: str | Path) -> Outcome:
    """Read what an ablation found as far as it is, finished or not.

    Args:
        folder: where `ablate` wrote.

    Returns:
        The outcome, with the rows whose runs are all finished.

    Raises:
        AblationError: the folder holds no ablation, or a damaged or older one.
    """
    folder = Path(folder)
    if not (folder / "runs").is_dir():
        raise AblationError(f"{folder} holds no results: name the folder that soaa ablate wrote")
    if not (folder / CONFIGURATION).is_file():
        raise AblationError(
            f"{folder} was written by an older version, which kept no {CONFIGURATION}: give the same soaa ablate "
            "command once more, which keeps the finished runs"
        )
    content = read_json(folder / CONFIGURATION)
    try:
        ablation = Ablation.from_dict(content)
    except (KeyError, TypeError) as error:
        raise AblationError(
            f"{folder / CONFIGURATION} was written by another version ({error}): give the same soaa ablate command "
            "once more, which keeps the finished runs, or use the version that wrote it"
        ) from error
    protocol = Protocol(ablation, Store(folder))
    return _outcome(protocol, complete=protocol.replay())


def _outcome(protocol: Protocol, *, complete: bool) -> Outcome:
    return Outcome(
        protocol.ablation,
        protocol.store.folder,
        tuple(results.collect(protocol.finals, protocol.store)),
        tuple(protocol.tunings),
        complete,
    )


@contextlib.contextmanager
def _ledger(ablation: Ablation, runs: list[RunConfig], store: Store) -> Iterator[Ledger]:
    # a tuned study is an Optuna study from the start; runs that take turns do so in this process alone
    url = ablation.storage
    if not url and ablation.tune and not ablation.interleave:
        url = f"sqlite:///{(store.folder / STUDY).resolve()}"
    if not url:
        yield LocalLedger(runs, store)
        return
    from optimizers.ablation.ledger import StudyLedger

    ledger = StudyLedger(url, f"soaa/{ablation.workload}", store, runs)
    try:
        yield ledger
    finally:
        ledger.close()
