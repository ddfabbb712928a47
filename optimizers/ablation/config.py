"""What an ablation is: a typed configuration, and the single runs that it unfolds into."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimizers.ablation.cell import Cell, freeze, grid
from optimizers.ablation.errors import AblationError, unknown_name
from optimizers.ablation.schedule import SCHEDULES
from optimizers.ablation.space import typical_learning_rates

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

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["cell"] = self.cell.as_dict()
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
        threads: of PyTorch in each run.
        workers: processes that run at the same time.
        device: such as ``"cpu"`` or ``"cuda"``.
        dtype: such as ``"float32"``.
        storage: address of an Optuna study database, such as ``"sqlite:///study.db"``: processes on any number of
            machines that name it share the runs. Empty: the runs are this process's alone.

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
    threads: int = 1
    workers: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    storage: str = ""

    def __post_init__(self) -> None:
        for name in ("optimizers", "curvature", "trust_region", "cells", "learning_rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.seeds, int):
            object.__setattr__(self, "seeds", tuple(self.seeds))
        for name in ("steps", "batch_size", "evaluations", "threads", "workers"):
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
        if not self.seed_list or len(set(self.seed_list)) != len(self.seed_list) or min(self.seed_list) < 0:
            raise AblationError(f"seeds must be a number >= 1, or different numbers >= 0, got {self.seeds}")

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
        return tuple(labels.values())

    def rates_of(self, cell: Cell) -> tuple[float | None, ...]:
        """Return the learning rates of a cell: its own option ``lr``, or those asked for, or typical ones."""
        if "lr" in dict(cell.options):
            return (None,)
        return self.learning_rates or typical_learning_rates(cell)

    def runs(self) -> list[RunConfig]:
        """Return every run. The order alternates (A B B A) over seeds, so that drift hits every cell alike."""
        from optimizers.ablation import workload

        problem = workload.get(self.workload)
        rows: list[RunConfig] = []
        for position, seed in enumerate(self.seed_list):
            cells = [
                RunConfig(
                    workload=self.workload,
                    cell=cell,
                    learning_rate=rate,
                    seed=seed,
                    steps=self.steps or problem.steps,
                    batch_size=self.batch_size or problem.batch_size,
                    schedule=self.schedule,
                    warmup=self.warmup,
                    evaluations=min(self.evaluations, self.steps or problem.steps),
                    threads=self.threads,
                    device=self.device,
                    dtype=self.dtype,
                )
                for cell in self.all_cells()
                for rate in self.rates_of(cell)
            ]
            rows += cells if position % 2 == 0 else cells[::-1]
        return rows


# key -> (type as a user writes it, check)
_LISTS = {"optimizers": str, "curvature": str, "trust_region": str, "learning_rates": float}
_SCALARS: dict[str, type] = {
    "workload": str,
    "steps": int,
    "batch_size": int,
    "schedule": str,
    "warmup": float,
    "evaluations": int,
    "threads": int,
    "workers": int,
    "device": str,
    "dtype": str,
    "storage": str,
}
_CELL_KEYS = ("title", "optimizer", "curvature", "trust_region", "options")


@dataclass(frozen=True)
class _Source:
    path: Path
    text: str = field(repr=False)

    def error(self, key: str, problem: str, table: int = -1) -> AblationError:
        return AblationError(f"{self.path}, line {self.line(key, table)}: {key}: {problem}")

    def line(self, key: str, table: int) -> int:
        """The line of a key: at the top level, or in the `table`-th ``[[cells]]``."""
        current = -1
        for number, line in enumerate(self.text.splitlines(), start=1):
            current += bool(re.match(r"\s*\[\[\s*cells\s*\]\]", line))
            if current == table and re.search(rf"""(^|[\s,{{\[])["']?{re.escape(key)}["']?\s*[=\]]""", line):
                return number
        return 1


def read_config(path: Path, overrides: Mapping[str, Any] | None = None) -> Ablation:
    """Read an ablation from a TOML file.

    Args:
        path: the file.
        overrides: values that replace the file's, such as those of the command line.

    Returns:
        The configuration.

    Raises:
        AblationError: with the line and the key of what cannot be read.
    """
    try:
        source = _Source(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise AblationError(f"cannot read configuration {path}: {error}") from error
    try:
        content = tomllib.loads(source.text)
    except tomllib.TOMLDecodeError as error:
        raise AblationError(f"{path}: not TOML: {error}") from error  # the message names line and column
    values: dict[str, Any] = {}
    for key, value in content.items():
        values[key] = _value(source, key, value)
    try:
        return Ablation(**{**values, **(overrides or {})})
    except AblationError as error:
        blamed = [
            name for name in content if re.match(rf"{name}\b", str(error)) and name not in (overrides or {})
        ]
        if not blamed:
            raise
        raise AblationError(f"{path}, line {source.line(blamed[0], -1)}: {error}") from error


def _value(source: _Source, key: str, value: object) -> object:
    if key in _SCALARS:
        return _typed(source, key, value, _SCALARS[key])
    if key in _LISTS:
        if not isinstance(value, list):
            raise source.error(key, f"must be a list, got {value!r}")
        return tuple(_typed(source, key, item, _LISTS[key]) for item in value)
    if key == "seeds":
        if isinstance(value, list):
            return tuple(_typed(source, key, item, int) for item in value)
        return _typed(source, key, value, int)
    if key == "cells":
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise source.error(key, "must be written as [[cells]] tables")
        return tuple(_cell(source, number, item) for number, item in enumerate(value))
    raise source.error(key, str(unknown_name("key", key, [*_SCALARS, *_LISTS, "seeds", "cells"])))


def _typed(source: _Source, key: str, value: object, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        words = {str: "text in quotes", int: "a whole number", float: "a number"}
        raise source.error(key, f"must be {words[kind]}, got {value!r}")
    return value


def _cell(source: _Source, number: int, content: Mapping[str, Any]) -> Cell:
    for key, value in content.items():
        if key not in _CELL_KEYS:
            raise source.error(key, str(unknown_name("key of a cell", key, _CELL_KEYS)), number)
        if key == "options" and not isinstance(value, dict):
            raise source.error(key, f"must be a table such as {{gamma = 0.2}}, got {value!r}", number)
        if key != "options" and not isinstance(value, str):
            raise source.error(key, f"must be text in quotes, got {value!r}", number)
    try:
        names = {key: content.get(key, "") for key in ("optimizer", "curvature", "trust_region", "title")}
        return Cell(**names, options=freeze(content.get("options", {})))
    except AblationError as error:
        first = next(iter(content), "cells")
        raise source.error(first, str(error), number) from error
