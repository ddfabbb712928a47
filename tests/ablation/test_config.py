from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from optimizers.ablation import Ablation, AblationError, Cell, RunConfig, adapter, read_config, read_study
from optimizers.ablation.protocol import samples
from optimizers.ablation.run import check

GOOD = """
workload = "digits"
optimizers = ["torch-sgd", "torch-adamw:weight_decay=0.1"]
learning_rates = [1, 0.1]
seeds = [3, 5]
steps = 7

[[cells]]
title = "plain"
optimizer = "torch-sgd"
options = {momentum = 0.0}
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "ablation.toml"
    path.write_text(text)
    return path


def test_file_is_read_and_overridden(tmp_path: Path) -> None:
    ablation = read_config(_write(tmp_path, GOOD), {"steps": 9})
    assert ablation.steps == 9
    assert ablation.learning_rates == (1.0, 0.1)
    assert [cell.label for cell in ablation.all_cells()] == [*ablation.optimizers, "plain"]
    assert ablation.cells[0].options == (("momentum", 0.0),)
    assert len(ablation.runs()) == 3 * 2 * 2


@pytest.mark.parametrize(
    ("line", "bad", "number", "words"),
    [
        ("steps = 7", 'steps = "7"', 6, ["steps", "whole number", "'7'"]),
        ("steps = 7", "steps = true", 6, ["steps", "whole number"]),
        ("steps = 7", "steps = 0", 6, ["steps", ">= 1", "0"]),
        ("steps = 7", "stpes = 7", 6, ["stpes", "'steps'"]),
        ("learning_rates = [1, 0.1]", "learning_rates = [1, -0.1]", 4, ["learning_rates", "> 0", "-0.1"]),
        ("learning_rates = [1, 0.1]", "learning_rates = 0.1", 4, ["learning_rates", "list"]),
        ('optimizer = "torch-sgd"', 'optimiser = "torch-sgd"', 10, ["optimiser", "'optimizer'"]),
        ("options = {momentum = 0.0}", "options = {momentum = {}}", 9, ["option must be"]),
        ("options = {momentum = 0.0}", "options = 3", 11, ["options", "table"]),
        ("seeds = [3, 5]", "seeds = [3, 3]", 5, ["seeds", "different"]),
        ("seeds = [3, 5]", "seeds = [3, 5", 6, ["steps", "not TOML"]),
        ("seeds = [3, 5]", "seeds = ", 5, ["seeds", "not TOML", "column"]),
        ('workload = "digits"', 'workload = "digit"', 2, ["workload", "'digits'"]),
        ("seeds = [3, 5]", 'curvature = ["kfca"]', 5, ["curvature", "'kfac'"]),
        ('["torch-sgd"', '["torch-sdg"', 3, ["optimizers", "'torch-sgd'"]),
    ],
)
def test_bad_configuration_names_line_and_key(
    tmp_path: Path, line: str, bad: str, number: int, words: list[str]
) -> None:
    assert line in GOOD
    with pytest.raises(AblationError) as caught:
        read_config(_write(tmp_path, GOOD.replace(line, bad)))
    message = str(caught.value)
    assert f"line {number}" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("good", "bad", "line", "words"),
    [
        (
            'optimizer = "torch-sgd"\noptions = {momentum = 0.0}',
            'optimizer = "torch-sdg"',
            10,
            "optimizer.*'torch-sgd'",
        ),
        ("momentum", "momentun", 11, "options.*'momentum'"),
    ],
)
def test_cell_of_a_file_that_cannot_be_built_names_its_line(
    tmp_path: Path, good: str, bad: str, line: int, words: str
) -> None:
    def read_and_check() -> None:
        check(samples(read_config(_write(tmp_path, GOOD.replace(good, bad))))[-1])

    with pytest.raises(AblationError, match=rf"line {line}: .*{words}"):
        read_and_check()


def test_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("steps = 4\n", encoding="utf-8-sig")  # as editors on Windows write it
    assert read_config(path).steps == 4


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AblationError, match=r"absent\.toml"):
        read_config(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("workers", 0),
        ("threads", -1),
        ("evaluations", 0),
        ("evaluation_samples", 0),
        ("batch_size", 0),
        ("seeds", 0),
        ("seeds", (1, 1)),
        ("seeds", (-1,)),
        ("learning_rates", (0.0,)),
        ("learning_rates", (float("nan"),)),
        ("warmup", 1.0),
        ("schedule", "cosin"),
        ("dtype", "float33"),
        ("curvature", ("kfac",)),
    ],
)
def test_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(AblationError, match=field):
        Ablation(**{field: value})


def _run(**changes: object) -> RunConfig:
    fields = {
        "workload": "digits",
        "cell": Cell("torch-sgd"),
        "learning_rate": 0.1,
        "seed": 0,
        "steps": 5,
        "batch_size": 8,
    }
    return RunConfig(**{**fields, **changes})


def test_key_follows_everything_that_changes_numbers_and_no_title() -> None:
    changes = [
        {"workload": "fashion-mnist"}, {"cell": Cell("torch-adamw")}, {"learning_rate": 0.2}, {"seed": 1},
        {"steps": 6}, {"batch_size": 9}, {"schedule": "cosine"}, {"warmup": 0.5}, {"evaluations": 3},
        {"evaluation_samples": 7},
        {"threads": 2}, {"device": "cuda"}, {"dtype": "float64"}, {"read_test": False}, {"replay": "abc"},
        {"cell": Cell("torch-sgd", options=(("momentum", 0.5),))},
    ]  # fmt: skip
    keys = {_run(**change).key for change in changes}
    assert len(keys | {_run().key}) == len(changes) + 1
    assert _run(cell=Cell("torch-sgd", title="other")).key == _run().key
    for run in (_run(), _run(evaluation_samples=7)):
        assert RunConfig.from_dict(run.as_dict()) == run
    assert _run().key == "5e0cffa8a74406c1"  # finished runs of older folders are found under their names


def test_order_alternates_over_seeds_so_that_drift_hits_all_cells() -> None:
    ablation = Ablation(optimizers=("torch-sgd", "torch-adamw"), learning_rates=(0.1,), seeds=2)
    order = [(run.cell.name, run.seed) for run in ablation.runs()]
    assert order == [("torch-sgd", 0), ("torch-adamw", 0), ("torch-adamw", 1), ("torch-sgd", 1)]


def test_two_cells_of_one_title_are_refused() -> None:
    cells = (Cell("torch-sgd", title="x"), Cell("torch-adamw", title="x"))
    with pytest.raises(AblationError, match="titles"):
        Ablation(cells=cells).all_cells()


def test_a_cells_own_rate_is_the_one_that_runs() -> None:
    """Not the one of ``--lr``: rows of different rates would else be the same run under different names."""
    runs = Ablation(
        workload="digits", optimizers=["adamw", "soaa:lr=0.2"], learning_rates=[0.1, 0.3], seeds=1, steps=5
    ).runs()
    rates = sorted((run.cell.optimizer, run.learning_rate) for run in runs if run.learning_rate is not None)
    assert rates == [("adamw", 0.1), ("adamw", 0.3)]
    (own,) = [run for run in runs if run.cell.optimizer == "soaa"]
    model = torch.nn.Linear(2, 2)
    assert adapter.build(own.cell, model, own.learning_rate, 5).param_groups[0]["lr"] == 0.2
    with pytest.raises(AblationError, match=r"the cell sets lr=0.2, and the run 0.1: give one of them"):
        adapter.build(own.cell, model, 0.1, 5)


YAML = """
workload: digits
optimizers: [torch-sgd]
learning_rates: [1, 0.1]
steps: 7
cells:
  - title: plain
    optimizer: torch-sgd
    options: {momentum: 0.0}
  - title: other
    optimizer: soaa
