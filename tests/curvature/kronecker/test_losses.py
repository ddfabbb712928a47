"""Losses: weights, masks, smoothing, reductions and kinds of Fisher, against K-FAC written literally."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import KFAC, estimate
from tests.curvature import dense
from tests.curvature.kronecker.reference import literal_kfac, module_gauss_newton, softmax_hessian

TIGHT = 1e-10


def network(out: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, out))


def cross_entropy_case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """(loss, target, c) of a batch of six."""
    y = torch.tensor([0, 2, 1, 1, 0, 2])
    if name == "mean":
        return nn.CrossEntropyLoss(), y, torch.full((6,), 1 / 6)
    if name == "sum":
        return nn.CrossEntropyLoss(reduction="sum"), y, torch.ones(6)
    if name == "class weights":
        w = torch.tensor([0.2, 3.0, 1.0])
        return nn.CrossEntropyLoss(w), y, w[y] / w[y].sum()
    if name == "ignore_index":
        return nn.CrossEntropyLoss(ignore_index=1), y, (y != 1) / (y != 1).sum()
    if name == "class weights and ignore_index":
        w = torch.tensor([0.2, 3.0, 1.0])
        c = w[y] * (y != 0)
        return nn.CrossEntropyLoss(w, ignore_index=0), y, c / c.sum()
    if name == "smoothing":
        return nn.CrossEntropyLoss(label_smoothing=0.3), y, torch.full((6,), 1 / 6)
    probabilities = torch.softmax(torch.randn(6, 3), 1)
    return nn.CrossEntropyLoss(), probabilities, torch.full((6,), 1 / 6)


CASES = [
    "mean",
    "sum",
    "class weights",
    "ignore_index",
    "class weights and ignore_index",
    "smoothing",
    "soft labels",
]


@pytest.mark.parametrize("case", CASES)
def test_type_2_equals_the_literal_formula(case: str) -> None:
    loss_fn, y, c = cross_entropy_case(case)
    model, x = network(), torch.randn(6, 4)
    B = estimate(KFAC(model), model, loss_fn, [(x, y)]).to_dense()
    assert dense.relative_error(B, literal_kfac(model, x, c, softmax_hessian)) < TIGHT


def test_masked_samples_count_as_removed() -> None:
    model, x = network(), torch.randn(6, 4)
    y = torch.tensor([0, 2, -100, 1, -100, 2])
    keep = y >= 0
    masked = estimate(KFAC(model), model, nn.CrossEntropyLoss(), [(x, y)]).to_dense()
    removed = estimate(KFAC(model), model, nn.CrossEntropyLoss(), [(x[keep], y[keep])]).to_dense()
    assert dense.relative_error(masked, removed) < TIGHT


def test_binary_cross_entropy_and_squares_equal_the_literal_formula() -> None:
    model, x = network(2), torch.randn(6, 4)
    y = (torch.rand(6, 2) > 0.5).double()
    c = torch.full((6,), 1 / 12)
    B = estimate(KFAC(model), model, nn.BCEWithLogitsLoss(), [(x, y)]).to_dense()
    bernoulli = literal_kfac(model, x, c, lambda z: torch.diag(torch.sigmoid(z) * torch.sigmoid(-z)))
    assert dense.relative_error(B, bernoulli) < TIGHT
    B = estimate(KFAC(model), model, nn.MSELoss(), [(x, y)]).to_dense()
    assert dense.relative_error(B, literal_kfac(model, x, c, lambda z: 2 * torch.eye(2))) < TIGHT


def test_one_logit_without_class_axis() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0))
    x, y = torch.randn(6, 4), (torch.rand(6) > 0.5).double()
    w = torch.tensor([1.0, 0, 2, 3, 1, 1])
    loss_fn = nn.BCEWithLogitsLoss(w)
    B = estimate(KFAC(model), model, loss_fn, [(x, y)]).to_dense()
    inner = nn.Sequential(model[0], model[1], model[2])
    expected = literal_kfac(inner, x, w / 6, lambda z: torch.diag(torch.sigmoid(z) * torch.sigmoid(-z)))
    assert dense.relative_error(B, expected) < TIGHT


def test_padding_mask_of_a_sequence_counts_tokens_as_removed() -> None:
    model = network()
    x, y = torch.randn(2, 4, 4), torch.tensor([[0, 1, 2, -100], [1, -100, -100, -100]])

    def loss_fn(z: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(z.flatten(0, 1), target.flatten())

    B = estimate(KFAC(model), model, loss_fn, [(x, y)]).to_dense()
    keep = y.flatten() >= 0
    expected = literal_kfac(model, x.flatten(0, 1)[keep], torch.full((4,), 1 / 4), softmax_hessian)
    assert dense.relative_error(B, expected) < TIGHT


def test_class_axis_in_the_second_place() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    x, y = torch.randn(2, 2, 2, 3), torch.randint(0, 3, (2, 2, 3))
    B = estimate(KFAC(model), model, nn.CrossEntropyLoss(), [(x, y)]).to_dense()
    linear = nn.Sequential(nn.Linear(2, 3))
    linear[0].weight.data, linear[0].bias.data = model[0].weight.data.reshape(3, 2), model[0].bias.data
    rows = x.movedim(1, -1).reshape(-1, 2)
    assert (
        dense.relative_error(B, literal_kfac(linear, rows, torch.full((12,), 1 / 12), softmax_hessian))
        < TIGHT
    )


def test_sampled_labels_approach_the_exact_fisher_at_the_root_of_their_number() -> None:
    model, x = network(), torch.randn(6, 4)
    y = torch.tensor([0, 2, 1, 1, 0, 2])
    exact = estimate(KFAC(model), model, nn.CrossEntropyLoss(), [(x, y)]).to_dense()

    def error(samples: int) -> float:
        errors = []
        for seed in range(8):
            B = estimate(
                KFAC(model, fisher="mc", samples=samples, seed=seed), model, nn.CrossEntropyLoss(), [(x, y)]
            )
            errors.append(float((B.to_dense() - exact).norm() / exact.norm()))
        return sum(errors) / len(errors)

    few, many = error(4), error(256)
    assert 4 < few / many < 16  # √64 = 8
    assert many < 0.1


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_sampled_labels_of_elementwise_likelihoods_are_unbiased(likelihood: str) -> None:
    model, x = network(2), torch.randn(6, 4)
    y = (torch.rand(6, 2) > 0.5).double()
    loss_fn = (
        nn.MSELoss()
        if likelihood == "gaussian"
        else nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 3.0]))
    )
    exact = estimate(KFAC(model), model, loss_fn, [(x, y)]).to_dense()
    kfac = KFAC(model, fisher="mc", samples=2000, likelihood=likelihood)
    B = estimate(kfac, model, loss_fn, [(x, y)]).to_dense()
    assert float((B - exact).norm() / exact.norm()) < 0.08  # 2000 samples


def test_sampling_is_seeded_and_leaves_the_global_generator_alone() -> None:
    model, x, y = network(), torch.randn(6, 4), torch.tensor([0, 2, 1, 1, 0, 2])
    before = torch.get_rng_state()
    draws = [
        estimate(KFAC(model, fisher="mc", seed=s), model, nn.CrossEntropyLoss(), [(x, y)]).to_dense()
        for s in (3, 3, 4)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("case", ["mean", "sum", "class weights", "ignore_index"])
def test_empirical_equals_the_loop_over_samples(case: str) -> None:
    loss_fn, y, c = cross_entropy_case(case)
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(6, 4)
    B = estimate(KFAC(model, fisher="empirical"), model, loss_fn, [(x, y)]).to_dense()
    A, G = torch.zeros(4, 4), torch.zeros(3, 3)
    for n in range(6):
        p = torch.softmax(model(x[n]).detach(), 0)
        g = p - functional.one_hot(y[n], 3)
        A, G = A + c[n] * torch.outer(x[n], x[n]), G + c[n] * torch.outer(g, g)
    assert dense.relative_error(B, torch.kron(G, A / c.sum())) < TIGHT


def test_empirical_squared_loss_takes_the_mean_over_elements_as_the_samples_own_loss() -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(1, 4), torch.randn(1, 3)
    for reduction in ("mean", "sum"):
        loss_fn = nn.MSELoss(reduction=reduction)
        g = dense.gradient(loss_fn(model(x), y), dense.trainable(model))
        B = estimate(KFAC(model, fisher="empirical"), model, loss_fn, [(x, y)]).to_dense()
        assert dense.relative_error(B, torch.outer(g, g)) < TIGHT


def test_forward_only_is_the_input_factor_alone() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(6, 4)
    y = torch.tensor([0, 2, -100, 1, 0, 2])
    B = estimate(KFAC(model, fisher="forward-only"), model, nn.CrossEntropyLoss(), [(x, y)]).to_dense()
    kept = x[y >= 0]
    assert dense.relative_error(B, torch.kron(torch.eye(3), kept.T @ kept / 5)) < TIGHT


def test_a_loss_that_couples_samples_is_refused() -> None:
    model, x = network(), torch.randn(6, 4)
    with pytest.raises(ValueError, match="couples the outputs"):
        estimate(KFAC(model), model, lambda z, t: (z @ z.T).square().mean(), [(x, x)])


def test_a_concave_loss_is_refused() -> None:
    model, x = network(), torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"concave|negative weight"):
        estimate(KFAC(model), model, lambda z, t: -(z**2).sum(), [(x, x)])
    with pytest.raises(ValueError, match="concave"):
        estimate(KFAC(model), model, lambda z, t: torch.sin(3 * z).sum(), [(x, x)])


def test_a_wrong_likelihood_is_refused() -> None:
    model, x = network(), torch.randn(6, 4)
    kfac = KFAC(model, fisher="mc", likelihood="categorical")
    with pytest.raises(ValueError, match="likelihood='categorical'"):
        estimate(kfac, model, nn.MSELoss(), [(x, torch.randn(6, 3))])
    with pytest.raises(ValueError, match="known likelihood"):
        estimate(KFAC(model, fisher="mc"), model, lambda z, t: (z**4).sum(), [(x, x)])


def test_too_many_classes_for_type_2_recommends_sampling() -> None:
    model, x = nn.Linear(2, 1025), torch.randn(1, 2)
    with pytest.raises(ValueError, match="fisher='mc'"):
        estimate(KFAC(model), model, nn.CrossEntropyLoss(), [(x, torch.tensor([3]))])


def test_huber_loss_is_exact_by_elements() -> None:
    model = nn.Linear(3, 2)
    x, y = torch.randn(1, 3), torch.tensor([[0.1, 9.0]])
    loss_fn = nn.HuberLoss()
    B = estimate(KFAC(model), model, loss_fn, [(x, y)]).to_dense()
    z = model(x)
    assert dense.relative_error(B, module_gauss_newton(model, loss_fn(z, y), z)) < TIGHT
