"""What an ablation is: a typed configuration, and the single runs that it unfolds into."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimizers.ablation.cell import Cell, grid
from optimizers.ablation.errors import AblationError, unknown_name
from optimizers.ablation.schedule import SCHEDULES
from optimizers.ablation.space import check_budget, typical_learning_rates

#: A folder may come from anywhere: a number of seeds that is no mistake ends in memory and hours, not in an error.
MOST_SEEDS = 10_000
DEFAULT_OPTIMIZERS = ("torch-sgd", "torch-adamw", "soaa", "kfac")


@dataclass(frozen=True)
class RunConfig:
    """Everything that a single run is a function of; its hash names the run."""

    workload: str
    cell: Cell
    learning_rate: float | None
    seed: int
    steps: int
    batch_size: int
    schedule: str = "constant"
    warmup: float = 0.0
    evaluations: int = 20
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    read_test: bool = True
    replay: str = ""  # key of the run whose recorded radius multiplies the learning rate
    evaluation_samples: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["cell"] = self.cell.as_dict()
        if self.evaluation_samples is None:  # runs from before it could be given keep their key
            del content["evaluation_samples"]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], title: str = "") -> RunConfig:
        """Return the configuration that `as_dict` wrote."""
        return cls(**{**content, "cell": Cell.from_dict(content["cell"], title)})

    @property
    def key(self) -> str:
        """The run's name: a hash of everything that its numbers are a function of."""
        text = json.dumps(self.as_dict(), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Ablation:
    """A grid of cells, learning rates and seeds on one workload.

    Args:
        workload: its name, see ``soaa list``.
        optimizers: cells written as ``name:option=value`` or ``curvature+trust-region``.
        curvature: rows of a grid that is crossed with `trust_region`.
        trust_region: columns of that grid.
        cells: further cells, built in Python or from ``[[cells]]`` tables.
        learning_rates: tried for every cell; empty for each cell's own typical ones.
        seeds: how many, or which; every cell sees the same initial values and batches for one seed.
        steps: training steps; None for the workload's own.
        batch_size: None for the workload's own.
        schedule: ``"constant"`` or ``"cosine"``.
        warmup: fraction of the steps in which the learning rate rises.
        evaluations: points of a curve after the first.
        evaluation_samples: how many samples of a split every loss and metric is measured on, on the curve and at the
            end alike: the same ones for every cell. None: the workload's own number on the curve, all at the end.
        threads: of PyTorch in each run.
        workers: processes that run at the same time.
        device: such as ``"cpu"`` or ``"cuda"``.
        dtype: such as ``"float32"``.
        tune: trials with which every cell is tuned, on validation, in the written search space (`space`), before its
            seeds run at its best setting. 0: no tuning, every cell at every one of `learning_rates`.
        tune_seed: initial values and batches of the trials; none of `seeds`.
        extensions: how often a search is extended beyond an edge at which its best trial lies.
        interleave: the seeds' runs of different cells take turns in one process, so that the machine's drift hits
            all alike and their times may be compared.
        storage: address of an Optuna study database, such as ``"sqlite:///study.db"``: processes on any number of
            machines that name it share the runs. Empty: ``study.db`` in the results folder where cells are tuned and
            do not take turns, and no database elsewhere.

    Raises:
        AblationError: a value is out of range; names are checked by `check`.
    """

    workload: str = "digits"
    optimizers: tuple[str, ...] = ()
    curvature: tuple[str, ...] = ()
    trust_region: tuple[str, ...] = ()
    cells: tuple[Cell, ...] = ()
    learning_rates: tuple[float, ...] = ()
    seeds: int | tuple[int, ...] = 3
    steps: int | None = None
    batch_size: int | None = None
    schedule: str = "constant"
    warmup: float = 0.0
    evaluations: int = 20
    evaluation_samples: int | None = None
    threads: int = 1
    workers: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    tune: int = 0
    tune_seed: int = 1000
    extensions: int = 2
    interleave: bool = False
    storage: str = ""

    def __post_init__(self) -> None:
        for name in ("optimizers", "curvature", "trust_region", "cells", "learning_rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.seeds, int):
            object.__setattr__(self, "seeds", tuple(self.seeds))
        for name in ("steps", "batch_size", "evaluations", "evaluation_samples", "threads", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AblationError(f"{name} must be >= 1, got {value}")
        for rate in self.learning_rates:
            if not (rate > 0 and math.isfinite(rate)):
                raise AblationError(f"learning_rates must be > 0 and finite, got {rate}")
        if not 0 <= self.warmup < 1:
            raise AblationError(f"warmup must be in [0, 1), a fraction of the steps, got {self.warmup}")
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        if self.dtype not in ("float32", "float64", "bfloat16", "float16"):
            raise unknown_name("dtype", self.dtype, ("float32", "float64", "bfloat16", "float16"))
        if bool(self.curvature) != bool(self.trust_region):
            raise AblationError(
                "curvature and trust_region must be given together, as rows and columns of a grid, got "
                f"curvature={list(self.curvature)} trust_region={list(self.trust_region)}"
            )
        if isinstance(self.seeds, int) and self.seeds > MOST_SEEDS:
            raise AblationError(f"seeds must be at most {MOST_SEEDS:,}, got {self.seeds:,}")
        if not self.seed_list or len(set(self.seed_list)) != len(self.seed_list) or min(self.seed_list) < 0:
            raise AblationError(f"seeds must be a number >= 1, or different numbers >= 0, got {self.seeds}")
        check_budget(self.tune, self.extensions)
        if self.tune and self.learning_rates:
            raise AblationError(
                "learning_rates must be empty with tune, which searches them: leave one of them out"
            )
        if self.tune and self.tune_seed in self.seed_list:
            raise AblationError(
                f"tune_seed must be none of seeds, which are to be new to the cells, got {self.tune_seed}"
            )
        if self.interleave and (self.workers > 1 or self.storage):
            raise AblationError(
                "interleave must be false with workers > 1 or storage: runs take turns in one process"
            )

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds, one by one."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def all_cells(self) -> tuple[Cell, ...]:
        """Return every cell once: optimizers, then the grid, then further cells."""
        from optimizers.ablation import adapter

        asked = [Cell.parse(text) for text in self.optimizers]
        asked += [*grid(self.curvature, self.trust_region), *self.cells]
        if not asked:
            known = adapter.available()["optimizers"]
            asked = [Cell.parse(text) for text in DEFAULT_OPTIMIZERS if text in known]
        labels: dict[str, Cell] = {}
        for cell in asked:
            if labels.setdefault(cell.label, cell) != cell:
                raise AblationError(
                    f"two different cells are called {cell.label!r}: give them different titles"
                )
        for cell in labels.values():
            if cell.replay and (cell.replay not in labels or labels[cell.replay].replay):
                raise AblationError(
                    f"{cell.label}: replay must be the title or name of another cell that replays none, such as "
                    f"{next(iter(labels))!r}, got {cell.replay!r}"
                )
        return tuple(labels.values())

    def rates_of(self, cell: Cell) -> tuple[float | None, ...]:
        """Return the learning rates of a cell: its own option ``lr``, or those asked for, or typical ones."""
        if "lr" in dict(cell.options) or cell.replay:
            return (None,)
        return self.learning_rates or typical_learning_rates(cell)

    def run(
        self, cell: Cell, rate: float | None, seed: int, *, final: bool = True, replay: str = ""
    ) -> RunConfig:
        """Return one run of a cell; the test is read only where it is `final`."""
        from optimizers.ablation import workload

        problem = workload.get(self.workload)
        steps = self.steps or problem.steps
        return RunConfig(
            workload=self.workload,
            cell=cell,
            learning_rate=rate,
            seed=seed,
            steps=steps,
            batch_size=self.batch_size or problem.batch_size,
            schedule=self.schedule,
            warmup=self.warmup,
            evaluations=min(self.evaluations, steps),
            threads=self.threads,
            device=self.device,
            dtype=self.dtype,
            read_test=final,
            replay=replay,
            evaluation_samples=self.evaluation_samples,
        )

    def runs(self) -> list[RunConfig]:
        """Return the runs that need no other's result: every rate of every cell, or with `tune` the first trials."""
        from optimizers.ablation.protocol import first_runs

        return first_runs(self)

    def as_dict(self) -> dict[str, Any]:
        """Return the ablation as JSON values."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["cells"] = [
            {**cell.as_dict(), "title": cell.title, "replay": cell.replay} for cell in self.cells
        ]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Ablation:
        """Return the ablation that `as_dict` wrote."""
        cells = tuple(
            dataclasses.replace(Cell.from_dict(cell, cell["title"]), replay=cell["replay"])
            for cell in content["cells"]
        )
        return cls(**{**content, "cells": cells})
