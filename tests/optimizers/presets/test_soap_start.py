"""The start of SOAP: its basis changes after the first gradient, and no step may come of that alone."""

from __future__ import annotations

import math

import pytest
import torch

from optimizers import SOAP


@pytest.mark.parametrize("max_dim", [None, 10])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_of_the_first_twenty_is_much_longer_than_a_sign_step(
    max_dim: int | None, compiled: bool
) -> None:
    """|m̂| <= √v̂ to a small factor while both are means of the same gradients; √P is the length of a step of signs."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(12, 8, generator=generator, dtype=torch.float64))
    optimizer = SOAP([w], lr=1.0, weight_decay=0.0, max_dim=max_dim, compile=compiled)
    for _ in range(20):
        before = w.detach().clone()
        # of rank 1 and a little noise, as gradients of a first batch are
        left, right = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for n in w.shape)
        w.grad = left @ right.T + 1e-3 * torch.randn(12, 8, generator=generator, dtype=torch.float64)
        optimizer.step()
        assert float((w.detach() - before).norm()) <= 1.5 * math.sqrt(w.numel())
