"""The sampled Fisher diagonal: unbiased for every loss variant, and a wrong likelihood is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import FisherDiagonal, LossGraph, estimate
from curvature.likelihood import output_likelihood
from curvature.outputs import output_tensor
from tests.curvature import dense
from tests.curvature.cases import LOSSES, Case, N, X, Y, classes, mlp, reals

LIKELY = {name: case for name, case in LOSSES.items() if case.likelihood}


def graph_of(case: Case) -> LossGraph:
    model = case.make()
    outputs = model(case.inputs)
    return LossGraph(case.loss_fn(outputs, case.target), dense.trainable(model), outputs)


@pytest.mark.parametrize("name", LIKELY)
def test_drawn_output_gradients_have_the_covariance_of_the_losses_curvature(name: str) -> None:
    # 4,000 draws, seed 0: a standard error of about 2 % of the largest entry.
    graph = graph_of(LIKELY[name])
    found = output_likelihood(graph, LIKELY[name].likelihood)  # type: ignore[arg-type]
    H = dense.hessian(graph.loss, [graph.output])
    K = 4_000
    draws = torch.stack([found.draw(0, k).reshape(-1) for k in range(K)])
    covariance = draws.T @ draws / K
    assert dense.relative_error(covariance, H) < 0.12
    assert float(draws.mean(0).abs().max()) < 5 * float(H.diagonal().max() / K) ** 0.5


@pytest.mark.parametrize(
    "name", ["cross entropy", "everything", "sequence", "padding mask", "regression", "binary"]
)
def test_sampled_fisher_approaches_gauss_newton(name: str) -> None:
    # 4,000 draws, seed 0: each entry's relative standard error is at most about √(2/4000) = 2.2 %.
    case = LOSSES[name]
    model = case.make()
    outputs = model(case.inputs)
    exact = dense.gauss_newton(
        case.loss_fn(outputs, case.target), output_tensor(outputs), dense.trainable(model)
    ).diagonal()
    estimator = FisherDiagonal(case.likelihood, samples=4000)  # type: ignore[arg-type]
    found = dense.flat(estimate(estimator, model, case.loss_fn, [case.batch]).diagonal())
    assert float(((found - exact).abs() / exact.clamp(min=1e-12)).max()) < 0.15
    assert float((found / exact.clamp(min=1e-12)).mean() - 1) == pytest.approx(0, abs=0.05)


def test_error_falls_as_one_over_the_root_of_the_samples() -> None:
    case = LOSSES["cross entropy"]
    model = case.make()
    exact = dense.gauss_newton(
        case.loss_fn(z := model(case.inputs), case.target), z, dense.trainable(model)
    ).diagonal()

    def rms(samples: int) -> float:  # over 12 seeds
        errors = []
        for seed in range(12):
            op = estimate(FisherDiagonal("categorical", samples, seed), model, case.loss_fn, [case.batch])
            errors.append((dense.flat(op.diagonal()) - exact).square().mean())
        return float(torch.stack(errors).mean().sqrt())

    assert rms(10) / rms(160) == pytest.approx(4.0, rel=0.35)


def test_same_seed_same_result_and_no_global_random_state() -> None:
    case = LOSSES["cross entropy"]
    model = case.make()
    before = torch.get_rng_state()
    first, again, other = (
        dense.flat(
            estimate(FisherDiagonal("categorical", seed=s), model, case.loss_fn, [case.batch]).diagonal()
        )
        for s in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("loss_fn", "target", "likelihood", "outputs"),
    [
        (nn.MSELoss(), reals(N, 3), "categorical", 3),
        (nn.MSELoss(), reals(N, 3), "bernoulli", 3),
        (nn.MSELoss(), reals(N, 2), "categorical", 2),
        (nn.CrossEntropyLoss(), Y, "gaussian", 3),
        (nn.CrossEntropyLoss(), Y, "bernoulli", 3),
        (nn.BCEWithLogitsLoss(), (reals(N, 1) > 0).double(), "gaussian", 1),
        (nn.BCEWithLogitsLoss(), (reals(N, 2) > 0).double(), "categorical", 2),
        (nn.PoissonNLLLoss(), reals(N, 2).abs(), "gaussian", 2),
        (lambda z, y: F.cross_entropy(z, y).square(), Y, "categorical", 3),
        (lambda z, y: (z[:, 0] - z[:, 1] - y[:, 0]).square().mean(), reals(N, 2), "categorical", 2),
        (lambda z, y: -F.cross_entropy(z, y), Y, "categorical", 3),
        (
            lambda z, y: F.nll_loss(z.softmax(1).clamp(min=1e-6).log(), y) + z.square().mean(),
            Y,
            "categorical",
            3,
        ),
    ],
)
def test_a_wrong_likelihood_is_refused(loss_fn: Any, target: Tensor, likelihood: Any, outputs: int) -> None:
    with pytest.raises(ValueError, match="likelihood"):
        estimate(FisherDiagonal(likelihood), mlp(outputs), loss_fn, [(X, target)])


def test_weights_survive_a_saturated_softmax_in_float32() -> None:
    z = torch.tensor([[60.0, 0.0, 1.0], [0.0, 12.0, 0.0], [1.0, 0.0, 2.0]], requires_grad=True)
    weight = torch.tensor([0.5, 2.0, 1.0])
    y = torch.tensor([0, 1, 2])
    found = output_likelihood(LossGraph(F.cross_entropy(z, y, weight=weight), [z], z), "categorical")
    torch.testing.assert_close(found.weights.squeeze(1), weight[y] / weight[y].sum(), rtol=1e-3, atol=0)


def test_micro_batches_draw_noise_of_their_own() -> None:
    estimator = FisherDiagonal("categorical")
    graph = graph_of(LOSSES["cross entropy"])
    state = estimator.init(graph.params)
    first = estimator.measure(state, graph)["pulled"]
    second = estimator.measure(state, graph)["pulled"]
    assert not torch.equal(first[0], second[0])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="likelihood must be"):
        FisherDiagonal("softmax")  # type: ignore[arg-type]
    for bad in ({"samples": 0}, {"interval": 0}, {"beta": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FisherDiagonal("categorical", **bad)  # type: ignore[arg-type]


def test_one_class_has_no_categorical_likelihood() -> None:
    with pytest.raises(ValueError, match="2 classes"):
        estimate(FisherDiagonal("categorical"), mlp(1), F.cross_entropy, [(X, torch.zeros_like(classes(N)))])
