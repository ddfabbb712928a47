"""The presets that the study prints: each runs as printed, is what was run, and has the figures of the tables."""

from __future__ import annotations

import csv
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import optimizers
from optimizers.ablation import adapter, read_outcome
from optimizers.ablation.cell import Cell
from optimizers.ablation.protocol import setting

STUDY = Path(__file__).parents[2] / "docs" / "results" / "study"
HEADING = "## Presets that beat the tuned AdamW"
PARTS = {
    "character language model, 150 steps of 32 windows": "character-gpt-longer",
    "character language model, 60 steps of 8 windows": "character-gpt",
    "logistic regression, 100 steps": "fashion-mnist-logistic",
    "logistic regression, 1,000 steps": "fashion-mnist-logistic-1000",
    "convolutional autoencoder, 100 steps of 32": "mnist-conv-autoencoder",
    "Fashion-MNIST network, 60 steps of 32": "fashion-mnist",
    "Fashion-MNIST convolutional network, 30 steps of 32": "fashion-mnist-2c2d",
    "deep autoencoder, 40 steps of 64": "mnist-autoencoder",
}
CURVE = {"mnist-conv-autoencoder": "training", "mnist-autoencoder": "training"}
NAMES = ("SOAP", "Muon", "KFAC", "EKFAC", "Shampoo", "AdaHessian")
# what a preset's figures do not depend on: the machine's fastest dtype, the length of the run
FREE = {"ns_dtype", "total_steps", "params", "model"}


@dataclass(frozen=True)
class Printed:
    """A line of the table."""

    command: str
    where: str
    steps: str
    processor: str

    @property
    def preset(self) -> str:
        return self.command.partition("(")[0]


def _table() -> list[Printed]:
    text = STUDY.with_suffix(".md").read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    found: list[Printed] = []
    for row in re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE):
        command, where, *figures = row
        found.append(Printed(command, found[-1].where if where == "the same" else where, *figures))
    return found


PRINTED = _table()
OF_PARTS = [line for line in PRINTED if line.where in PARTS]


def _build(command: str, model: nn.Module) -> Any:
    names = {name: getattr(optimizers, name) for name in NAMES}
    return eval(command, {**names, "model": model, "params": list(model.parameters())})


def _arguments(command: str) -> dict[str, Any]:
    """What a printed call passes, defaults included."""
    preset = command.partition("(")[0]
    given: dict[str, Any] = {}

    def note(*positional: Any, **named: Any) -> None:
        given.update(named)

    eval(command, {preset: note, "model": None, "params": None})
    return _with_defaults(preset, given)


def _with_defaults(preset: str, given: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(getattr(optimizers, preset)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    return {name: value for name, value in {**defaults, **given}.items() if name not in FREE}


@pytest.fixture(scope="module")
def raw() -> Iterator[ModuleType]:
    sys.path.insert(0, str(STUDY))
    import raw

    yield raw
    sys.path.remove(str(STUDY))


@pytest.mark.parametrize("command", sorted({line.command for line in PRINTED}))
def test_preset_runs_as_printed(command: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    optimizer = _build(command, model)
    before = [p.detach().clone() for p in model.parameters()]
    step = adapter.step_function(optimizer)  # with a closure where it needs one, as the page says
    for _ in range(3):
        step(model, nn.functional.cross_entropy, x, y)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def _cells(part: str) -> Iterator[tuple[str, str]]:
    """The cells of a part that are presets of the table, and which curve says they are better."""
    kind = CURVE.get(part, "comparisons")
    for line in _lines(STUDY / f"{part}-{kind}.csv"):
        if line["against"] == "AdamW" and line["verdict: steps"] == "better":
            yield line["cell"], kind


def _lines(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("part", sorted(PARTS.values()))
def test_what_is_printed_is_what_was_run_and_nothing_that_was_better_is_left_out(
    part: str, raw: ModuleType, tmp_path: Path
) -> None:
    outcome = read_outcome(raw.unpack(STUDY / "raw" / (part + raw.SUFFIX), tmp_path))
    tunings = {tuning.cell.label: tuning for tuning in outcome.tunings}
    printed = [line for line in OF_PARTS if PARTS[line.where] == part]
    taken: list[Printed] = []
    for label, kind in _cells(part):
        tuning = tunings.get(label)
        if tuning is None or tuning.best is None:  # what replays a radius is no preset
            continue
        cell, rate = setting(tuning.cell, tuning.best.point)
        preset = next((name for name in NAMES if name.lower() == cell.optimizer), None)
        if preset is None:
            continue
        ran = _run(cell, rate, preset)
        fitting = [line for line in printed if line.preset == preset and _same(_arguments(line.command), ran)]
        assert len(fitting) == 1, (label, ran)
        (line,) = fitting
        taken.append(line)
        rows = _lines(STUDY / f"{part}-{kind}.csv")
        (said,) = (row for row in rows if (row["cell"], row["against"]) == (label, "AdamW"))
        assert _numbers(line.steps) == pytest.approx(_numbers(said["steps"]), abs=0.0051)
        assert _numbers(line.processor) == pytest.approx(
            _numbers(said["processor time"]), rel=0.05, abs=0.0051
        )
        assert line.processor.startswith("**") == (said["verdict: processor time"] == "better"), line
    assert sorted(map(repr, taken)) == sorted(
        map(repr, printed)
    )  # and every line of the part is one of its cells


def _run(cell: Cell, rate: float | None, preset: str) -> dict[str, Any]:
    """What a cell passed at its best setting, defaults included."""
    given = dict(cell.options)
    return _with_defaults(preset, given | ({} if rate is None else {"lr": rate}))


def _same(printed: dict[str, Any], run: dict[str, Any]) -> bool:
    return printed.keys() == run.keys() and all(
        printed[name] == (pytest.approx(value, rel=0.05) if isinstance(value, float) else value)
        for name, value in run.items()
    )


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+|inf", text.replace("∞", "inf"))]
