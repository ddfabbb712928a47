from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch

from optimizers.ablation import Ablation, AblationError, Cell, RunConfig, ablate, read_outcome, workload
from optimizers.ablation import protocol as protocol_module
from optimizers.ablation import run as run_module
from optimizers.ablation.interleave import train_in_turns
from optimizers.ablation.protocol import Protocol, samples
from optimizers.ablation.space import Dimension, quasi_random, space
from optimizers.ablation.store import Store
from optimizers.ablation.workload import Batch, Data, Split

TUNED = Ablation(optimizers=("torch-sgd", "torch-adamw", "kfac:damping=fixed"), tune=4, seeds=2, steps=5)


def _finish(store: Store, runs: list[RunConfig], loss: Any) -> None:
    """Write results as if the runs had been made: the loss is a function of the setting."""
    for run in runs:
        value = loss(run)
        result = {
            "diverged": not math.isfinite(value), "validation_loss": value, "learning_rate": run.learning_rate,
        }  # fmt: skip
        store.save(
            run.key,
            {"key": run.key, "status": "done", "config": run.as_dict(), "result": result, "curve": {}},
        )


def _stages(ablation: Ablation, folder: Path, loss: Any) -> tuple[list[list[RunConfig]], Protocol]:
    protocol = Protocol(ablation, Store(folder))
    found = []
    for runs in protocol.stages():
        found.append(runs)
        _finish(protocol.store, runs, loss)
    return found, protocol


def _inside(run: RunConfig) -> float:
    """Least at a point of each cell's search that is no edge of it."""
    cell = run.cell.title or run.cell.label
    dims = space(Cell.parse(cell))
    middle = sorted(p["lr"] for p in quasi_random(dims, 4, 0))[1]
    return 1 + abs(math.log(run.learning_rate / middle))


def test_every_cell_gets_the_same_number_of_trials_and_then_its_seeds_at_the_best(tmp_path: Path) -> None:
    ablation = Ablation(optimizers=("torch-sgd", "torch-adamw"), tune=4, seeds=2, steps=5)
    (trials, finals), protocol = _stages(ablation, tmp_path, _inside)
    assert [len(tuning.trials) for tuning in protocol.tunings] == [4, 4]
    assert len({run.key for run in trials}) == 8
    assert all(run.seed == 1000 and not run.read_test for run in trials)
    for tuning in protocol.tunings:
        best = min(tuning.trials, key=lambda trial: trial.loss)
        assert [r.learning_rate for r in finals if r.cell == tuning.cell] == [best.point["lr"]] * 2
    assert [run.seed for run in finals] == [0, 0, 1, 1]
    assert all(run.read_test for run in finals)


def test_points_are_a_sobol_sequence_in_the_logarithm_of_the_written_range() -> None:
    (dimension,) = space(Cell("torch-adamw"))
    points = [point["lr"] for point in quasi_random([dimension], 8, 0)]
    assert all(dimension.low <= value <= dimension.high for value in points)
    unit = sorted(math.log(v / dimension.low) / math.log(dimension.high / dimension.low) for v in points)
    # of a scrambled Sobol sequence's first 8 points one lies in every eighth
    assert [int(u * 8) for u in unit] == list(range(8))
    reference = scipy.stats.qmc.Sobol(1, scramble=True, seed=0).random(8)
    assert unit == pytest.approx(sorted(reference[:, 0]), abs=1e-3)


def test_cells_of_one_space_try_the_same_points_and_others_the_same_places_of_theirs() -> None:
    cells = ("torch-adamw", "soaa", "tadam", "torch-sgd", "soap")
    ablation = Ablation(optimizers=cells, tune=6, seeds=1, steps=5)
    rates: dict[str, list[float]] = {name: [] for name in cells}
    for run in ablation.runs():
        assert run.learning_rate is not None
        rates[run.cell.name].append(run.learning_rate)
    assert rates["torch-adamw"] == rates["soaa"] == rates["tadam"]
    places = []
    for name in ("torch-adamw", "torch-sgd", "soap"):
        (dimension,) = space(Cell(name))
        decades = math.log(dimension.high / dimension.low)
        places.append([math.log(rate / dimension.low) / decades for rate in rates[name]])
    assert places[0] == pytest.approx(places[1], abs=1e-3)  # values have 4 digits
    assert places[0] == pytest.approx(places[2], abs=1e-3)


