"""The matrix-free Fisher matrices: exact, sampled, empirical."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from curvature import EmpiricalFisher, Fisher, GaussNewton, LossGraph, Observation, estimate
from curvature.likelihood import output_likelihood
from tests.curvature import dense
from tests.curvature.matrix_free import cases

LIKELIHOODS = {"classification": "categorical", "summed": "categorical"}
LIKELIHOODS |= {"tied": "categorical", "regression": "gaussian", "binary": "bernoulli"}


def units(name: str) -> tuple[cases.Case, list[Tensor], list[float]]:
    """The case, the outputs of every unit of its likelihood, and the unit's weight, by hand."""
    model, _, x, y = case = cases.CASES[name]()
    z = model(x)["logits"] if name == "tied" else model(x)
    if name == "regression":  # mean over 18 elements of (z - y)²: c = 2 / 18 in front of ½ (z - y)²
        return case, list(z.reshape(-1, 1)), [2 / z.numel()] * z.numel()
    if name == "binary":
        return case, list(z), [1 / len(z)] * len(z)
    if name == "tied":
        counted = (y.flatten() != -100).double()
        return case, list(z.flatten(0, 1)), (counted / counted.sum()).tolist()
    return case, list(z), [1.0 if name == "summed" else 1 / len(z)] * len(z)


@pytest.mark.parametrize("mode", ["reverse", "forward", "finite-difference"])
@pytest.mark.parametrize("name", ["classification", "summed", "tied", "regression", "binary"])
def test_exact_fisher_equals_enumeration_and_gauss_newton(name: str, mode: str) -> None:
    case, z, c = units(name)
    model, loss_fn, x, y = case
    expected = dense.fisher(z, c, dense.trainable(model), LIKELIHOODS[name])
    F = estimate(Fisher(LIKELIHOODS[name], jvp=mode), model, loss_fn, [(x, y)]).to_dense()  # type: ignore[arg-type]
    tolerance = 1e-7 if mode == "finite-difference" else 1e-12
    assert dense.relative_error(F, expected) < tolerance
    G = estimate(GaussNewton(), model, loss_fn, [(x, y)]).to_dense()
    assert dense.relative_error(F, G) < tolerance


@pytest.mark.parametrize("name", ["classification", "tied", "regression", "binary"])
def test_sampled_fisher_approaches_the_exact_one_as_the_root_of_the_samples(name: str) -> None:
    case, z, c = units(name)
    model, loss_fn, x, y = case
    exact = dense.fisher(z, c, dense.trainable(model), LIKELIHOODS[name])
    params = dense.trainable(model)
    v = torch.randn(len(exact), generator=cases.generator(7), dtype=exact.dtype)
    counts = (4, 16, 64, 256)
    errors = []
    for samples in counts:
        products = [
            estimate(Fisher(LIKELIHOODS[name], samples=samples, seed=s), model, loss_fn, [(x, y)]).matvec(  # type: ignore[arg-type]
                dense.split(v, params)
            )
            for s in range(8)
        ]
        squares = [float((dense.flat(Fv) - exact @ v).square().sum()) for Fv in products]
        errors.append(sum(squares) / 8 / float((exact @ v).square().sum()))
    assert errors[-1] ** 0.5 < 0.25
    # The slope of log error² over log samples is -1. Seeds 0 to 7 a count: each mean of eight squares, one to
    # two degrees of freedom each, is off by about 0.4 in its logarithm, so the slope over four counts, a factor of 4
    # apart, by about 0.13.
    logs = torch.tensor([math.log(e) for e in errors]), torch.tensor([math.log(k) for k in counts])
    slope = float(torch.cov(torch.stack(logs))[0, 1] / logs[1].var())
    assert -1.4 < slope < -0.6


