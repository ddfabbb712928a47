from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import pytest
import torch
from torch import nn

from optimizers.ablation import AblationError, Cell, RunConfig, TensorData, Workload, workload
from optimizers.ablation import run as run_module
from optimizers.ablation.adapter import build, judges_trials, step_function
from optimizers.ablation.run import check, state_bytes, train
from optimizers.ablation.schedule import factor


def _config(cell: str = "torch-adamw", **changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "workload": "digits", "learning_rate": 0.003, "seed": 0, "steps": 20, "batch_size": 32, "evaluations": 4,
    }  # fmt: skip
    return RunConfig(cell=Cell.parse(cell), **{**fields, **changes})


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    clock = ("seconds", "seconds_per_step", "cpu_seconds", "cpu_seconds_per_step")
    result = {name: value for name, value in record["result"].items() if name not in clock}
    curve = {name: value for name, value in record["curve"].items() if name not in clock}
    return {"result": result, "curve": curve, "trace": record["trace"], "key": record["key"]}


@pytest.mark.parametrize(
    "cell",
    [
        "torch-adamw",
        "torch-sgd",
        "torch-muon",
        "soaa",
        "soaa:scope=tensor",
        "kfac",
        "kfac:damping=fixed",
        "ekfac:damping=fixed",
        "adahessian",
        "sophia-h",
        "sophia-g",
        "hutchinson-diagonal+ratio-box",
        "soap",
        "shampoo",
        "trust-region-newton",
    ],
)
def test_two_runs_with_one_seed_give_the_same_numbers_bit_for_bit(cell: str) -> None:
    config = _config(cell, steps=12, evaluations=2, read_test=False)
    first = train(config)
    torch.manual_seed(123)  # whatever happened before in this process changes nothing
    torch.rand(7)
    second = train(config)
    assert first["status"] == "done"
    assert repr(_numbers(first)) == repr(_numbers(second))
    other = train(_config(cell, steps=1, evaluations=1, read_test=False, seed=1))
    assert repr(_numbers(first)["curve"]["train_loss"][0]) != repr(other["curve"]["train_loss"][0])


