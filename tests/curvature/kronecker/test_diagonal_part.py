"""Norm layers and parameters without a rule: their exact diagonal, said once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import KFAC, GaussNewtonDiagonal, estimate
from tests.curvature import dense
from tests.curvature.cases import Call, classes, reals, seeded

TIGHT = 1e-10


def diagonal_of(model: nn.Module, x: Tensor, y: Tensor, loss_fn: nn.Module, **options: object) -> Tensor:
    return dense.flat(estimate(KFAC(model, **options), model, loss_fn, [(x, y)]).diagonal())


def gauss_newton_diagonal(model: nn.Module, x: Tensor, y: Tensor, loss_fn: nn.Module) -> Tensor:
    z = model(x)
    return dense.gauss_newton(loss_fn(z, y), z, dense.trainable(model)).diagonal()


def randomised(norm: nn.Module) -> nn.Module:
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


NORMS = [
    (nn.LayerNorm(4), (3, 4)),
    (nn.LayerNorm((2, 4)), (3, 2, 4)),
    (nn.LayerNorm(4, bias=False), (3, 5, 4)),
    (nn.RMSNorm(4), (3, 5, 4)),
    (nn.GroupNorm(2, 4), (3, 4, 5)),
    (nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), (3, 4, 2, 2)),
    (nn.BatchNorm1d(4).eval(), (3, 4)),
    (nn.BatchNorm2d(4).eval(), (3, 4, 2, 3)),
]


@pytest.mark.parametrize(
    ("norm", "shape"), NORMS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v)
)
def test_norm_layers_have_their_exact_diagonal(norm: nn.Module, shape: tuple[int, ...]) -> None:
    randomised(norm.double())
    x = torch.randn(shape)
    features = x[0].numel()
    head = nn.Linear(features, 3)
    head.requires_grad_(False)
    model = nn.Sequential(norm, nn.Tanh(), nn.Flatten(), head)
    model.train(norm.training)
    y = torch.tensor([0, 2, 1])
    loss_fn = nn.CrossEntropyLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback is announced
        ours = diagonal_of(model, x, y, loss_fn)
    assert dense.relative_error(ours, gauss_newton_diagonal(model, x, y, loss_fn)) < TIGHT


def test_norm_after_which_positions_stay_is_exact_too() -> None:
    model = nn.Sequential(randomised(nn.LayerNorm(4)), nn.Tanh(), nn.Linear(4, 3).requires_grad_(False))
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 3)
    ours = diagonal_of(model, x, y, nn.MSELoss())
    assert dense.relative_error(ours, gauss_newton_diagonal(model, x, y, nn.MSELoss())) < TIGHT


def test_batch_norm_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"batch norm '1' .*\.eval\(\)"):
        estimate(KFAC(model), model, nn.MSELoss(), [(x, y)])
    estimate(KFAC(model), model.eval(), nn.MSELoss(), [(x, y)])


class Unknown(nn.Module):
    """A layer that no rule knows, with parameters of two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.vector = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.matrix.T) * self.vector


def test_what_no_rule_covers_has_its_exact_diagonal_and_is_said_once() -> None:
    model = nn.Sequential(Unknown(), nn.Linear(4, 2).requires_grad_(False))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    kfac = KFAC(model)
    with pytest.warns(UserWarning, match=r"'0' \(Unknown\): no rule") as said:
        B = estimate(kfac, model, nn.CrossEntropyLoss(), [(x, y)])
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(kfac, model, nn.CrossEntropyLoss(), [(x, y)])
    exact = gauss_newton_diagonal(model, x, y, nn.CrossEntropyLoss())
    assert dense.relative_error(dense.flat(B.diagonal()), exact) < TIGHT
    assert dense.relative_error(B.to_dense(), torch.diag(exact)) < TIGHT


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
def test_fallback_of_a_sequence_model_whose_positions_mix_is_exact() -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Unknown(), nn.Linear(4, 2).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            return self.head(torch.tanh(h + h.cumsum(1)))

    model = Mix()
    x, y = torch.randn(2, 3, 3), torch.randint(0, 2, (2, 3))

    def loss_fn(z: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z.flatten(0, 1), target.flatten())

    ours = diagonal_of(model, x, y, loss_fn)
    assert dense.relative_error(ours, gauss_newton_diagonal(model, x, y, loss_fn)) < TIGHT


