"""Small problems in float64 that the matrix-free tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, Callable[[Any, Any], Tensor], Any, Any]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    """Every parameter random, norms' weights and biases too, from a generator of its own."""
    g = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g))
    return model


def mlp(activation: type[nn.Module] = nn.Tanh, out: int = 3, seed: int = 0) -> nn.Module:
    return randomise(nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, out)).double(), seed)


def classification() -> Case:
    g = generator(1)
    x = torch.randn(7, 4, generator=g, dtype=torch.float64)
    return mlp(), nn.CrossEntropyLoss(), x, torch.tensor([0, 1, 2, 1, 0, 2, 2])


def weighted() -> Case:
    """Class weights, a label that is ignored, label smoothing."""
    model, _, x, y = classification()
    y = y.clone()
    y[2] = -100
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    return model, nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), x, y


def regression() -> Case:
    g = generator(2)
    x = torch.randn(6, 4, generator=g, dtype=torch.float64)
    return mlp(), nn.MSELoss(), x, torch.randn(6, 3, generator=g, dtype=torch.float64)


def binary() -> Case:
    g = generator(3)
    x = torch.randn(6, 4, generator=g, dtype=torch.float64)
    return (
        mlp(out=1),
        nn.BCEWithLogitsLoss(),
        x,
        torch.tensor([[0.0], [1], [1], [0], [1], [0]], dtype=torch.float64),
    )


def summed() -> Case:
    model, _, x, y = classification()
    return model, nn.CrossEntropyLoss(reduction="sum"), x, y


def layer_norm() -> Case:
    """Where nested ``torch.func`` Jacobians are wrong."""
    _, loss_fn, x, y = classification()
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)).double()
    return randomise(model, 4), loss_fn, x, y


def batch_norm() -> Case:
    _, loss_fn, x, y = classification()
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    return randomise(model, 5), loss_fn, x, y


def convolution() -> Case:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Softplus(), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randn(4, 2, 3, 3, generator=generator(6), dtype=torch.float64)
    return randomise(model, 6), nn.CrossEntropyLoss(), x, torch.tensor([0, 1, 2, 1])


def frozen() -> Case:
    model, loss_fn, x, y = classification()
    model[0].weight.requires_grad_(False)
    return model, loss_fn, x, y


class Tied(nn.Module):
    """One weight as embedding and as output layer, one module called twice, tokens masked in the loss."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=padding_idx)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        h = self.embedding(tokens)
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        return {"logits": self.head(h), "hidden": h}


def sequence_loss(outputs: dict[str, Tensor], target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), target.flatten())


def tied(padding_idx: int | None = None) -> Case:
    tokens = torch.randint(0, 5, (3, 4), generator=generator(7))
    target = torch.randint(0, 5, (3, 4), generator=generator(8))
    target[1, 2:] = -100
    return randomise(Tied(padding_idx).double(), 7), sequence_loss, tokens, target


CASES: dict[str, Callable[[], Case]] = {
    c.__name__: c
    for c in (
        classification,
        weighted,
        regression,
        binary,
        summed,
        layer_norm,
        batch_norm,
        convolution,
        frozen,
        tied,
    )
}
