"""What the peers are compared on: networks, losses and data in float64, in batches of which the last is short."""

from __future__ import annotations

import torch
from torch import Tensor, nn

N = 7


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(model: nn.Module) -> nn.Module:
    """The model in float64, its parameters drawn anew."""
    g = generator(0)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model


def perceptron(outputs: int = 3) -> nn.Module:
    return seeded(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, outputs))
    )


class Mean(nn.Module):
    """The mean over positions, which are the last axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def convolution(outputs: int = 3) -> nn.Module:
    return seeded(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, stride=2),
            nn.Tanh(),
            nn.Conv2d(3, 4, 2),
            nn.Flatten(),
            nn.Linear(4, outputs),
        )
    )


def pooled(outputs: int = 3) -> nn.Module:
    return seeded(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, outputs, 2), Mean()))


NETWORKS = {"perceptron": perceptron, "convolution": convolution, "pooled": pooled}


def inputs(network: str, count: int = N) -> Tensor:
    shape = (4,) if network == "perceptron" else (2, 4, 4)
    return torch.randn(count, *shape, generator=generator(1), dtype=torch.float64)


def classes(count: int = N) -> Tensor:
    return torch.randint(0, 3, (count,), generator=generator(2))


def reals(count: int = N) -> Tensor:
    return torch.randn(count, 3, generator=generator(3), dtype=torch.float64)


LOSSES: dict[str, tuple[nn.Module, Tensor]] = {
    "cross entropy": (nn.CrossEntropyLoss(), classes()),
    "cross entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), classes()),
    "squared": (nn.MSELoss(), reals()),
    "squared, sum": (nn.MSELoss(reduction="sum"), reals()),
    "binary": (nn.BCEWithLogitsLoss(), (reals() > 0).double()),
}


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Five samples and two."""
    return list(zip(x.split(5), y.split(5), strict=True))


def eye(model: nn.Module) -> Tensor:
    return torch.eye(sum(p.numel() for p in model.parameters() if p.requires_grad), dtype=torch.float64)
