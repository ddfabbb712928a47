"""First-order baselines from PyTorch itself: what every claim of a gain is measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Pair(torch.optim.Optimizer):
    """Two optimizers that step together over disjoint parameters, seen from outside as one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.parts = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        # the very same groups, so that a learning rate set here is seen by the part
        self.param_groups = [*first.param_groups, *second.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("closure must be None: neither part evaluates the loss")
        for part in self.parts:
            part.step()
            self.state.update(part.state)


def sgd(
    model: nn.Module, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Build SGD with Nesterov's momentum."""
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
    )


def adamw(
    model: nn.Module,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Build PyTorch's AdamW; unlike PyTorch's, its default has no weight decay, as every cell's."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay
    )


def muon(
    model: nn.Module, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Build Muon for matrices with AdamW for the rest, at one learning rate (Muon's scaled to AdamW's RMS)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    rest = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay) if others else None
    if not matrices:
        raise ValueError("torch-muon needs a parameter with 2 dimensions, and the model has none")
    first = torch.optim.Muon(
        matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return first if rest is None else Pair(first, rest)


BASELINES: dict[str, tuple[Callable[..., torch.optim.Optimizer], str]] = {
    "torch-sgd": (sgd, "torch.optim.SGD with Nesterov's momentum 0.9"),
    "torch-adamw": (adamw, "torch.optim.AdamW, no weight decay by default"),
    "torch-muon": (muon, "torch.optim.Muon for matrices, AdamW for the rest"),
}


def is_first_order(name: str) -> bool:
    """Return whether a cell of this name may set the target that others are measured against."""
    return name in BASELINES


def build(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Build a baseline by name for the parameters of a model."""
    return BASELINES[name][0](model, **options)
