"""Exact diagonals against the dense float64 reference, over every loss and layer of ``cases``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature import LossGraph, estimate
from curvature.empirical_fisher import EmpiricalFisherDiagonal
from curvature.gauss_newton_diagonal import GaussNewtonDiagonal
from curvature.hessian_diagonal import HessianDiagonal
from curvature.measured_weights import rows
from curvature.outputs import output_tensor
from tests.curvature import dense
from tests.curvature.cases import LAYERS, LOSSES, Call, Case, N, reals, seeded

CASES = LOSSES | LAYERS
NO_DOUBLE_BACKWARD = ("attention", "attention, positions first")  # the fused kernel has none


def diagonal(estimator: Any, case: Case, model: nn.Module) -> Tensor:
    return dense.flat(estimate(estimator, model, case.loss_fn, [case.batch]).diagonal())


def halves(case: Case) -> list[tuple[Any, Any]]:
    """The batch in two uneven parts."""

    def cut(tree: Any, part: slice) -> Any:
        return {k: v[part] for k, v in tree.items()} if isinstance(tree, dict) else tree[part]

    return [(cut(case.inputs, p), cut(case.target, p)) for p in (slice(0, 2), slice(2, None))]


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton_diagonal_is_exact(name: str) -> None:
    case = CASES[name]
    model = case.make()
    outputs = model(case.inputs)
    exact = dense.gauss_newton(
        case.loss_fn(outputs, case.target), output_tensor(outputs), dense.trainable(model)
    ).diagonal()
    torch.testing.assert_close(diagonal(GaussNewtonDiagonal(), case, model), exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NO_DOUBLE_BACKWARD)
def test_hessian_diagonal_says_that_there_is_no_double_backward(name: str) -> None:
    with pytest.raises(RuntimeError, match="attention kernel"):
        diagonal(HessianDiagonal(), CASES[name], CASES[name].make())


@pytest.mark.parametrize("name", CASES)
def test_hessian_diagonal_is_exact(name: str) -> None:
    case = CASES[name]
    model = case.make()
    if name in NO_DOUBLE_BACKWARD:
        with sdpa_kernel(SDPBackend.MATH):
            exact = dense.hessian(
                case.loss_fn(model(case.inputs), case.target), dense.trainable(model)
            ).diagonal()
            found = diagonal(HessianDiagonal(), case, model)
        torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-10)
        return
    exact = dense.hessian(case.loss_fn(model(case.inputs), case.target), dense.trainable(model)).diagonal()
    torch.testing.assert_close(diagonal(HessianDiagonal(), case, model), exact, rtol=1e-8, atol=1e-10)


def shares_of_samples(case: Case, model: nn.Module) -> list[Tensor]:
    """u_n = c_n g_n by a loop: the batch loss's gradient through sample n's outputs alone."""
    params = dense.trainable(model)
    outputs = model(case.inputs)
    z = output_tensor(outputs)
    (pull,) = torch.autograd.grad(case.loss_fn(outputs, case.target), z, retain_graph=True)
    return [dense.gradient((z[n] * pull[n]).sum(), params) for n in range(N)]


@pytest.mark.parametrize("name", CASES)
def test_per_sample_empirical_fisher_equals_the_loop_over_samples(name: str) -> None:
    case = CASES[name]
    model = case.make()
    exact = torch.zeros(sum(p.numel() for p in dense.trainable(model)), dtype=torch.float64)
    for c, u in zip(case.weights, shares_of_samples(case, model), strict=True):
        if float(c) > 0:
            exact += u**2 / c
    found = diagonal(EmpiricalFisherDiagonal(samples="per_sample"), case, model)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["cross entropy", "regression", "binary", "flattened", "half squares"])
def test_per_sample_empirical_fisher_is_the_mean_square_of_own_gradients(name: str) -> None:
    case = LOSSES[name]
    model = case.make()
    own = [case.loss_fn(model(case.inputs[n : n + 1]), rows(case.target, n, N)) for n in range(N)]
    exact = dense.empirical_fisher(own, [1 / N] * N, dense.trainable(model)).diagonal()
    torch.testing.assert_close(diagonal(EmpiricalFisherDiagonal(samples="per_sample"), case, model), exact)


class WithPositions(nn.Module):
    """Tokens and positions; what the positions' embedding gives is the same for every sample."""

    def __init__(self, length: int, between: nn.Module, keep_batch_axis: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4, padding_idx=2), nn.Embedding(length, 4)
        self.between, self.norm, self.head = between, nn.LayerNorm(4), nn.Linear(4, 7)
        self.keep_batch_axis = keep_batch_axis

    def forward(self, tokens: Tensor) -> Tensor:
        index = torch.arange(tokens.shape[1])
        index = index.unsqueeze(0) if self.keep_batch_axis else index
        x: Tensor = self.tokens(tokens) + self.between(self.positions(index))
        return self.head(self.norm(x).tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("keep_batch_axis", [False, True])
@pytest.mark.parametrize("between", [nn.Identity, lambda: nn.Linear(4, 4), lambda: Doubled()])
@pytest.mark.parametrize(("samples", "length"), [(3, 5), (4, 4), (4, 8), (1, 3), (2, 6)])
def test_per_sample_squares_of_positions_that_all_samples_share(
    samples: int, length: int, between: Any, keep_batch_axis: bool
) -> None:
    """Also where there happen to be as many positions as samples, or a multiple of them."""
    torch.manual_seed(0)
    model = WithPositions(length, between(), keep_batch_axis).double()
    x, y = torch.randint(0, 7, (2, samples, length))

    def loss_fn(z: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z.flatten(0, 1), target.flatten())

    own = [loss_fn(model(x[n : n + 1]), y[n : n + 1]) for n in range(samples)]
    exact = dense.empirical_fisher(own, [1 / samples] * samples, dense.trainable(model)).diagonal()
    found = estimate(EmpiricalFisherDiagonal(samples="per_sample"), model, loss_fn, [(x, y)]).diagonal()
    torch.testing.assert_close(dense.flat(found), exact, rtol=1e-9, atol=1e-14)
    exact = dense.gauss_newton(loss_fn(z := model(x), y), z, dense.trainable(model)).diagonal()
    found = estimate(GaussNewtonDiagonal(), model, loss_fn, [(x, y)]).diagonal()
    torch.testing.assert_close(dense.flat(found), exact, rtol=1e-8, atol=1e-12)


class Doubled(nn.Module):
    """Gives its input's double, so that the sum's other summand is not the embedding itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x


@pytest.mark.parametrize(
    "name", [n for n in CASES if n not in ("positions flattened", "positions first, flattened")]
)
@pytest.mark.parametrize(
    "estimator",
    [
        GaussNewtonDiagonal(),
        HessianDiagonal(),
        EmpiricalFisherDiagonal(samples="per_sample"),
        EmpiricalFisherDiagonal(),
    ],
    ids=["gauss-newton", "hessian", "per-sample", "batch"],
)
def test_a_split_batch_gives_the_same_diagonal(estimator: Any, name: str) -> None:
    if isinstance(estimator, HessianDiagonal) and name in NO_DOUBLE_BACKWARD:
        pytest.skip("the fused attention kernel has no double backward")
    case = CASES[name]
    model = case.make()
    whole = diagonal(estimator, case, model)
    parts = dense.flat(estimate(estimator, model, case.loss_fn, halves(case)).diagonal())
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


def test_a_wrong_rule_does_not_hide_behind_equal_samples_with_opposite_residuals() -> None:
    """A mask that is given by name is not seen by the rule, whose terms then cancel as the right ones do."""
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    model = Call(
        lambda m, x: m.head(m.attention(x, x, x, attn_mask=mask)[0].mean(1)).squeeze(1),
        attention=nn.MultiheadAttention(2, 1, batch_first=True),
        head=nn.Linear(2, 1),
    )
    model = seeded(model)
    with torch.no_grad():
        model.head.bias.zero_()
    x = reals(1, 3, 2).repeat(2, 1, 1)
    with torch.no_grad():
        model.head.bias.sub_(model(x)[0])  # logits 0: residuals ±½
    y = torch.tensor([0.0, 1.0], dtype=torch.float64)
    loss_fn, params = nn.BCEWithLogitsLoss(), dense.trainable(model)
    found = dense.flat(
        estimate(EmpiricalFisherDiagonal(samples="per_sample"), model, loss_fn, [(x, y)]).diagonal()
    )
    losses = [loss_fn(model(x[n : n + 1]), y[n : n + 1]) for n in range(2)]
    expected = dense.empirical_fisher(losses, [0.5, 0.5], params).diagonal()
    assert dense.relative_error(found, expected) < 1e-10


def test_a_parameter_that_is_frozen_for_now_has_no_diagonal() -> None:
    """An optimizer holds it, and steps by what the others have."""
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    params, x, y = list(model.parameters()), reals(N, 3), reals(N, 2)
    estimator = GaussNewtonDiagonal(model)
    params[0].requires_grad_(False)
    z = model(x)
    loss = nn.functional.mse_loss(z, y)
    (found,) = estimator.measure({}, LossGraph(loss, params, z)).values()
    exact = dense.split(dense.gauss_newton(loss, z, params[1:]).diagonal(), params[1:])
    assert not found[0].any()
    for ours, theirs in zip(found[1:], exact, strict=True):
        assert dense.relative_error(ours, theirs) < 1e-12
