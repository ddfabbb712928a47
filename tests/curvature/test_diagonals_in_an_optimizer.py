"""Per-sample and Gauss-Newton diagonals where only the living graph is seen: additive, exact, released."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import (
    EmpiricalFisherDiagonal,
    FisherDiagonal,
    FlooredDiagonal,
    GaussNewtonDiagonal,
    HutchinsonDiagonal,
    LossGraph,
    Observation,
    estimate,
)
from curvature.estimate import add_statistics
from curvature.protocols import State
from optimizers import SecondOrder
from tests.curvature import dense
from tests.curvature.cases import LOSSES, Case, N
from trust_region.registry import trust_regions

#: Losses whose own weights are not those of their curvature: with class-probability targets or smoothing, class weights
#: stand inside the loss; half squares and sums are other units of the same loss.
OTHER_UNITS = ("half squares", "binary, pos_weight", "regression, sum", "probabilities", "everything")
MEAN = [n for n, c in LOSSES.items() if c.likelihood and n not in OTHER_UNITS]


def per_sample(case: Case, model: nn.Module) -> EmpiricalFisherDiagonal:
    return EmpiricalFisherDiagonal(samples="per_sample", model=model, likelihood=case.likelihood)  # type: ignore[arg-type]


def measured(estimator: Any, case: Case, model: nn.Module, scale: float = 1.0) -> Tensor:
    params = dense.trainable(model)
    state = estimator.init(params)
    outputs = model(case.inputs)
    statistics = estimator.measure(
        state, LossGraph(scale * case.loss_fn(outputs, case.target), params, outputs)
    )
    return dense.flat(next(iter(statistics.values())))


@pytest.mark.parametrize("name", MEAN)
def test_per_sample_weights_are_read_from_the_losses_curvature(name: str) -> None:
    case = LOSSES[name]
    model = case.make()
    one_shot = estimate(EmpiricalFisherDiagonal(samples="per_sample"), model, case.loss_fn, [case.batch])
    torch.testing.assert_close(
        measured(per_sample(case, model), case, model), dense.flat(one_shot.diagonal()), rtol=1e-7, atol=1e-10
    )


@pytest.mark.parametrize("name", ["cross entropy", "class weights", "regression", "binary"])
@pytest.mark.parametrize(
    "make", [per_sample, lambda case, model: GaussNewtonDiagonal(model)], ids=["per-sample", "gn"]
)
def test_statistics_of_half_a_loss_are_half_the_statistics(make: Any, name: str) -> None:
    # What accumulation over micro-batches rests on: the user divides each loss by k.
    case = LOSSES[name]
    model = case.make()
    estimator = make(case, model)
    torch.testing.assert_close(measured(estimator, case, model, 0.5), 0.5 * measured(estimator, case, model))


@pytest.mark.parametrize(
    "make", [per_sample, lambda case, model: GaussNewtonDiagonal(model)], ids=["per-sample", "gn"]
)
def test_micro_batches_equal_one_batch(make: Any) -> None:
    case = LOSSES["cross entropy"]
    model = case.make()
    estimator, params = make(case, model), dense.trainable(model)
    state, total = estimator.init(params), {}
    for part in (slice(0, 2), slice(2, N)):
        z = model(case.inputs[part])
        loss = F.cross_entropy(z, case.target[part], reduction="sum") / N
        add_statistics(total, estimator.measure(state, LossGraph(loss, params, z)))
    torch.testing.assert_close(dense.flat(next(iter(total.values()))), measured(estimator, case, model))


def step(model: nn.Module, optimizer: SecondOrder, case: Case) -> weakref.ref[Any]:
    optimizer.zero_grad()
    z = model(case.inputs)
    loss = case.loss_fn(z, case.target)
    node = weakref.ref(loss)
    optimizer.backward(loss, z)
    optimizer.step(loss=loss)
    return node


@pytest.mark.parametrize(
    "make", [per_sample, lambda case, model: GaussNewtonDiagonal(model)], ids=["per-sample", "gn"]
)
def test_it_trains_copies_and_leaves_no_graph(make: Any) -> None:
    case = LOSSES["cross entropy"]
    model = case.make()
    optimizer = SecondOrder(
        model.parameters(),
        lr=0.3,
        curvature=make(case, model),
        trust_region=trust_regions["unbounded"](damping=0.3),
    )
    before = float(case.loss_fn(model(case.inputs), case.target).detach())
    gc.collect()
    gc.disable()
    try:
        nodes = [step(model, optimizer, case) for _ in range(5)]
        assert not any(node() is not None for node in nodes)
    finally:
        gc.enable()
    other, copied = copy.deepcopy((model, optimizer))
    third, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (other, copied), (third, pickled)):
        for _ in range(3):
            step(m, o, case)
    assert float(case.loss_fn(model(case.inputs), case.target).detach()) < before
    for p, q, r in zip(model.parameters(), other.parameters(), third.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_what_the_loop_lacks_is_named() -> None:
    case = LOSSES["cross entropy"]
    model = case.make()
    for estimator, missing in (
        (EmpiricalFisherDiagonal(samples="per_sample"), "model="),
        (EmpiricalFisherDiagonal(samples="per_sample", model=model), "likelihood="),
        (GaussNewtonDiagonal(), "model"),
    ):
        with pytest.raises(ValueError, match=missing):
            measured(estimator, case, model)


def test_sophia_g_draws_differ_between_steps_and_resume_with_the_state() -> None:
    case = LOSSES["cross entropy"]
    model = case.make()
    params = dense.trainable(model)
    estimator = FisherDiagonal("categorical", beta=0.0)
    z = model(case.inputs)
    graph = LossGraph(case.loss_fn(z, case.target), params, z)

    def step(state: State) -> Tensor:
        statistics = estimator.measure(state, graph)
        estimator.update(state, Observation(params, statistics=statistics))
        return estimator.operator(state).diagonal()[0]

    state = estimator.init(params)
    first = step(state)
    resumed = copy.deepcopy(state)
    second, again = step(state), step(resumed)
    assert not torch.equal(first, second)
    assert torch.equal(second, again)


def test_estimate_of_a_wrapped_diagonal_weighs_batches_as_the_wrapped_one_does() -> None:
    """What a sampled diagonal measures is squared after it was added: shares do not multiply it."""
    case = LOSSES["cross entropy"]
    model = case.make()
    batches = [(case.inputs[:1], case.target[:1]), (case.inputs[1:], case.target[1:])]
    inner = FisherDiagonal("categorical", samples=2, beta=0.9)
    plain = estimate(inner, model, case.loss_fn, batches).diagonal()
    for corrected, scale in ((True, 0.5), (False, 0.5 * 0.1)):
        wrapped = FlooredDiagonal(inner, scale=0.5, floor=1e-9, bias_corrected=corrected)
        found = estimate(wrapped, model, case.loss_fn, batches).diagonal()
        for x, h in zip(found, plain, strict=True):
            torch.testing.assert_close(x, (scale * h).clamp(min=1e-9))


@pytest.mark.parametrize("curvature", [HutchinsonDiagonal(), GaussNewtonDiagonal])
def test_a_group_that_is_told_to_climb_later_is_refused(curvature: Any) -> None:
    model = nn.Linear(2, 1)
    curvature = curvature(model) if curvature is GaussNewtonDiagonal else curvature
    optimizer = SecondOrder(
        model.parameters(), lr=0.1, curvature=curvature, trust_region=trust_regions["unbounded"](damping=1.0)
    )
    optimizer.param_groups[0]["maximize"] = True
    outputs = model(torch.ones(3, 2))
    loss = outputs.square().mean()
    optimizer.backward(loss, outputs)
    with pytest.raises(ValueError, match=r"maximize=True works with .* only gradients; negate the loss"):
        optimizer.step()
