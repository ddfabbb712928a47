"""The protocol of a comparison: which runs are made, in which order, and what each choice was made on.

Without tuning every cell runs at every learning rate with every seed. With it every cell gets the same number of
trials from the written search space, on one seed and judged by validation loss, a few more where its best lies at an
edge, and then its seeds at the best setting; only those read the test. A cell that replays another's radius runs last.

Each stage is a function of the results of those before. So an interrupted ablation finds its place again from the
finished runs alone, and several machines that share a study agree on every next stage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from optimizers.ablation import results
from optimizers.ablation.cell import Cell, freeze
from optimizers.ablation.config import Ablation, RunConfig
from optimizers.ablation.space import Dimension, extended, extension_trials, quasi_random, space
from optimizers.ablation.store import Store

SAMPLER_SEED = 0


@dataclass(frozen=True)
class Trial:
    """One point of a cell's search.

    Args:
        config: its run.
        point: the numbers that were searched, ``lr`` among them.
        extension: 0 for the written space, then the number of the extension.
        loss: of validation, at the end; infinite for a run that failed or diverged.
        diverged: whether it failed, or ended above its initial training loss.
    """

    config: RunConfig
    point: dict[str, float]
    extension: int
    loss: float
    diverged: bool


@dataclass
class Tuning:
    """The search of one cell.

    Args:
        cell: as it was asked for.
        dimensions: what is searched; nothing where every number is fixed.
        trials: those that are finished.
    """

    cell: Cell
    dimensions: tuple[Dimension, ...]
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The trial of least validation loss; of equal ones, such as when all diverged, the first."""
        return min(self.trials, key=lambda trial: trial.loss, default=None)

    def points(self, extension: int, count: int) -> list[dict[str, float]]:
        """Return the points of the written space or of an extension; none where there is nothing to search."""
        if not self.dimensions:
            return []
        if extension == 0:
            return quasi_random(self.dimensions, count, SAMPLER_SEED)
        best = self.best
        if best is None or not math.isfinite(best.loss) or self.trials[-1].extension != extension - 1:
            return []
        beyond = extended(self.dimensions, [trial.point for trial in self.trials], self.trials.index(best))
        return quasi_random(beyond, extension_trials(count), SAMPLER_SEED + extension) if beyond else []

    def tuned(self) -> tuple[Cell, float | None]:
        """Return the cell at its best setting, and its learning rate."""
        best = self.best
        return (self.cell, None) if best is None else setting(self.cell, best.point)


def setting(cell: Cell, point: dict[str, float]) -> tuple[Cell, float | None]:
    """Return a cell with the searched numbers of a point among its options, and the point's learning rate.

    >>> setting(Cell("kfac"), {"lr": 0.1, "radius": 0.01})
    (Cell(optimizer='kfac', ..., options=(('radius', 0.01),), title='kfac', replay=''), 0.1)
    """
    options = {name: value for name, value in point.items() if name != "lr"}
    if not options:
        return cell, point.get("lr")
    chosen = dataclasses.replace(cell, options=freeze({**dict(cell.options), **options}), title=cell.label)
    return chosen, point.get("lr")