@pytest.mark.parametrize("name", ["classification", "tied", "regression", "binary"])
def test_sampled_fisher_is_the_mean_over_its_draws(name: str) -> None:
    case, _, _ = units(name)
    model, loss_fn, x, y = case
    params, outputs = dense.trainable(model), model(x)
    graph = LossGraph(loss_fn(outputs, y), params, outputs)
    found = output_likelihood(graph, LIKELIHOODS[name])  # type: ignore[arg-type]
    J = dense.jacobian(graph.output, params)
    C = torch.zeros(len(J), len(J), dtype=torch.float64)
    for k in range(3):
        sigma = found.draw(5, k)
        # Units are independent: products across them have mean zero and are left out.
        one = sigma.reshape(-1, sigma.shape[-1] if LIKELIHOODS[name] == "categorical" else 1)
        C += torch.block_diag(*(torch.outer(s, s) for s in one)) / 3
    F = estimate(Fisher(LIKELIHOODS[name], samples=3, seed=5), model, loss_fn, [(x, y)]).to_dense()  # type: ignore[arg-type]
    assert dense.relative_error(F, J.T @ C @ J) < 1e-10


def test_sampled_fisher_is_one_matrix_for_all_products_and_seeded() -> None:
    model, loss_fn, x, y = cases.classification()
    rng = torch.get_rng_state()
    F = estimate(Fisher("categorical", samples=2, seed=1), model, loss_fn, [(x, y)])
    matrix = F.to_dense()
    assert torch.equal(matrix, F.to_dense())
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-12
    assert dense.relative_error(matrix, matrix.T) < 1e-12
    other = estimate(Fisher("categorical", samples=2, seed=2), model, loss_fn, [(x, y)]).to_dense()
    assert dense.relative_error(other, matrix) > 0.01
    assert torch.equal(torch.get_rng_state(), rng)


def test_split_of_a_sampled_fisher_draws_anew_for_every_batch() -> None:
    model, loss_fn, x, y = cases.classification()
    twice = [(x, y), (x, y)]
    one = estimate(Fisher("categorical", samples=1), model, loss_fn, [(x, y)]).to_dense()
    two = estimate(Fisher("categorical", samples=1), model, loss_fn, twice).to_dense()
    assert dense.relative_error(two, one) > 0.01


def test_steps_of_an_optimizer_draw_anew() -> None:
    model, loss_fn, x, y = cases.classification()
    params, estimator = dense.trainable(model), Fisher("categorical", samples=1)
    state = estimator.init(params)
    found = []
    for _ in range(2):
        z = model(x)
        seen = Observation([None] * 4, graphs=[LossGraph(loss_fn(z, y), params, z)], parameters=params)
        estimator.update(state, seen)
        found.append(estimator.operator(state).to_dense())
    assert dense.relative_error(found[1], found[0]) > 0.01
    assert state["draws"] == 2


@pytest.mark.parametrize("make", [Fisher, lambda likelihood: EmpiricalFisher(likelihood=likelihood)])
def test_wrong_likelihood_is_refused(make: type[Fisher]) -> None:
    model, loss_fn, x, y = cases.classification()
    params, z = dense.trainable(model), model(x)
    seen = Observation([None] * 4, graphs=[LossGraph(loss_fn(z, y), params, z)], parameters=params)
    estimator = make("gaussian")
    state = estimator.init(params)
    estimator.update(state, seen)
    with pytest.raises(ValueError, match=r"not that of likelihood='gaussian'"):
        estimator.operator(state).matvec([torch.ones_like(p) for p in params])
    with pytest.raises(ValueError, match="likelihood must be"):
        make("poisson")


def test_bad_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be >= 1"):
        Fisher("categorical", samples=0)


# -- empirical -----------------------------------------------------------------------------------------------------


