"""The problem that ranks share, and the same run in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from curvature import EmpiricalFisherDiagonal, HutchinsonDiagonal
from optimizers import SOAA, AdaHessian, AdamW, SecondOrder, SophiaH, Tadam, TrustRegionNewton
from trust_region import FixedRadius, L2Ball, RatioRadius, RmsBox, SteihaugCG, TrustRegion

BATCH = 12
#: Relative: what a difference of two float64 gradients leaves, about u^(2/3) a product, after a few steps.
DIFFERENCES = 1e-6
Make = Callable[[Any], SecondOrder]


def network(width: int = 5, out: int = 3) -> nn.Module:
    """Odd sizes: over 2 or 4 ranks the shards are uneven, and those of the last bias are empty on some."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, out)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (BATCH,), generator=generator)


def part(step: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the batch, as a ``DistributedSampler`` deals it."""
    x, y = batch(step)
    return x[dist.get_rank() :: dist.get_world_size()], y[dist.get_rank() :: dist.get_world_size()]


def soaa(params: Any) -> SecondOrder:
    return SOAA(params, lr=2e-2, total_steps=20)


def soaa_by_tensor(params: Any) -> SecondOrder:
    return SOAA(params, lr=2e-2, total_steps=20, scope="tensor")


def adamw(params: Any) -> SecondOrder:
    return AdamW(params, lr=2e-2)


def tadam(params: Any) -> SecondOrder:
    return Tadam(params, lr=2e-2, total_steps=20)


def hutchinson(params: Any) -> SecondOrder:
    return SecondOrder(
        params,
        lr=1e-2,
        curvature=HutchinsonDiagonal(interval=2, beta=0.9),
        trust_region=TrustRegion(region=RmsBox(), radius=FixedRadius(1.0)),
        momentum=0.9,
    )


def newton_by_differences(params: Any) -> SecondOrder:
    """A small radius to begin with, so that steps end on the boundary and inside."""
    return TrustRegionNewton(params, initial_radius=0.3, hvp="finite-difference")


def hutchinson_by_differences(params: Any) -> SecondOrder:
    return SecondOrder(
        params,
        lr=1e-2,
        curvature=HutchinsonDiagonal(interval=2, beta=0.9, probes=2, hvp="finite-difference"),
        trust_region=TrustRegion(region=RmsBox(), radius=FixedRadius(1.0)),
        momentum=0.9,
    )


def adahessian_by_differences(params: Any) -> SecondOrder:
    return AdaHessian(params, lr=1e-2, interval=2, hvp="finite-difference")


def sophia_by_differences(params: Any) -> SecondOrder:
    """Gaussian probes."""
    return SophiaH(params, lr=1e-2, interval=2, hvp="finite-difference")


def ball(params: Any) -> SecondOrder:
    """A trial, a rollback where it fails: the radius starts far too large."""
    return SecondOrder(
        params,
        lr=1.0,
        curvature=EmpiricalFisherDiagonal(beta=0.9),  # far too flat: steps end on the boundary
        trust_region=TrustRegion(L2Ball(), SteihaugCG(), RatioRadius(initial_radius=400.0)),
    )


BY_DIFFERENCES: tuple[Make, ...] = (
    newton_by_differences,
    hutchinson_by_differences,
    adahessian_by_differences,
    sophia_by_differences,
)


def sharded(layers: bool = True) -> nn.Module:
    """By ``fully_shard``: a group a layer, or the root's alone."""
    model = network()
    for layer in model if layers else ():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def train(
    model: nn.Module, optimizer: SecondOrder, data: Callable[[int], Any], steps: Iterable[int]
) -> list[float]:
    """(radius of every step); closures, so that trials are judged."""
    radii = []
    for t in steps:
        x, y = data(t)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, y)
            optimizer.backward(loss, outputs)
            return loss

        optimizer.step(closure)
        radii.append(float(optimizer.step_info.radius))
    return radii


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-9) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=tolerance, atol=tolerance)


def alone(make: Make, steps: int) -> tuple[nn.Module, list[float], SecondOrder]:
    """The same run in one process: the whole batch, nothing averaged."""
    model = network()
    optimizer = make(model.parameters())
    optimizer.process_group = None
    return model, train(model, optimizer, batch, range(steps)), optimizer
