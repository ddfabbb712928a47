"""One-shot estimates: no trace is left, and what cannot be answered is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import (
    EKFAC,
    KFAC,
    EmpiricalFisher,
    EmpiricalFisherDiagonal,
    Fisher,
    FisherDiagonal,
    GaussNewton,
    GaussNewtonDiagonal,
    HessianDiagonal,
    HutchinsonDiagonal,
    estimate,
)
from tests.curvature import dense
from tests.curvature.cases import LOSSES, N, X, Y, classes, mlp, reals, seeded

ESTIMATORS = {
    "batch": EmpiricalFisherDiagonal(),
    "per-sample": EmpiricalFisherDiagonal(samples="per_sample"),
    "gauss-newton": GaussNewtonDiagonal(),
    "hessian": HessianDiagonal(),
    "hutchinson": HutchinsonDiagonal(),
    "fisher": FisherDiagonal("categorical"),
}


class Restless(nn.Module):
    """Buffers that a forward pass moves in both ways: in place and by a new tensor; and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.body(x)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(), lambda z, y: F.cross_entropy(z, y)], ids=["known", "measured"]
)
def test_estimate_leaves_no_trace(name: str, loss_fn: Any) -> None:
    model = seeded(Restless())
    model.body[1].eval()
    model.body[0].bias.requires_grad_(False)
    (3 * loss_fn(model(X), Y)).backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    held = dict(model.named_buffers())
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    estimate(ESTIMATORS[name], model, loss_fn, [(X[:2], Y[:2]), (X[2:], Y[2:])])
    assert torch.equal(random_state, torch.get_rng_state())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(a is held[k] for k, a in model.named_buffers())
    assert modes == [m.training for m in model.modules()]
    for p, g in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(p.grad, g)
    assert not model.body[0].bias.requires_grad
    assert not model.body[0]._forward_hooks


def test_buffers_return_after_an_error_too() -> None:
    model = seeded(Restless())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="likelihood"):
        estimate(FisherDiagonal("gaussian"), model, nn.CrossEntropyLoss(), [(X, Y)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_dropout_draws_one_mask_a_batch_and_the_global_state_stays() -> None:
    # Everything is taken of one graph, so per-sample shares refer to one drawn mask.
    model = seeded(Restless())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = dense.flat(estimate(GaussNewtonDiagonal(), model, nn.CrossEntropyLoss(), [(X, Y)]).diagonal())
    assert torch.equal(before, torch.get_rng_state())
    z = model(X)  # draws the same mask
    exact = dense.gauss_newton(F.cross_entropy(z, Y), z, dense.trainable(model)).diagonal()
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-12)


def test_batch_norm_in_training_mode_is_refused_where_samples_are_told_apart() -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    for estimator in (EmpiricalFisherDiagonal(samples="per_sample"), GaussNewtonDiagonal()):
        with pytest.raises(ValueError, match=r"batch norm '1' is in training mode.*eval"):
            estimate(estimator, model, nn.CrossEntropyLoss(), [(X, Y)])
    with pytest.raises(ValueError, match=r"several batches do not equal"):
        estimate(HutchinsonDiagonal(), model, nn.CrossEntropyLoss(), [(X[:3], Y[:3]), (X[3:], Y[3:])])
    estimate(HutchinsonDiagonal(), model, nn.CrossEntropyLoss(), [(X, Y)])


def test_samples_that_feel_each_other_are_told_apart_by_their_outputs() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(torch.tanh(h - h.mean(0)))

    model = seeded(Centred())
    z = model(X)
    exact = dense.gauss_newton(F.cross_entropy(z, Y), z, dense.trainable(model)).diagonal()
    found = dense.flat(estimate(GaussNewtonDiagonal(), model, nn.CrossEntropyLoss(), [(X, Y)]).diagonal())
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-12)


def test_a_generator_of_batches_is_read_once_and_kept() -> None:
    model = mlp()
    parts = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    a = estimate(HessianDiagonal(), model, nn.CrossEntropyLoss(), iter(parts))
    b = estimate(HessianDiagonal(), model, nn.CrossEntropyLoss(), parts)
    assert all(torch.equal(x, y) for x, y in zip(a.diagonal(), b.diagonal(), strict=True))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_bad_input_is_refused(name: str) -> None:
    estimator, loss = ESTIMATORS[name], nn.CrossEntropyLoss()
    frozen = mlp().requires_grad_(False)
    complex_model = nn.Linear(3, 3, dtype=torch.complex128)
    with pytest.raises(ValueError, match="at least one"):
        estimate(estimator, mlp(), loss, [])
    with pytest.raises(ValueError, match="empty"):
        estimate(estimator, mlp(), loss, [(X[:0], Y[:0])])
    with pytest.raises(ValueError, match="unfreeze"):
        estimate(estimator, frozen, loss, [(X, Y)])
    with pytest.raises(ValueError, match="complex"):
        estimate(estimator, complex_model, loss, [(X, Y)])
    with pytest.raises(ValueError, match="pairs"):
        estimate(estimator, mlp(), loss, [X])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="scalar"):
        estimate(estimator, mlp(), nn.CrossEntropyLoss(reduction="none"), [(X, Y)])
    with pytest.raises(ValueError, match="nan"):
        estimate(estimator, mlp(), lambda z, y: loss(z, y) * torch.nan, [(X, Y)])


def test_a_loss_that_couples_samples_is_refused_by_the_gauss_newton_diagonal() -> None:
    with pytest.raises(ValueError, match="couples"):
        estimate(GaussNewtonDiagonal(), mlp(2), lambda z, y: (z - y).square().mean() ** 2, [(X, reals(N, 2))])


def test_negative_sample_weights_are_refused_by_the_empirical_fisher() -> None:
    weight = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="negative"):
        estimate(
            EmpiricalFisherDiagonal(samples="per_sample"),
            mlp(),
            nn.CrossEntropyLoss(weight=weight),
            [(X, classes(N))],
        )


def test_batch_fisher_is_the_square_of_the_whole_gradient() -> None:
    case = LOSSES["class weights"]
    model = case.make()
    g = dense.gradient(case.loss_fn(model(X), case.target), dense.trainable(model))
    parts = [(X[:2], case.target[:2]), (X[2:], case.target[2:])]
    torch.testing.assert_close(
        dense.flat(estimate(EmpiricalFisherDiagonal(), model, case.loss_fn, parts).diagonal()), g**2
    )


@pytest.mark.parametrize(
    "estimator",
    [
        GaussNewtonDiagonal,
        lambda: FisherDiagonal("categorical"),
        lambda: EmpiricalFisherDiagonal(samples="per_sample"),
        GaussNewton,
        lambda: Fisher("categorical"),
        EmpiricalFisher,
        KFAC,
        EKFAC,
    ],
)
@pytest.mark.parametrize("other", ["penalty", "second output"])
def test_a_loss_that_passes_by_the_outputs_is_refused(estimator: Any, other: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.side = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.tanh(self.body(x))
            return {"logits": self.head(h), "side": self.side(h)}

    model = seeded(Two())

    def loss_fn(outputs: dict[str, Tensor], target: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs["logits"], target)
        if other == "penalty":
            return loss + 0.1 * sum(p.square().sum() for p in model.parameters())
        return loss + outputs["side"].square().mean()

    made = estimator(model) if estimator in (KFAC, EKFAC) else estimator()
    with pytest.raises(ValueError, match=r"another way than the outputs|weights of the samples"):
        estimate(made, model, loss_fn, [(X, Y)])
