"""EK-FAC is never further from Gauss-Newton than K-FAC in the Frobenius norm, over networks drawn by hypothesis."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvature import EKFAC, KFAC, estimate
from tests.curvature import dense

ACTIVATIONS = [nn.Tanh, nn.ReLU, nn.SiLU, nn.Identity]


class Positions(nn.Module):
    """Layers on positions, then their mean; ``mixes`` lets positions meet in between."""

    def __init__(self, sizes: list[int], activation: Any, bias: bool, mixes: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes)])
        self.activation, self.mixes = activation(), mixes

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(self.activation(x) if i else x)
            x = x.cumsum(1) if self.mixes else x
        return x.mean(1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    samples=st.integers(1, 6),
    length=st.integers(1, 3),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    mixes=st.booleans(),
    sharing=st.sampled_from(["expand", "reduce"]),
    loss=st.sampled_from(["categorical", "weighted", "masked", "gaussian"]),
)
def test_ekfac_is_never_further_from_gauss_newton_than_kfac(
    seed: int,
    sizes: list[int],
    samples: int,
    length: int,
    activation: Any,
    bias: bool,
    mixes: bool,
    sharing: Any,
    loss: str,
) -> None:
    torch.manual_seed(seed)
    classes = max(sizes[-1], 2)
    model = Positions([*sizes[:-1], classes], activation, bias, mixes)
    x = torch.randn(samples, length, sizes[0])
    y: Tensor = torch.randint(0, classes, (samples,))
    loss_fn: nn.Module = nn.CrossEntropyLoss()
    if loss == "weighted":
        loss_fn = nn.CrossEntropyLoss(torch.rand(classes) + 0.1)
    elif loss == "masked":
        y[1:] = torch.where(torch.rand(samples - 1) < 0.5, -100, y[1:])
    elif loss == "gaussian":
        loss_fn, y = nn.MSELoss(), torch.randn(samples, classes)
    z = model(x)
    GN = dense.gauss_newton(loss_fn(z, y), z, dense.trainable(model))
    k = estimate(KFAC(model, sharing=sharing), model, loss_fn, [(x, y)]).to_dense()
    e = estimate(EKFAC(model, sharing=sharing), model, loss_fn, [(x, y)]).to_dense()
    assert float((e - GN).norm()) <= float((k - GN).norm()) * (1 + 1e-9) + 1e-12 * float(GN.norm())