class Protocol:
    """The stages of one ablation over one store.

    Args:
        ablation: what was asked.
        store: where finished runs are.
    """

    def __init__(self, ablation: Ablation, store: Store) -> None:
        self.ablation, self.store = ablation, store
        self.cells = ablation.all_cells()
        self.tunings: list[Tuning] = []
        self.finals: list[RunConfig] = []

    def stages(self) -> Iterator[list[RunConfig]]:
        """Yield the runs of one stage after the other; the results of each are asked for when the next is."""
        plain = [cell for cell in self.cells if not cell.replay]
        if self.ablation.tune:
            self.tunings = [Tuning(cell, dimensions(self.ablation, cell)) for cell in plain]
            for extension in range(self.ablation.extensions + 1):
                yield from self._search(extension)
            settings = [tuning.tuned() for tuning in self.tunings]
        else:
            settings = [(cell, rate) for cell in plain for rate in self.ablation.rates_of(cell)]
        self.finals = finals(self.ablation, settings)
        yield list(self.finals)
        replays = [cell for cell in self.cells if cell.replay]
        if replays:
            chosen = {row.cell.label: row for row in results.best(results.collect(self.finals, self.store))}
            more = [
                run
                for position in range(len(self.ablation.seed_list))
                for cell in replays
                if cell.replay in chosen
                for run in [replay_run(self.ablation, cell, chosen[cell.replay], position)]
            ]
            self.finals += more
            yield more

    def _search(self, extension: int) -> Iterator[list[RunConfig]]:
        searches: list[tuple[Tuning, dict[str, float], RunConfig]] = []
        points = [tuning.points(extension, self.ablation.tune) for tuning in self.tunings]
        # cell by cell for each point: a machine that drifts hits all alike
        for number in range(max(map(len, points), default=0)):
            for tuning, own in zip(self.tunings, points, strict=True):
                if number < len(own):
                    cell, rate = setting(tuning.cell, own[number])
                    run = self.ablation.run(cell, rate, self.ablation.tune_seed, final=False)
                    searches.append((tuning, own[number], run))
        if not searches:
            return
        yield [run for _, _, run in searches]
        for tuning, point, run in searches:
            record = self.store.load(run.key)
            loss = results.number(record["result"].get("validation_loss"))
            tuning.trials.append(Trial(run, point, extension, loss, results.diverged(record)))

    def replay(self) -> bool:
        """Go through every stage that is finished; return whether all are."""
        return all(all(self.store.has(run.key) for run in runs) for runs in self.stages())

    def expected(self) -> int:
        """Return how many steps the whole ablation takes at least, for a display of progress."""
        length = self.ablation.run(self.cells[0], None, 0).steps
        seeds = len(self.ablation.seed_list)
        if not self.ablation.tune:
            return length * seeds * sum(len(self.ablation.rates_of(cell)) for cell in self.cells)
        searched = sum(bool(dimensions(self.ablation, cell)) for cell in self.cells)
        return length * (seeds * len(self.cells) + self.ablation.tune * searched)


def dimensions(ablation: Ablation, cell: Cell) -> tuple[Dimension, ...]:
    """Return what is searched for a cell: nothing for an unwritten composition that judges trials."""
    from optimizers.ablation.run import sets_its_own_step
    from optimizers.ablation.space import is_written

    found = space(cell)
    if found and not is_written(cell) and sets_its_own_step(ablation.run(cell, None, 0)):
        return ()
    return found


def first_runs(ablation: Ablation) -> list[RunConfig]:
    """Return the runs of the first stage; it needs no results."""
    plain = [cell for cell in ablation.all_cells() if not cell.replay]
    if not ablation.tune:
        return finals(ablation, [(cell, rate) for cell in plain for rate in ablation.rates_of(cell)])
    runs = []
    for cell in plain:
        for point in Tuning(cell, dimensions(ablation, cell)).points(0, ablation.tune):
            chosen, rate = setting(cell, point)
            runs.append(ablation.run(chosen, rate, ablation.tune_seed, final=False))
    return runs


def samples(ablation: Ablation) -> list[RunConfig]:
    """Return one run for everything that must be possible: every cell, and every setting that is known now."""
    runs = [ablation.run(cell, None, ablation.seed_list[0]) for cell in ablation.all_cells()]
    return list({(run.cell, run.learning_rate): run for run in runs + first_runs(ablation)}.values())


def finals(ablation: Ablation, settings: Sequence[tuple[Cell, float | None]]) -> list[RunConfig]:
    """Return every seed of some settings. The order alternates (A B B A), so that drift hits every cell alike."""
    runs: list[RunConfig] = []
    for position, seed in enumerate(ablation.seed_list):
        ordered = settings if position % 2 == 0 else settings[::-1]
        runs += [ablation.run(cell, rate, seed) for cell, rate in ordered]
    return runs


def replay_run(ablation: Ablation, cell: Cell, source: results.Row, position: int) -> RunConfig:
    """Return the run of a replaying cell: the rate of what it replays, unless it has its own, and its radius."""
    rate = None if "lr" in dict(cell.options) else source.values("learning_rate")[position]
    rate = rate if rate is None or math.isfinite(rate) else None
    return ablation.run(cell, rate, ablation.seed_list[position], replay=str(source.records[position]["key"]))
