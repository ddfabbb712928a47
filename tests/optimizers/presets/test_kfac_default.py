"""K-FAC as it comes does not throw a deep network off in its first steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimizers import EKFAC, KFAC


@pytest.mark.parametrize("preset", [KFAC, EKFAC])
def test_defaults_never_lift_the_loss_far_above_its_start(preset: type[KFAC]) -> None:
    """Seed 0, 40 steps of batches of 128, ten classes: the factors of the first batches must not decide alone."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 200),
        nn.ReLU(),
        nn.Linear(200, 100),
        nn.ReLU(),
        nn.Linear(100, 50),
        nn.ReLU(),
        nn.Linear(50, 10),
    )
    teacher = torch.randn(64, 10)
    optimizer = preset(model)
    losses = []
    for _ in range(40):
        x = torch.rand(128, 64)
        y = (x @ teacher).argmax(1)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, y)
            optimizer.backward(loss, outputs)
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    assert max(losses) < 1.2 * losses[0]
    assert losses[-1] < 0.6 * losses[0]