def test_processor_time_counts_training_and_neither_a_pause_nor_an_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(run_module.time, "process_time", lambda: float(next(ticks)))
    record = train(_config(steps=8, evaluations=4, read_test=False))
    # read before and after each of 4 segments of 2 steps: a second a segment, whatever the wall clock says
    assert record["curve"]["cpu_seconds"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert record["result"]["cpu_seconds"] == 4.0
    assert record["result"]["cpu_seconds_per_step"] == 0.5
    monkeypatch.undo()
    problem = workload.get("digits")
    asleep = dataclasses.replace(
        problem, loss=lambda outputs, target: (time.sleep(0.02), problem.loss(outputs, target))[1]
    )
    monkeypatch.setattr(workload, "get", lambda name: asleep)
    record = train(_config(steps=8, evaluations=4, read_test=False))
    assert record["result"]["seconds"] >= 8 * 0.02
    assert record["result"]["cpu_seconds"] <= record["result"]["seconds"] - 7 * 0.02


def test_cells_of_one_seed_start_at_one_point_and_see_the_same_batches() -> None:
    records = [train(_config(cell, learning_rate=0.0)) for cell in ("torch-adamw", "torch-sgd", "soaa")]
    curves = [record["curve"]["train_loss"] for record in records]
    assert curves[0] == curves[1] == curves[2]
    # nothing moves at lr 0, so equal batch losses mean equal batches
    losses = [record["trace"]["batch_loss"] for record in records]
    assert losses[0] == losses[1] == losses[2]
    assert len(set(losses[0])) == 20


def test_a_run_equals_the_loop_written_by_hand() -> None:
    record = train(_config(dtype="float64", steps=30))
    problem = workload.get("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = problem.model().double()
    data = problem.data().to(torch.device("cpu"), torch.float64)  # type: ignore[attr-defined]
    batches = data.batches(32, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0)
    for _ in range(30):
        inputs, target = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()
    inputs, target = data._splits["test"]
    loss = nn.functional.cross_entropy(model(inputs), target)
    assert record["result"]["test_loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert record["result"]["test_metric"] == pytest.approx(
        (model(inputs).argmax(1) == target).double().mean().item()
    )


def test_the_callers_random_state_threads_and_settings_are_put_back() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(_config(threads=2, steps=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_divergence_ends_a_run_and_is_recorded() -> None:
    record = train(_config("torch-sgd", learning_rate=1e38))
    assert record["status"] == "done"
    assert record["result"]["diverged"]
    assert record["result"]["steps"] < 20


def test_a_failure_is_recorded_and_does_not_end_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("this step cannot be taken")

    monkeypatch.setattr("optimizers.ablation.adapter._plain_step", fails)
    record = train(_config())
    assert record["status"] == "failed"
    assert "this step cannot be taken" in record["error"]


def test_radius_is_recorded_at_every_step_and_replayed_as_a_factor() -> None:
    record = train(_config("soaa", steps=300, evaluations=1))
    assert len(record["trace"]["radius"]) == 300
    assert all(value > 0 for value in record["trace"]["radius"])
    assert len(record["trace"]["fisher_active_fraction"]) == 300
    plain = train(_config("torch-sgd", steps=10))
    assert _numbers(train(_config("torch-sgd", steps=10), factors=[1.0] * 10)) == _numbers(plain)
    stopped = train(_config("torch-sgd", steps=10), factors=[0.0] * 10)["curve"]["train_loss"]
    assert stopped == [stopped[0]] * len(stopped)


def test_schedules_follow_their_closed_form() -> None:
    assert [factor("constant", i, 10, 0.3) for i in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    cosine = [factor("cosine", i, 10, 0.2) for i in range(10)]
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert cosine == pytest.approx(expected)


def test_state_bytes_of_adamw_are_two_moments_and_a_counter_a_tensor() -> None:
    model = nn.Linear(10, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 10)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 4 * 33 + 2 * 4


def test_test_split_is_not_read_where_it_was_not_asked_for() -> None:
    assert "test_loss" not in train(_config(read_test=False))["result"]


def _quadratic() -> Workload:
    x = torch.eye(4)
    return Workload(
        name="quadratic", summary="", model=lambda: nn.Linear(4, 1, bias=False), loss=nn.functional.mse_loss,
        data=lambda: TensorData((x, x.sum(1, keepdim=True)), (x, x[:, :1]), (x, x[:, :1])),
        metric=nn.functional.mse_loss, metric_name="error", higher_is_better=False, steps=5, batch_size=4,
    )  # fmt: skip


@pytest.mark.parametrize("cell", ["hessian+ratio", "identity+cauchy", "hutchinson-diagonal+ratio-box"])
def test_the_closure_loop_is_used_where_a_trial_is_judged(cell: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = _quadratic()
        model = problem.model()
    optimizer = build(Cell.parse(cell), model, None, total_steps=5)
    assert judges_trials(optimizer)
    step = step_function(optimizer)
    inputs, target = next(problem.data().batches(4, torch.Generator().manual_seed(0)))
    forwards: list[bool] = []
    model.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    losses = [float(step(model, problem.loss, inputs, target)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert forwards.count(True) == 5
    assert forwards.count(False) == 5  # the trial points


@pytest.mark.parametrize(
    ("cell", "changes", "words"),
    [
        ("saoa", {}, "'soaa'"),
        ("soaa:gama=0.1", {}, "gamma"),
        ("soaa:gamma=0.3", {}, r"gamma must be in \(0, 0.25\], got 0.3"),
        ("soaa:gamma=0.2x", {}, "read as words, not numbers: gamma='0.2x'"),
        ("torch-adamw:beta=3", {}, "'betas'"),
        ("hesian+unbounded", {}, "'hessian'"),
        ("soaa", {"learning_rate": -1.0}, "-1"),
        ("soaa", {"device": "warp"}, "'warp'"),
        ("soaa", {"workload": "digit"}, "'digits'"),
    ],
)
def test_what_cannot_start_is_one_clear_error_before_training(
    cell: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(AblationError, match=words):
        check(_config(cell, **changes))


def test_every_loss_is_measured_on_the_asked_number_of_samples_at_the_end_too() -> None:
    record = train(_config(steps=2, evaluations=2, evaluation_samples=50))
    assert record["result"]["validation_loss"] == record["curve"]["validation_loss"][-1]
    assert record["result"]["test_metric"] * 50 == pytest.approx(round(record["result"]["test_metric"] * 50))
    whole = train(_config(steps=2, evaluations=2))
    assert whole["result"]["validation_loss"] != record["result"]["validation_loss"]


def test_a_cell_names_a_dtype_as_text() -> None:
    model = nn.Linear(4, 4)
    optimizer = build(Cell.parse("muon:ns_dtype=float64"), model, 0.1, 1)
    twin = build(Cell("muon", options=(("ns_dtype", torch.float64),)), model, 0.1, 1)  # type: ignore[arg-type]
    assert optimizer.trust_region.region.dtype == twin.trust_region.region.dtype == torch.float64  # type: ignore[attr-defined]
    with pytest.raises(AblationError, match="ns_dtype must be a dtype of torch"):
        build(Cell.parse("muon:ns_dtype=float31"), model, 0.1, 1)
    with pytest.raises(AblationError, match="ns_dtype must be a dtype of torch"):
        build(Cell.parse("muon:ns_dtype=nn"), model, 0.1, 1)