"""


def test_yaml_says_the_same_as_toml(tmp_path: Path) -> None:
    toml = read_config(
        _write(tmp_path, GOOD.replace('"torch-adamw:weight_decay=0.1"', "").replace("seeds = [3, 5]", ""))
    )
    path = tmp_path / "ablation.yaml"
    path.write_text(YAML[: YAML.index("  - title: other")])
    assert read_config(path) == toml


@pytest.mark.parametrize(
    ("line", "bad", "number", "words"),
    [
        ("steps: 7", "steps: seven", 5, ["steps", "whole number", "'seven'"]),
        ("steps: 7", "stpes: 7", 5, ["stpes", "'steps'"]),
        ("steps: 7", "steps: 0", 5, ["steps", ">= 1"]),
        ("learning_rates: [1, 0.1]", "learning_rates: [1e-3]", 4, ["learning_rates", "written 1.0e-3"]),
        ("    optimizer: soaa", "    optimiser: soaa", 11, ["optimiser", "'optimizer'"]),
        ("steps: 7", "steps: [7", 6, ["not YAML"]),
        ("workload: digits", "just text", 2, ["YAML"]),
    ],
)
def test_bad_yaml_names_line_and_key(
    tmp_path: Path, line: str, bad: str, number: int, words: list[str]
) -> None:
    assert line in YAML
    path = tmp_path / "ablation.yml"
    path.write_text(YAML.replace(line, bad))
    with pytest.raises(AblationError) as caught:
        read_config(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert re.search(rf"line ({number}|{number + 1})\b", message), message


def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ablation.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(AblationError, match="must be a mapping"):
        read_config(path)


STUDY = """
optimizers = ["torch-sgd"]
steps = 7

