from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from optimizers import SOAP
from optimizers.ablation import Cell, RunConfig, measures, workload
from optimizers.ablation.cost import FlopCounter, StepCost, gradient_flops
from optimizers.ablation.run import step_cost, train


def _cost(cell: str, **changes: Any) -> float:
    return _counted(cell, **changes).later


def _counted(cell: str, **changes: Any) -> StepCost:
    fields: dict[str, Any] = {
        "workload": "digits",
        "learning_rate": 0.01,
        "seed": 0,
        "steps": 40,
        "batch_size": 32,
    }
    return step_cost(RunConfig(cell=Cell.parse(cell), **{**fields, **changes}))


def test_gradient_of_a_linear_network_by_hand() -> None:
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False))
    x = torch.ones(4, 5)
    # forward: every weight once a sample; backward: once for the weight, once for the input that has a gradient
    expected = 2 * 4 * (5 * 7 * 2 + 7 * 3 * 3)
    assert gradient_flops(model, lambda z, t: z.sum(), x, x) == expected
    assert all(p.grad is None for p in model.parameters())


def test_factorisations_are_counted_by_their_leading_term() -> None:
    n = 6
    a = torch.eye(n, dtype=torch.float64) * 2
    expected = {
        torch.linalg.eigh: 9 * n**3, torch.linalg.cholesky: n**3 / 3, torch.linalg.inv: 2 * n**3,
        torch.linalg.qr: 4 * n**3 - 4 * n**3 / 3, torch.linalg.svd: 22 * n**3,
    }  # fmt: skip
    for function, count in expected.items():
        with FlopCounter() as counter:
            function(a)
        assert counter.total == pytest.approx(count), function
    for function, arguments, count in (
        (torch.linalg.solve, (a, torch.ones(n, 2, dtype=torch.float64)), 2 / 3 * n**3 + 2 * n * n * 2),
        (torch.cholesky_solve, (torch.ones(n, 2, dtype=torch.float64), a), 2 * n * n * 2),
        (
            partial(torch.linalg.solve_triangular, upper=True),
            (a, torch.ones(n, 2, dtype=torch.float64)),
            2 * n * n,
        ),
    ):
        with FlopCounter() as counter:
            function(*arguments)  # type: ignore[operator]
        assert counter.total == pytest.approx(count), function


@pytest.mark.parametrize("cell", ["torch-adamw", "torch-sgd", "soaa", "adamw", "tadam"])
def test_elementwise_optimizers_cost_one_gradient(cell: str) -> None:
    assert _cost(cell) == 1.0


def test_hessian_products_and_drawn_labels_are_counted_by_their_interval() -> None:
    every, tenth = _cost("adahessian"), _cost("adahessian:interval=10")
    # the product is 4/3 to 2 gradients more, by double backward of the gradient that the step takes too
    assert 2.0 < every < 3.5
    assert tenth - 1 == pytest.approx((every - 1) / 10, rel=1e-6)
    assert _cost("adahessian:probes=2") - 1 == pytest.approx(2 * (every - 1), rel=0.35)
    drawn = _cost("sophia-g:interval=1")
    # one backward pass (2/3 of a gradient) more for labels from the model, and its squares
    assert 1.5 < drawn < 2.5


def test_trials_and_factors_are_counted() -> None:
    # a trial is one forward pass, a third of a gradient, every step
    assert _cost("identity+cauchy") > 1.3
    rare, often = _cost("kfac:damping=fixed"), _cost("kfac:damping=fixed,inverse_interval=1")
    assert 1.5 < rare < often
    assert _cost("kfac:damping=fixed") == rare  # counted, not measured


def test_steps_that_cost_more_at_the_start_are_counted_each() -> None:
    steps = 45  # 25 with a refresh each and 20 with two
    problem = workload.get("digits")
    model, data = problem.model(), problem.data()
    optimizer = SOAP(model.parameters(), lr=0.01, every_step_until=25)
    batches = data.batches(32, torch.Generator().manual_seed(0))
    counts = []
    for _ in range(steps):
        inputs, target = next(batches)
        gradient = gradient_flops(model, problem.loss, inputs, target)
        with FlopCounter() as counter:
            optimizer.zero_grad()
            problem.loss(model(inputs), target).backward()
            optimizer.step()
        counts.append(counter.total / gradient)
    found = _counted("soap:every_step_until=25", steps=steps)
    assert sum(counts[1:21]) / 20 > 1.15 * sum(counts) / steps  # the first 20 say too much
    for step in (0, 1, 7, 25, steps):
        assert found.of(step) == pytest.approx(sum(counts[:step]), rel=1e-9)
    # an opening as long as the run, or longer, leaves nothing to say of later steps
    assert _counted("soap:every_step_until=25", steps=10).of(10) == pytest.approx(sum(counts[:10]), rel=1e-9)


def test_record_keeps_what_was_spent_at_every_point_and_the_target_is_read_there() -> None:
    config = RunConfig("digits", Cell.parse("soap:every_step_until=25"), 0.01, 0, 60, 32, evaluations=4)
    record, costs = train(config), _counted("soap:every_step_until=25", steps=60)
    spent = record["curve"]["gradients"]
    assert record["curve"]["step"] == [0, 15, 30, 45, 60]
    assert spent == [costs.of(step) for step in (0, 15, 30, 45, 60)]
    assert record["result"]["gradients_per_step"] == spent[-1] / 60 < spent[1] / 15
    goal = record["curve"]["train_loss"][2]
    assert measures.gradients_to(record, "train_loss", goal) == spent[2]
    # of a run from before: its steps are taken to cost alike
    del record["curve"]["gradients"]
    expected = 30 * record["result"]["gradients_per_step"]
    assert measures.gradients_to(record, "train_loss", goal) == expected


def test_counting_changes_no_number_of_the_run() -> None:
    config = RunConfig("digits", Cell("sophia-g"), 0.001, 0, 12, 32, evaluations=2)
    curves = []
    for read_test in (True, False):  # only final runs are counted
        record = train(RunConfig(**{**vars(config), "read_test": read_test}))
        assert (record["result"]["gradients_per_step"] is not None) == read_test
        curves.append(record["curve"]["train_loss"])
    assert curves[0] == curves[1]
