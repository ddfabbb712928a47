"""The configurations that come with the package: they can be run, and the controls control what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimizers.ablation import Cell, RunConfig, adapter, read_study
from optimizers.ablation.config_file import find, read_config, studies
from optimizers.ablation.data import FASHION_MNIST, MNIST, locate
from optimizers.ablation.intervals import FEWEST
from optimizers.ablation.protocol import dimensions, samples
from optimizers.ablation.run import check, train

CONTROLS = {cell.label: cell for cell in read_config("controls").all_cells()}
needs_data = pytest.mark.skipif(
    locate(FASHION_MNIST) is None or locate(MNIST) is None, reason="no data sets here"
)


def test_every_configuration_has_a_line_on_what_it_is_and_is_found_by_name() -> None:
    assert all(len(summary) > 20 for summary in studies().values())
    assert find("controls").is_file()
    with pytest.raises(Exception, match="unknown configuration 'control': did you mean 'controls'"):
        find("control")


@pytest.mark.parametrize("name", sorted(studies()))
def test_every_cell_is_tuned_in_a_written_space_with_the_same_budget(name: str) -> None:
    for ablation in read_study(name):
        assert ablation.tune >= 3
        for cell in ablation.all_cells():
            assert dimensions(ablation, cell) or cell.replay, cell.label


def test_the_study_has_every_workload_and_method_that_was_asked_for() -> None:
    found = read_study("study")
    assert [ablation.workload for ablation in found] == [
        "digits", "fashion-mnist-logistic", "fashion-mnist", "fashion-mnist-2c2d", "mnist-autoencoder",
        "mnist-conv-autoencoder", "character-gpt",
    ]  # fmt: skip
    names = {cell.name for cell in found[0].all_cells()}
    wanted = {
        "torch-sgd",
        "torch-adamw",
        "muon",
        "soap",
        "shampoo",
        "kfac",
        "ekfac",
        "sophia-h",
        "adahessian",
        "tadam",
    }
    assert wanted | {"soaa"} <= names
    assert set(CONTROLS) <= {cell.label for cell in found[0].all_cells()} | {"AdamW"}
    assert not any(dict(cell.options).get("weight_decay") for cell in found[0].all_cells())


CONFIGURATIONS = Path(__file__).parents[2] / "docs" / "results" / "study" / "configurations"
COMPLETE = ("digits", "fashion-mnist-logistic", "character-gpt")


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_study_that_is_reported_gives_every_cell_one_budget_and_compares_with_adamw(path: Path) -> None:
    (reported,) = read_study(path)
    labels = [cell.label for cell in reported.all_cells()]
    assert "AdamW" in labels
    assert path.stem.startswith(reported.workload)
    assert len(reported.seed_list) >= FEWEST
    # one number is searched for each, so that as many trials are as dense for all
    assert all(cell.replay or len(dimensions(reported, cell)) == 1 for cell in reported.all_cells())
    if path.stem in COMPLETE:
        shipped = {cell.label for cell in read_study("study")[0].all_cells()}
        assert shipped - set(labels) == {"Muon (PyTorch's, AdamW beside it)", "Sophia-G"}


@needs_data
@pytest.mark.parametrize("name", sorted(studies()))
def test_every_first_run_can_start(name: str) -> None:
    ablation = read_study(name)[0]
    for run in samples(ablation):
        check(run)


def _config(cell: Cell, **changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "workload": "digits", "learning_rate": 0.003, "seed": 0, "steps": 60, "batch_size": 32, "evaluations": 6,
        "read_test": False, "dtype": "float64",
    }  # fmt: skip
    return RunConfig(cell=cell, **{**fields, **changes})


def test_fisher_branch_off_is_adam_times_its_own_radius() -> None:
    off = train(_config(CONTROLS["SOAA, Fisher branch off"], steps=150))
    radius = off["trace"]["radius"]
    assert len(set(radius)) > 20
    assert not any(off["trace"]["fisher_active_fraction"])
    again = train(_config(Cell("torch-adamw"), steps=150), factors=[1.0, *radius[:-1]])
    assert again["curve"]["train_loss"] == pytest.approx(off["curve"]["train_loss"], rel=1e-6)


def _soaa_by_hand(steps: int, lr: float, *, adapts: bool) -> float:
    """SOAA's equations (arXiv 2410.02293) with d = 1 or not, on one fixed batch; the final loss."""
    model, x, y = _problem()
    params = list(model.parameters())
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    d, smooth, predicted = 1.0, 0.0, 0.0
    for t in range(1, steps + 1):
        loss = nn.functional.cross_entropy(model(x), y)
        grads, loss = torch.autograd.grad(loss, params), loss.detach()
        for m_i, v_i, g in zip(m, v, grads, strict=True):
            m_i.mul_(0.9).add_(0.1 * g)
            v_i.mul_(0.999).add_(0.001 * g * g)
        mh = [m_i / (1 - 0.9**t) for m_i in m]
        vh = [v_i / (1 - 0.999**t) for v_i in v]
        s = sum(float((a * a).sum()) for a in mh) / sum(float((b + 1e-8).sum()) for b in vh)
        us = [d * a / (torch.maximum(d * (1 + s) * b, b.sqrt()) + 1e-8) for a, b in zip(mh, vh, strict=True)]
        smooth = 0.9 * smooth + 0.1 * float(loss)
        if adapts:
            rho = (smooth / (1 - 0.9**t) - float(loss)) / max(predicted, 1e-8)
            next_d = min(max(rho * d, 0.9 ** ((t - 1) / steps)), 1 + 0.1 ** ((t - 1) / steps)) if t > 1 else d
            predicted = lr * sum(
                float((a * u).sum() - 0.5 * (b * u * u).sum()) for a, b, u in zip(mh, vh, us, strict=True)
            )
            d = next_d
        with torch.no_grad():
            for p, u in zip(params, us, strict=True):
                p.sub_(lr * u)
    return float(nn.functional.cross_entropy(model(x), y).detach())


