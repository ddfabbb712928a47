"""ω_b and c_n: whichever way a weight is known, batches combine to the loss of the concatenated batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import loss_weights, measured_weights
from curvature.problem import Problem
from tests.curvature import dense

WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
N = 11


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(width: int, seed: int = 0) -> nn.Module:
    model = nn.Linear(4, width).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(seed), dtype=p.dtype))
    return model


class Positions(nn.Module):
    """Logits (N, C, T), as torch.nn's cross-entropy wants a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).transpose(1, 2)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, 4, dtype=torch.float64, generator=generator(1))


def classes(*shape: int) -> Tensor:
    return torch.randint(0, 3, shape, generator=generator(2))


def masked(target: Tensor) -> Tensor:
    target = target.clone()
    target[torch.rand(target.shape, generator=generator(3)) < 0.4] = -100
    return target


def reals(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=generator(4))


def sequence_mask_loss(outputs: Tensor, target: dict[str, Tensor]) -> Tensor:
    each = F.cross_entropy(outputs, target["labels"], reduction="none")
    return (each * target["mask"]).sum() / target["mask"].sum()


MASK = (torch.rand(N, 5, generator=generator(5)) < 0.6).double()
CASES: dict[str, tuple[nn.Module, Any, Tensor, Any]] = {
    "cross entropy": (linear(3), nn.CrossEntropyLoss(), inputs(N), classes(N)),
    "class weights": (linear(3), nn.CrossEntropyLoss(weight=WEIGHT), inputs(N), classes(N)),
    "class weights, sum": (
        linear(3),
        nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"),
        inputs(N),
        classes(N),
    ),
    "ignore_index": (linear(3), nn.CrossEntropyLoss(), inputs(N), masked(classes(N))),
    "weights, mask, smoothing": (
        linear(3),
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
        inputs(N),
        masked(classes(N)),
    ),
    "probabilities": (
        linear(3),
        nn.CrossEntropyLoss(weight=WEIGHT),
        inputs(N),
        torch.softmax(reals(N, 3), 1),
    ),
    "positions": (Positions(), nn.CrossEntropyLoss(weight=WEIGHT), inputs(N, 5), masked(classes(N, 5))),
    "functional": (linear(3), F.cross_entropy, inputs(N), classes(N)),
    "partial": (linear(3), functools.partial(F.cross_entropy, weight=WEIGHT), inputs(N), classes(N)),
    "partial, sum": (linear(3), functools.partial(F.mse_loss, reduction="sum"), inputs(N), reals(N, 3)),
    "squared": (linear(2), nn.MSELoss(), inputs(N), reals(N, 2)),
    "squared, sum": (linear(2), nn.MSELoss(reduction="sum"), inputs(N), reals(N, 2)),
    "smooth l1": (linear(2), nn.SmoothL1Loss(), inputs(N), reals(N, 2)),
    "huber": (linear(2), nn.HuberLoss(delta=0.3), inputs(N), reals(N, 2)),
    "binary": (
        linear(2),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 1.0], dtype=torch.float64)),
        inputs(N),
        reals(N, 2).round(),
    ),
    "poisson": (linear(2), nn.PoissonNLLLoss(), inputs(N), reals(N, 2)),
    "soft margin": (linear(2), nn.SoftMarginLoss(), inputs(N), 2 * reals(N, 2).round() - 1),
    "multi margin": (linear(3), nn.MultiMarginLoss(p=2), inputs(N), classes(N)),
    "kl, batchmean": (
        linear(3),
        nn.KLDivLoss(reduction="batchmean"),
        inputs(N),
        torch.softmax(reals(N, 3), 1),
    ),
    "lambda": (linear(3), lambda z, y: F.cross_entropy(z, y, weight=WEIGHT), inputs(N), masked(classes(N))),
    "lambda, sum": (linear(3), lambda z, y: F.cross_entropy(z, y, reduction="sum"), inputs(N), classes(N)),
    "mask in a dict": (
        Positions(),
        sequence_mask_loss,
        inputs(N, 5),
        {"labels": classes(N, 5), "mask": MASK},
    ),
}
SPLITS = [(4, 4, 3), (1, 10), (5, 1, 5)]


def pieces(tree: Any, sizes: tuple[int, ...]) -> list[Any]:
    if isinstance(tree, dict):
        parts = {k: v.split(list(sizes)) for k, v in tree.items()}
        return [{k: parts[k][i] for k in tree} for i in range(len(sizes))]
    return list(tree.split(list(sizes)))