def test_fallback_follows_the_kind_of_fisher() -> None:
    model = nn.Sequential(Unknown(), nn.Linear(4, 3).requires_grad_(False))
    x, y = torch.randn(5, 3), torch.tensor([0, 2, 1, 0, 1])
    loss_fn = nn.CrossEntropyLoss()
    with pytest.warns(UserWarning, match="no rule"):
        empirical = diagonal_of(model, x, y, loss_fn, fisher="empirical")
    losses = [loss_fn(model(x[n : n + 1]), y[n : n + 1]) for n in range(5)]
    expected = dense.empirical_fisher(losses, torch.full((5,), 0.2), dense.trainable(model)).diagonal()
    assert dense.relative_error(empirical, expected) < TIGHT
    with pytest.warns(UserWarning, match="no rule"):
        sampled = diagonal_of(model, x, y, loss_fn, fisher="mc", samples=300)
    exact = gauss_newton_diagonal(model, x, y, loss_fn)
    assert float((sampled - exact).norm() / exact.norm()) < 0.15  # 300 samples


def test_excluded_modules_and_large_factors_go_to_the_diagonal() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    exact = gauss_newton_diagonal(model, x, y, nn.CrossEntropyLoss())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # excluding is saying so
        B = estimate(KFAC(model, exclude=["0"]), model, nn.CrossEntropyLoss(), [(x, y)])
    assert dense.relative_error(dense.flat(B.diagonal())[:16], exact[:16]) < TIGHT
    assert len(B.blocks) == 1
    with pytest.warns(UserWarning, match="max_dim=4"):
        B = estimate(KFAC(model, max_dim=4), model, nn.CrossEntropyLoss(), [(x, y)])
    assert [b.block.modules for b in B.blocks] == [("0",)]
    with pytest.raises(ValueError, match="exclude must name modules"):
        estimate(KFAC(model, exclude=["head"]), model, nn.CrossEntropyLoss(), [(x, y)])


def test_overridden_forward_does_not_inherit_the_rule() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(2 * x)

    model = nn.Sequential(Doubled(3, 2))
    x, y = torch.randn(1, 3), torch.tensor([1])
    with pytest.warns(UserWarning, match="Doubled"):
        ours = diagonal_of(model, x, y, nn.CrossEntropyLoss())
    assert dense.relative_error(ours, gauss_newton_diagonal(model, x, y, nn.CrossEntropyLoss())) < TIGHT


def test_reparametrised_weights_go_to_the_diagonal() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    x, y = torch.randn(4, 3), torch.tensor([1, 0, 1, 1])
    with pytest.warns(UserWarning, match="by the diagonal"):
        ours = diagonal_of(model, x, y, nn.CrossEntropyLoss())
    exact = gauss_newton_diagonal(model, x, y, nn.CrossEntropyLoss())
    assert dense.relative_error(ours, exact) < TIGHT


@pytest.mark.filterwarnings("ignore:KFAC treats")
@pytest.mark.parametrize("count", [1, 3])
def test_parameters_that_are_added_do_not_share_their_squares(count: int) -> None:
    """Of one sample their gradients are one tensor, or parts of one, as those of ViT's tokens and positions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions + m.more
        return m.head(torch.tanh(h)).mean(1)

    names = {"token": (1, 1, 2), "positions": (1, 3, 2), "more": (1, 3, 2)}
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in names.items()}
    model = seeded(Call(forward, **parameters, head=nn.Linear(2, 3)))
    x, y = reals(count, 2, 2), classes(count)
    params = dense.trainable(model)
    z = model(x)
    G = dense.gauss_newton(nn.CrossEntropyLoss()(z, y), z, params).diagonal()
    for estimator in (KFAC(model), GaussNewtonDiagonal()):
        found = dense.flat(estimate(estimator, model, nn.CrossEntropyLoss(), [(x, y)]).diagonal())
        torch.testing.assert_close(found[: 2 + 6 + 6], G[: 2 + 6 + 6], rtol=1e-10, atol=1e-14)