@pytest.mark.parametrize("upwards", [True, False])
def test_a_best_at_an_edge_extends_that_side_and_no_other_cell(tmp_path: Path, upwards: bool) -> None:
    def loss(run: RunConfig) -> float:
        if run.cell.name != "torch-sgd":
            return _inside(run)
        return -math.log(run.learning_rate) if upwards else math.log(run.learning_rate)

    ablation = Ablation(optimizers=("torch-sgd", "torch-adamw"), tune=4, seeds=1, steps=5)
    stages, protocol = _stages(ablation, tmp_path, loss)
    assert [len(runs) for runs in stages] == [8, 2, 2, 2]  # 4 each; two extensions of one; one seed each
    first, second, third = (
        [r.learning_rate for r in runs if r.cell.name == "torch-sgd"] for runs in stages[:3]
    )
    if upwards:
        assert max(first) <= min(second) <= max(second) <= min(third)
        assert max(third) <= 100.0  # two decades beyond 1
    else:
        assert min(first) >= max(second) >= min(second) >= max(third)
    assert [t.extension for t in protocol.tunings[0].trials] == [0] * 4 + [1] * 2 + [2] * 2
    assert {t.extension for t in protocol.tunings[1].trials} == {0}
    best = protocol.tunings[0].best
    assert best is not None
    assert best.config.learning_rate == (max if upwards else min)(third)


def test_further_numbers_are_searched_extended_and_set(tmp_path: Path) -> None:
    def loss(run: RunConfig) -> float:
        return -math.log(dict(run.cell.options)["initial_damping"]) + abs(math.log(run.learning_rate / 0.1))

    ablation = Ablation(optimizers=("kfac:damping=fixed",), tune=4, extensions=1, seeds=1, steps=5)
    (trials, more, finals), protocol = _stages(ablation, tmp_path, loss)
    assert [set(trial.point) for trial in protocol.tunings[0].trials] == [
        {"lr", "initial_damping", "radius"}
    ] * 6
    largest = max(dict(run.cell.options)["initial_damping"] for run in trials)
    assert all(dict(run.cell.options)["initial_damping"] >= largest for run in more)
    best = min(trials + more, key=loss)
    assert finals[0].cell.options == best.cell.options
    assert finals[0].cell.label == "kfac:damping=fixed"  # under the name that it was asked for by


def test_a_search_in_which_everything_diverged_is_not_extended(tmp_path: Path) -> None:
    ablation = Ablation(optimizers=("torch-sgd",), tune=3, seeds=1, steps=5)
    stages, protocol = _stages(ablation, tmp_path, lambda run: math.inf)
    assert [len(runs) for runs in stages] == [3, 1]
    assert all(trial.diverged for trial in protocol.tunings[0].trials)


def test_what_judges_its_own_trials_has_no_search() -> None:
    ablation = Ablation(
        optimizers=("hessian+ratio", "trust-region-newton", "identity+rms-box"), tune=3, seeds=1
    )
    found = [protocol_module.dimensions(ablation, cell) for cell in ablation.all_cells()]
    assert found == [(), (), (Dimension("lr", 1e-4, 1.0),)]
    assert len({run.cell for run in samples(ablation)}) == 3


def test_tuning_for_real_is_resumed_from_its_runs_and_reads_the_test_once(tmp_path: Path) -> None:
    ablation = Ablation(
        optimizers=("torch-sgd", "soaa", "torch-adamw:replay=soaa"),
        tune=3,
        extensions=0,
        seeds=2,
        steps=6,
        evaluations=2,
    )
    whole = ablate(ablation, tmp_path / "whole")
    files = sorted((tmp_path / "whole/runs").glob("*.json"))
    records = [json.loads(path.read_text()) for path in files]
    assert len(records) == 2 * 3 + 3 * 2
    assert sum("test_loss" in record["result"] for record in records) == 3 * 2
    written = json.loads((tmp_path / "whole/search_space.json").read_text())
    assert written["cells"]["soaa"] == {"lr": {"low": 1e-4, "high": 1e-2}}
    # half of the runs vanish: exactly these are made again, with the same numbers
    for path in files[::2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in files[1::2]}
    assert not read_outcome(tmp_path / "whole").complete
    again = ablate(ablation, tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sorted((tmp_path / "whole/runs").glob("*.json")) == files
    clock = ("ms/step", "CPU ms/step", "seconds to target")
    tables = [[{k: v for k, v in row.items() if k not in clock} for row in o.table()] for o in (whole, again)]
    assert tables[0] == tables[1]
    assert read_outcome(tmp_path / "whole").table() == again.table()


def test_replaying_cell_runs_last_with_the_rate_and_radius_of_the_same_seed(tmp_path: Path) -> None:
    ablation = Ablation(
        optimizers=("torch-adamw:replay=soaa", "soaa"),
        learning_rates=(1e-3, 3e-3),
        seeds=2,
        steps=110,
        evaluations=1,
    )
    outcome = ablate(ablation, tmp_path)
    rows = {row.cell.label: row for row in outcome.best}
    source, replay = rows["soaa"], rows["torch-adamw:replay=soaa"]
    assert replay.learning_rate == source.learning_rate
    assert [r["config"]["replay"] for r in replay.records] == [r["key"] for r in source.records]
    assert [r["config"]["seed"] for r in replay.records] == [0, 1]
    # wherever the Fisher branch is dead, SOAA is AdamW times its radius
    assert max(max(r["trace"]["fisher_active_fraction"]) for r in source.records) == 0
    assert replay.values("validation_loss") == pytest.approx(source.values("validation_loss"), rel=1e-4)
    plain = ablate(
        Ablation(optimizers=("torch-adamw",), learning_rates=(source.learning_rate,), seeds=2, steps=110),
        tmp_path / "b",
    )
    assert plain.rows[0].values("validation_loss") != pytest.approx(
        source.values("validation_loss"), rel=1e-4
    )


def test_replaying_what_has_no_radius_is_a_failed_run_that_says_so(tmp_path: Path) -> None:
    ablation = Ablation(
        optimizers=("torch-adamw:replay=torch-sgd", "torch-sgd"), learning_rates=(0.1,), seeds=1, steps=3
    )
    rows = {row.cell.name: row for row in ablate(ablation, tmp_path).rows}
    assert "no radius" in rows["torch-adamw"].error
    assert not rows["torch-sgd"].error


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tune": 2}, "tune must be 0"),
        ({"tune": -1}, "tune must be 0"),
        ({"tune": 3, "learning_rates": (0.1,)}, "learning_rates must be empty"),
        ({"tune": 3, "seeds": (1000,)}, "tune_seed"),
        ({"extensions": -1}, "extensions must be >= 0"),
        ({"interleave": True, "workers": 2}, "interleave must be false"),
    ],
)
def test_a_protocol_that_is_not_possible_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(AblationError, match=words):
        Ablation(**fields)