def combined(problem: Problem) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for share, graph in problem.graphs():
        total = total + share * graph.loss.detach()
    return total


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_shares_combine_batches_to_the_concatenated_loss(name: str, sizes: tuple[int, ...]) -> None:
    model, loss_fn, x, y = CASES[name]
    whole = loss_fn(model(x), y).detach()
    problem = Problem(model, loss_fn, zip(pieces(x, sizes), pieces(y, sizes), strict=True))
    torch.testing.assert_close(combined(problem), whole, rtol=1e-11, atol=1e-11)


def hide(loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """The same loss, as one that cannot be inspected."""
    return lambda outputs, target: loss_fn(outputs, target)


@pytest.mark.parametrize("name", CASES)
def test_measured_shares_equal_known_ones(name: str) -> None:
    model, loss_fn, x, y = CASES[name]
    batches = list(zip(pieces(x, (4, 4, 3)), pieces(y, (4, 4, 3)), strict=True))
    known = Problem(model, loss_fn, batches).shares
    measured = Problem(model, hide(loss_fn), batches).shares
    torch.testing.assert_close(torch.tensor(measured), torch.tensor(known), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("class weights, sum", "multi margin")])
def test_measured_sample_weights_equal_known_ones(name: str) -> None:
    # With reduction="sum" the loss of one sample holds its class weight, which measuring cannot tell from it;
    # a sample that has no gradient (beyond the margin) has no weight that could be measured, or that matters.
    model, loss_fn, x, y = CASES[name]
    z = model(x)
    known = loss_weights.sample_weights(loss_fn, z, y)
    measured = loss_weights.sample_weights(hide(loss_fn), z, y)
    torch.testing.assert_close(measured, known, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_samples_measured_at_once_equal_those_measured_one_by_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loss_fn, x, y = CASES[name]
    z = measured_weights.leaf_copy(model(x))
    values, gradients = measured_weights.sample_by_sample(loss_fn, z, y, N)
    for elements in (1 << 22, 20):  # 20: in chunks
        monkeypatch.setattr(measured_weights, "SAMPLE_ELEMENTS", elements)
        found = measured_weights.every_sample_at_once(loss_fn, z, y, N)
        assert found is not None
        torch.testing.assert_close(found[0], values, rtol=1e-12, atol=1e-14, equal_nan=True)
        for a, b in zip(found[1], gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_a_loss_that_reads_its_values_is_measured_sample_by_sample() -> None:
    def reads(outputs: Tensor, target: Tensor) -> Tensor:
        assert float(outputs.detach().abs().sum()) >= 0
        return F.cross_entropy(outputs, target, weight=WEIGHT)

    model, _, x, y = CASES["class weights"]
    assert measured_weights.every_sample_at_once(reads, measured_weights.leaf_copy(model(x)), y, N) is None
    known = loss_weights.sample_weights(nn.CrossEntropyLoss(weight=WEIGHT), model(x), y)
    torch.testing.assert_close(loss_weights.sample_weights(reads, model(x), y), known, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_sample_weights_times_own_gradients_give_the_batch_gradient(name: str) -> None:
    model, loss_fn, x, y = CASES[name]
    params = dense.trainable(model)
    whole = dense.gradient(loss_fn(model(x), y), params)
    weights = loss_weights.sample_weights(hide(loss_fn), model(x), y)
    total = torch.zeros_like(whole)
    for n, c in enumerate(weights):
        if float(c) != 0:
            own = loss_fn(model(x[n : n + 1]), measured_weights.rows(y, n, N))
            total += c * dense.gradient(own, params)
    torch.testing.assert_close(total, whole, rtol=1e-7, atol=1e-9)


def test_a_fully_masked_batch_has_share_zero() -> None:
    model = linear(3)
    x, y = inputs(6), classes(6)
    y[:3] = -100
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    for loss_fn in (nn.CrossEntropyLoss(), hide(nn.CrossEntropyLoss())):
        problem = Problem(model, loss_fn, batches)
        assert list(problem.shares) == [0.0, 1.0]
        torch.testing.assert_close(combined(problem), F.cross_entropy(model(x), y).detach())


def test_only_masked_targets_raise() -> None:
    x, y = inputs(4), torch.full((4,), -100)
    for batches in ([(x, y)], [(x[:2], y[:2]), (x[2:], y[2:])]):
        with pytest.raises(ValueError, match="masked"):
            Problem(linear(3), nn.CrossEntropyLoss(), batches)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda z, y: F.cross_entropy(z, y) ** 2,
        lambda z, y: torch.logsumexp(F.cross_entropy(z, y, reduction="none"), 0),
        lambda z, y: F.cross_entropy(z - z.mean(0), y),
        lambda z, y: F.cross_entropy(z, y) + z.square().sum(),
        lambda z, y: F.cross_entropy(z, y) * 3 + (z.norm()),
    ],
    ids=["square", "logsumexp", "centred", "mean plus sum", "norm"],
)
def test_a_loss_without_a_weight_is_refused_naming_weight_fn(loss_fn: Any) -> None:
    x, y = inputs(8), classes(8)
    with pytest.raises(ValueError, match="weight_fn"):
        Problem(linear(3), loss_fn, [(x[:5], y[:5]), (x[5:], y[5:])])
    with pytest.raises(ValueError, match="weight_fn"):
        loss_weights.sample_weights(loss_fn, linear(3)(x), y)


def test_batches_that_cannot_be_joined_are_refused_and_weight_fn_helps() -> None:
    model = Positions()
    x, y = inputs(6, 5), classes(6, 5)
    loss_fn = hide(F.cross_entropy)
    batches = [(x[:3], y[:3]), (x[3:, :2], y[3:, :2])]  # two padded lengths
    with pytest.raises(ValueError, match="weight_fn"):
        Problem(model, loss_fn, batches)
    assert Problem(model, F.cross_entropy, batches).shares == pytest.approx([15 / 21, 6 / 21])
    assert Problem(model, loss_fn, batches, torch.numel).shares == pytest.approx([15 / 21, 6 / 21])


def test_weight_fn_may_return_a_tensor_of_weights() -> None:
    x, y = inputs(6), masked(classes(6))
    shares = Problem(
        linear(3), hide(F.cross_entropy), [(x[:4], y[:4]), (x[4:], y[4:])], lambda t: t != -100
    ).shares
    assert shares == pytest.approx([float((y[:4] != -100).sum() / (y != -100).sum()), 1 - shares[0]])


def test_weight_fn_that_contradicts_a_known_loss_is_refused() -> None:
    x, y = inputs(7), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    with pytest.raises(ValueError, match="leave weight_fn out"):
        Problem(linear(3), nn.CrossEntropyLoss(weight=WEIGHT), batches, len)
    with pytest.raises(ValueError, match="sum"):
        Problem(linear(3), nn.CrossEntropyLoss(reduction="sum"), batches, len)


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    """Each row against all rows of the batch, by the cosine of their angle."""
    unit = z / z.norm(dim=1, keepdim=True)
    return F.cross_entropy(unit @ unit.detach().T.roll(1, 0), y % len(y))


@pytest.mark.parametrize(
    "loss_fn",
    [
        contrastive,
        lambda z, y: F.cross_entropy(z - z.mean(0), y),
        hide(functools.partial(F.cross_entropy, reduction="sum")),
        hide(functools.partial(F.cross_entropy, weight=WEIGHT)),
    ],
    ids=["contrastive", "centred", "sum", "class weights"],
)
def test_weight_fn_that_the_loss_contradicts_is_refused(loss_fn: Any) -> None:
    model, x, y = linear(3), inputs(8), torch.tensor([0, 0, 2, 0, 1, 1, 1, 2])
    with pytest.raises(ValueError, match="couples samples"):
        Problem(model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])], len)
    with pytest.raises(ValueError, match="couples samples"):
        loss_weights.sample_weights(loss_fn, model(x), y, len)


def test_a_loss_that_compares_the_samples_of_a_batch_is_refused_with_the_reason() -> None:
    def contrast(outputs: Tensor, partner: Tensor) -> Tensor:
        return F.cross_entropy(outputs @ outputs.T, partner)

    with pytest.raises(ValueError, match=r"no sample of it alone.* Target 1 is out of bounds"):
        measured_weights.per_sample(contrast, linear(3)(inputs(6)), torch.arange(6))


def test_outputs_and_target_that_broadcast_are_refused() -> None:
    x = inputs(6)
    with pytest.raises(ValueError, match="broadcast"):
        list(Problem(linear(1), nn.MSELoss(), [(x[:4], reals(4)), (x[4:], reals(2))]).graphs())


def test_a_subclass_of_a_known_loss_is_measured_not_trusted() -> None:
    class Twice(nn.CrossEntropyLoss):
        def forward(self, *pair: Tensor) -> Tensor:
            return 2 * F.cross_entropy(*pair, reduction="sum")

    x, y = inputs(5), classes(5)
    assert Problem(linear(3), Twice(), [(x[:2], y[:2]), (x[2:], y[2:])]).shares == [1.0, 1.0]
