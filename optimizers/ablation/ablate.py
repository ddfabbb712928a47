"""An ablation from start to end: check, run what is missing, tabulate, draw."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from optimizers.ablation import plot, results, workload
from optimizers.ablation.config import Ablation, RunConfig
from optimizers.ablation.executor import Ledger, Listener, LocalLedger, execute
from optimizers.ablation.results import Row
from optimizers.ablation.run import check
from optimizers.ablation.store import Store, write_bytes


@dataclass(frozen=True)
class Outcome:
    """What an ablation found.

    Args:
        ablation: what was asked.
        folder: where the results are.
        rows: one row for every cell and learning rate.
    """

    ablation: Ablation
    folder: Path
    rows: tuple[Row, ...]

    @property
    def best(self) -> list[Row]:
        """One row a cell: at the learning rate with the least validation loss."""
        return results.best(self.rows)

    def table(self) -> list[dict[str, str]]:
        """The table, one dictionary a cell."""
        return results.table(self.best, workload.get(self.ablation.workload))

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
    on_start: Callable[[list[RunConfig]], None] = lambda runs: None,
) -> Outcome:
    """Make every run of an ablation that is not on disk, and write its table and picture.

    Calling it again, after it was interrupted or with more seeds, makes only what is missing.

    Args:
        ablation: what to run.
        out: the results folder, made where it does not exist.
        on_progress: called with a run and how many of its steps are done.
        on_start: called with every run, before the first and after all checks.

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
    runs = ablation.runs()
    checked = {(run.cell, run.learning_rate): run for run in runs}
    for run in checked.values():
        check(run)
    store = Store(Path(out))
    with store.lock():
        on_start(runs)
        with _ledger(ablation, runs, store) as ledger:
            execute(runs, store, ablation.workers, on_progress, ledger)
        outcome = Outcome(ablation, Path(out), tuple(results.collect(runs, store)))
        outcome.write()
    return outcome


@contextlib.contextmanager
def _ledger(ablation: Ablation, runs: list[RunConfig], store: Store) -> Iterator[Ledger]:
    if not ablation.storage:
        yield LocalLedger(runs, store)
        return
    from optimizers.ablation.ledger import StudyLedger

    ledger = StudyLedger(ablation.storage, f"soaa/{ablation.workload}", store, runs)
    try:
        yield ledger
    finally:
        ledger.close()