def own_losses(name: str) -> tuple[cases.Case, list[Tensor], list[float]]:
    """The case, every sample's own loss, and its weight in the batch's, by hand."""
    model, loss_fn, x, y = case = cases.CASES[name]()
    rows = [(x[n : n + 1], y[n : n + 1]) for n in range(len(x))]
    losses = [loss_fn(model(a), b) for a, b in rows]
    if name == "summed":
        return case, losses, [1.0] * len(x)
    if name == "tied":
        counted = (y != -100).sum(1).double()
        return case, losses, (counted / counted.sum()).tolist()
    if name == "weighted":
        w = torch.tensor([0.2, 1.0, 3.0, 0.0], dtype=torch.float64)[torch.where(y == -100, 3, y)]
        return case, losses, (w / w.sum()).tolist()
    return case, losses, [1 / len(x)] * len(x)


@pytest.mark.parametrize("mode", ["reverse", "forward", "finite-difference"])
@pytest.mark.parametrize("name", ["classification", "weighted", "summed", "tied", "regression", "binary"])
def test_empirical_fisher_equals_the_loop_over_samples(name: str, mode: str) -> None:
    case, losses, c = own_losses(name)
    model, loss_fn, x, y = case
    expected = dense.empirical_fisher(losses, c, dense.trainable(model))
    F = estimate(EmpiricalFisher(jvp=mode), model, loss_fn, [(x, y)]).to_dense()  # type: ignore[arg-type]
    assert dense.relative_error(F, expected) < (1e-7 if mode == "finite-difference" else 1e-12)


@pytest.mark.parametrize("name", ["weighted", "tied"])
def test_split_of_an_empirical_fisher_equals_one_batch(name: str) -> None:
    case, losses, c = own_losses(name)
    model, loss_fn, x, y = case
    weight = torch.tensor([0.2, 1.0, 3.0, 0.0], dtype=torch.float64)

    def weight_fn(target: Tensor) -> Tensor:
        return (
            (target != -100).sum() if name == "tied" else weight[torch.where(target == -100, 3, target)].sum()
        )

    batches = [(x[a:b], y[a:b]) for a, b in ((0, 1), (1, len(x)))]
    F = estimate(EmpiricalFisher(), model, loss_fn, batches, weight_fn=weight_fn)
    expected = dense.empirical_fisher(losses, c, dense.trainable(model))
    assert dense.relative_error(F.to_dense(), expected) < 1e-12


@pytest.mark.parametrize("name", ["classification", "summed", "tied", "regression", "binary"])
def test_empirical_fisher_in_an_optimizer_reads_the_weights_from_the_likelihood(name: str) -> None:
    case, losses, c = own_losses(name)
    model, loss_fn, x, y = case
    params, outputs = dense.trainable(model), model(x)
    seen = Observation(
        [None] * len(params), graphs=[LossGraph(loss_fn(outputs, y), params, outputs)], parameters=params
    )
    with pytest.raises(ValueError, match="needs likelihood="):
        EmpiricalFisher().update({}, seen)
    if name == "tied":  # a sequence's own loss is the sum over its tokens' mean: c_n = Σ c_t
        c = [sum(1.0 for t in row if t != -100) / int((y != -100).sum()) for row in y.tolist()]
    if name == "regression":  # a sample's own loss is the mean over its 3 elements
        c = [1 / len(x)] * len(x)
    estimator, state = EmpiricalFisher(LIKELIHOODS[name]), {}  # type: ignore[arg-type]
    estimator.update(state, seen)
    expected = dense.empirical_fisher(losses, c, params)
    assert dense.relative_error(estimator.operator(state).to_dense(), expected) < 1e-8


def test_batch_norm_in_training_mode_is_refused() -> None:
    model, loss_fn, x, y = cases.batch_norm()
    with pytest.raises(ValueError, match=r"batch norm '1' is in training mode"):
        estimate(EmpiricalFisher(), model, loss_fn, [(x, y)])
    model.eval()
    F = estimate(EmpiricalFisher(), model, loss_fn, [(x, y)]).to_dense()
    losses = [nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for n in range(len(x))]
    expected = dense.empirical_fisher(losses, [1 / len(x)] * len(x), dense.trainable(model))
    assert dense.relative_error(F, expected) < 1e-12