@pytest.mark.parametrize("replay", ["absent", "torch-adamw:replay=absent"])
def test_a_replay_of_no_other_cell_is_refused(replay: str) -> None:
    with pytest.raises(AblationError, match="replay must be"):
        Ablation(optimizers=("torch-sgd", "torch-adamw:replay=absent", f"soaa:replay={replay}")).all_cells()


def test_interleaved_runs_give_the_numbers_of_runs_one_after_the_other(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "optimizers": ("torch-sgd", "sophia-g", "torch-adamw:replay=soaa", "soaa"), "learning_rates": (0.01,),
        "seeds": 1, "steps": 12, "evaluations": 6,
    }  # fmt: skip
    tables, orders = [], []
    for interleave in (False, True):
        order: list[str] = []
        out = tmp_path / str(interleave)
        outcome = ablate(
            Ablation(**fields, interleave=interleave), out, lambda c, s, o=order: o.append(c.cell.name)
        )
        orders.append(order)
        tables.append([[r["curve"]["train_loss"] for r in row.records] for row in outcome.rows])
        assert all(bool(r.get("interleaved")) == interleave for row in outcome.rows for r in row.records)
    assert tables[0] == tables[1]
    switches = [sum(a != b for a, b in itertools.pairwise(order)) for order in orders]
    assert switches[1] > 10 > switches[0]  # they did take turns


def test_turns_are_taken_forwards_and_backwards() -> None:
    order: list[str] = []
    runs = [
        (
            RunConfig("digits", Cell(name), 0.01, 0, 8, 8, evaluations=4, read_test=False),
            lambda step, name=name: order.append(f"{name} {step}"),
            None,
        )
        for name in ("torch-sgd", "torch-adamw", "soaa")
    ]
    records = dict(train_in_turns(runs))
    expected = []
    for turn, step in enumerate((2, 4, 6, 8)):
        names = ("torch-sgd", "torch-adamw", "soaa")
        expected += [f"{name} {step}" for name in (names if turn % 2 == 0 else names[::-1])]
    assert order == expected
    assert all(record["interleaved"] for record in records.values())


def test_the_clock_of_a_run_stands_still_while_it_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of the test's own: a batch takes a second, a batch of an evaluation a hundred."""
    now = [0.0]

    class Slow:
        def __init__(self, data: Data) -> None:
            self._data = data

        def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
            for batch in self._data.batches(batch_size, generator):
                now[0] += 1
                yield batch

        def evaluation(self, split: Split, limit: int | None = None) -> Iterator[Batch]:
            now[0] += 100
            return self._data.evaluation(split, limit)

    digits = workload.get("digits")
    monkeypatch.setattr(
        workload, "get", lambda name: dataclasses.replace(digits, data=lambda: Slow(digits.data()))
    )
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: now[0])
    record = run_module.train(RunConfig("digits", Cell("torch-adamw"), 0.01, 0, 6, 8, evaluations=3))
    assert record["curve"]["seconds"] == [0, 2, 4, 6]
    assert record["result"]["seconds"] == 6
    assert record["result"]["seconds_per_step"] == 1
    assert now[0] > 100 * 8  # train and validation at four points, and more at the end
