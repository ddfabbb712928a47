"""Where K-FAC is exact it must equal the dense Gauss-Newton blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvature import KFAC, estimate
from tests.curvature import dense
from tests.curvature.kronecker.reference import module_gauss_newton

TIGHT = 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_kfac_equals_gauss_newton_for_deep_linear_network(reduction: str, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=bias), nn.Linear(3, 5, bias=bias), nn.Linear(5, 2, bias=bias))
    x, y = torch.randn(7, 4), torch.randn(7, 2)
    loss_fn = nn.MSELoss(reduction=reduction)
    B = estimate(KFAC(model), model, loss_fn, [(x, y)]).to_dense()
    z = model(x)
    assert dense.relative_error(B, module_gauss_newton(model, loss_fn(z, y), z)) < TIGHT


def test_weights_of_samples_enter_both_factors() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    x, y, c = torch.randn(6, 4), torch.randn(6, 2), torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0, 0.25])

    def loss_fn(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (c[:, None] * (z - target) ** 2).sum()

    B = estimate(KFAC(model), model, loss_fn, [(x, y)]).to_dense()
    z = model(x)
    assert dense.relative_error(B, module_gauss_newton(model, loss_fn(z, y), z)) < TIGHT


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_is_exact_for_one_sample_of_a_nonlinear_network(sharing: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x, y = torch.randn(1, 4), torch.tensor([2])
    B = estimate(KFAC(model, sharing=sharing), model, nn.CrossEntropyLoss(), [(x, y)]).to_dense()
    z = model(x)
    assert dense.relative_error(B, module_gauss_newton(model, nn.functional.cross_entropy(z, y), z)) < TIGHT


def test_custom_loss_of_no_likelihood_is_exact_for_one_sample() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(1, 4), torch.randn(1, 3)

    def loss_fn(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((z - target).square().sum(1) + 1).sqrt().sum() + (z.square().sum(1) ** 2).sum()

    B = estimate(KFAC(model), model, loss_fn, [(x, y)]).to_dense()
    z = model(x)
    assert dense.relative_error(B, module_gauss_newton(model, loss_fn(z, y), z)) < TIGHT


class Permute(nn.Module):
    """(N, C, *spatial) → (N, *spatial, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(1, -1)


class Mean(nn.Module):
    """The mean over all axes between the first and the last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1, -2).mean(1)


def test_expand_is_exact_for_a_loss_at_every_position_of_a_linear_network() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    x, y = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    for loss_fn in (nn.MSELoss(), nn.MSELoss(reduction="sum")):
        B = estimate(KFAC(model, sharing="expand"), model, loss_fn, [(x, y)]).to_dense()
        z = model(x)
        assert dense.relative_error(B, module_gauss_newton(model, loss_fn(z, y), z)) < TIGHT


def test_expand_is_exact_for_many_positions_which_are_sent_back_together() -> None:
    model = nn.Linear(2, 3)
    x, y = torch.randn(1, 100, 2), torch.randn(1, 100, 3)  # 300 columns: above the limit of 256
    B = estimate(KFAC(model, sharing="expand"), model, nn.MSELoss(), [(x, y)]).to_dense()
    z = model(x)
    expected = 2 / 300 * torch.kron(torch.eye(3), _gram(x.reshape(-1, 2)))
    order = torch.tensor([0, 1, 6, 2, 3, 7, 4, 5, 8])
    assert dense.relative_error(B[order[:, None], order], expected) < TIGHT
    del z


def _gram(x: torch.Tensor) -> torch.Tensor:
    a = torch.cat([x, torch.ones(len(x), 1)], 1)
    return a.T @ a


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_expand_is_exact_for_a_loss_at_every_pixel_of_a_convolution(dims: int, groups: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = conv(2, 4, 2, stride=2, padding=1, groups=groups)
    x = torch.randn(2, 2, *[3] * dims)
    y = torch.randn_like(model(x))
    B = estimate(KFAC(model, sharing="expand"), model, nn.MSELoss(), [(x, y)]).to_dense()
    z = model(x)
    assert dense.relative_error(B, dense.gauss_newton(nn.MSELoss()(z, y), z, dense.trainable(model))) < TIGHT


def test_expand_is_exact_for_a_transposed_convolution() -> None:
    model = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2)
    x = torch.randn(2, 4, 2, 2)
    y = torch.randn_like(model(x))
    B = estimate(KFAC(model, sharing="expand"), model, nn.MSELoss(), [(x, y)]).to_dense()
    z = model(x)
    assert dense.relative_error(B, dense.gauss_newton(nn.MSELoss()(z, y), z, dense.trainable(model))) < TIGHT


def test_reduce_is_exact_for_the_mean_over_positions() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), Mean())
    x, y = torch.randn(3, 5, 4), torch.randn(3, 2)
    B = estimate(KFAC(model, sharing="reduce"), model, nn.MSELoss(), [(x, y)]).to_dense()
    z = model(x)
    assert dense.relative_error(B, module_gauss_newton(model, nn.MSELoss()(z, y), z)) < TIGHT


def test_reduce_is_exact_for_the_mean_over_pixels_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 3, 1), Permute(), Mean())
    x, y = torch.randn(3, 2, 4, 4), torch.randn(3, 3)
    B = estimate(KFAC(model, sharing="reduce"), model, nn.MSELoss(), [(x, y)]).to_dense()
    z = model(x)
    GN = dense.gauss_newton(nn.MSELoss()(z, y), z, dense.trainable(model))
    ours, theirs = _split(B, model), _split(GN, model)
    assert dense.relative_error(ours[1], theirs[1]) < TIGHT
    assert dense.relative_error(ours[0], _drop_cross_groups(theirs[0], model[0])) < TIGHT


def _split(matrix: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    sizes = [sum(p.numel() for p in m.parameters()) for m in model if list(m.parameters())]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [matrix[s : s + n, s : s + n] for s, n in zip(starts, sizes, strict=True)]


def _drop_cross_groups(matrix: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """A grouped convolution is one block a group."""
    of_weight = torch.arange(conv.out_channels)[:, None].expand(-1, conv.weight[0].numel()).reshape(-1)
    channel = torch.cat([of_weight, torch.arange(conv.out_channels)])
    group = channel // (conv.out_channels // conv.groups)
    return matrix * (group[:, None] == group)


def test_frozen_weight_or_bias_leaves_the_other_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[2].requires_grad_(False)
    x, y = torch.randn(5, 4), torch.randn(5, 2)
    B = estimate(KFAC(model), model, nn.MSELoss(), [(x, y)]).to_dense()
    z = model(x)
    assert dense.relative_error(B, module_gauss_newton(model, nn.MSELoss()(z, y), z)) < TIGHT