[[workloads]]
workload = "digits"
seeds = 2

[[workloads]]
workload = "fashion-mnist"
steps = 9
"""


def test_a_study_has_an_ablation_for_each_workload(tmp_path: Path) -> None:
    path = _write(tmp_path, STUDY)
    found = read_study(path)
    assert [(a.workload, a.steps, a.seeds) for a in found] == [("digits", 7, 2), ("fashion-mnist", 9, 3)]
    assert read_study(path, {"workload": "fashion-mnist", "seeds": 1}) == (
        Ablation(workload="fashion-mnist", optimizers=("torch-sgd",), steps=9, seeds=1),
    )
    assert read_config(path, {"workload": "character-gpt"}).steps == 7
    with pytest.raises(AblationError, match="names 2 workloads"):
        read_config(path)


@pytest.mark.parametrize(
    ("line", "bad", "number", "words"),
    [
        ("steps = 9", "steps = 0", 11, ["steps", ">= 1"]),
        ("steps = 9", "stps = 9", 11, ["stps", "'steps'"]),
        ("steps = 7", "steps = 0", 3, ["steps", ">= 1"]),
        ('workload = "fashion-mnist"', 'workload = "digits"', 10, ["has a table already"]),
        ('workload = "fashion-mnist"', "seeds = 4", 10, ["names no workload"]),
        ("seeds = 2", "cells = []", 7, ["cells"]),
    ],
)
def test_bad_study_names_line_and_key(
    tmp_path: Path, line: str, bad: str, number: int, words: list[str]
) -> None:
    assert line in STUDY
    with pytest.raises(AblationError) as caught:
        read_study(_write(tmp_path, STUDY.replace(line, bad)))
    assert f"line {number}" in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_ablation_survives_its_own_json(tmp_path: Path) -> None:
    cells = (Cell("soaa", options=(("betas", (0.9, 0.99)),), title="x"), Cell("torch-adamw", replay="x"))
    ablation = Ablation(cells=cells, tune=4, seeds=(3, 5), schedule="cosine")
    assert Ablation.from_dict(json.loads(json.dumps(ablation.as_dict()))) == ablation