def _problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(6, 3, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x = 9 * torch.randn(
        40, 6, generator=generator, dtype=torch.float64
    )  # large gradients: the Fisher branch lives
    return model, x, torch.randint(3, (40,), generator=generator)


@pytest.mark.parametrize(("title", "adapts"), [("SOAA, fixed radius", False), ("SOAA", True)])
def test_control_follows_the_papers_equations(title: str, adapts: bool) -> None:
    model, x, y = _problem()
    optimizer = adapter.build(CONTROLS[title], model, 0.05, 25)
    step = adapter.step_function(optimizer)
    active = []
    for _ in range(25):
        step(model, nn.functional.cross_entropy, x, y)
        active.append(float(optimizer.step_info["fisher_active_fraction"]))  # type: ignore[attr-defined]
    assert max(active) > 0  # else this could not tell it from Adam
    expected = _soaa_by_hand(25, 0.05, adapts=adapts)
    assert float(nn.functional.cross_entropy(model(x), y).detach()) == pytest.approx(expected, rel=1e-9)
    assert expected != pytest.approx(_soaa_by_hand(25, 0.05, adapts=not adapts), rel=1e-4)


def test_controls_change_something_each(tmp_path: Path) -> None:
    titles = [
        "SOAA",
        "SOAA, fixed radius",
        "SOAA, the model's prediction",
        "SOAA, a scale and radius for each tensor",
        "Tadam",
    ]
    curves = [train(_config(CONTROLS[title]))["curve"]["train_loss"][-1] for title in titles]
    assert len(set(curves)) == len(titles)


@needs_data
def test_a_study_runs_workload_by_workload_into_folders_of_their_own(tmp_path: Path) -> None:
    from optimizers.ablation import ablate_study

    small = dataclasses.replace(
        read_config("controls"), tune=3, extensions=0, seeds=1, steps=3, evaluations=1
    )
    other = dataclasses.replace(small, workload="fashion-mnist-logistic", cells=small.cells[:2])
    outcomes = ablate_study([small, other], tmp_path)
    assert [outcome.folder.name for outcome in outcomes] == ["digits", "fashion-mnist-logistic"]
    assert len(outcomes[0].rows) == len(CONTROLS)
    assert not any(row.error for outcome in outcomes for row in outcome.rows)
