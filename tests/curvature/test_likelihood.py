"""Which likelihood a loss is, read from its outputs: shapes in which an axis could be mistaken for classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import KFAC, estimate


def _bernoulli(outputs: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, target, reduction="sum") / len(outputs)


def _gaussian(outputs: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (outputs - target).square().sum() / len(outputs)


@pytest.mark.parametrize("fisher", ["type-2", "mc"])
@pytest.mark.parametrize("loss", [_bernoulli, _gaussian])
def test_images_with_one_channel_have_the_curvature_of_their_pixels_in_a_row(loss, fisher: str) -> None:
    """(N, 1, H, W): the one channel is no axis of classes. A flat copy of the outputs has none at all."""
    draws = torch.Generator().manual_seed(0)
    inputs = torch.rand(4, 2, 5, 6, dtype=torch.float64, generator=draws)
    target = torch.rand(4, 1, 5, 6, dtype=torch.float64, generator=draws)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(2, 1, 3, padding=1)).double()
    flat = nn.Sequential(model, nn.Flatten())
    ours, rows = (
        estimate(KFAC(each, fisher=fisher, seed=3), each, loss, [(inputs, wanted)]).to_dense()
        for each, wanted in ((model, target), (flat, target.flatten(1)))
    )
    torch.testing.assert_close(ours, rows)
    assert ours.abs().max() > 0
