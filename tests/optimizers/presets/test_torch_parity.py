"""Presets whose definition is torch.optim's: equal to it step by step in float64."""

from __future__ import annotations

import pytest
import torch

import optimizers
from curvature import Identity
from optimizers import HeavyBall, SecondOrder


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)).double()


def largest_difference(make_ours, make_theirs, steps: int = 60) -> float:
    """The largest difference of any parameter over all steps."""
    ours, theirs = network(), network()
    a, b = make_ours(ours.parameters()), make_theirs(theirs.parameters())
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        worst = max(
            worst,
            *(
                float((p - q).detach().abs().max())
                for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
            ),
        )
    assert any(
        float((p - q).detach().abs().max()) > 1e-3
        for p, q in zip(ours.parameters(), network().parameters(), strict=True)
    )
    return worst


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
def test_adam_equals_torch(betas: tuple[float, float], maximize: bool) -> None:
    assert (
        largest_difference(
            lambda p: optimizers.Adam(p, lr=1e-2, betas=betas, maximize=maximize),
            lambda p: torch.optim.Adam(p, lr=1e-2, betas=betas, maximize=maximize),
        )
        <= 1e-13
    )


def test_adam_refuses_weight_decay_and_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="use AdamW"):
        optimizers.Adam(network().parameters(), weight_decay=0.1)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_identity_without_a_region_equals_torch_sgd(momentum: float, nesterov: bool) -> None:
    assert (
        largest_difference(
            lambda p: SecondOrder(
                p, lr=0.1, curvature=Identity(), momentum=HeavyBall(momentum, nesterov), weight_decay=0.0
            ),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum, nesterov=nesterov),
        )
        <= 1e-13
    )


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.95, True), (0.8, False), (0.0, True)])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7)])
def test_muon_equals_torch(shape: tuple[int, int], momentum: float, nesterov: bool, adjust_lr: str) -> None:
    """On the same gradients, since a last-bit difference may flip a rounding to Muon's bfloat16 iterations."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = optimizers.Muon(
        [ours], lr=0.02, weight_decay=0.1, momentum=momentum, nesterov=nesterov, adjust_lr=adjust_lr
    )
    b = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=momentum, nesterov=nesterov, adjust_lr_fn=adjust_lr
    )
    for _ in range(30):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_muon_moves_a_convolution_as_a_matrix_and_a_vector_by_its_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    kernel, matrix = (
        torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in ((4, 3, 2, 2), (4, 12))
    )
    bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = optimizers.Muon([kernel, matrix, bias], lr=0.5, momentum=0.0, ns_dtype=None)
    kernel.grad, matrix.grad = g, g.reshape(4, 12)
    bias.grad = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    optimizer.step()
    assert torch.equal(kernel.reshape(4, 12), matrix)
    torch.testing.assert_close(bias.data, torch.tensor([-0.3, 0.0, -0.4], dtype=torch.float64))
