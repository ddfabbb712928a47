"""Tadam's step in blocks equals the general path, which writes every vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers import SecondOrder, Tadam, blocked, centred_step

CASES: dict[str, Callable[[list[Tensor]], SecondOrder]] = {
    "defaults": lambda p: Tadam(p, lr=0.05),
    "decay": lambda p: Tadam(p, lr=torch.tensor(0.05, dtype=torch.float64), total_steps=6, weight_decay=0.1),
    "two groups": lambda p: Tadam(
        [{"params": p[:1], "lr": 0.02, "momentum": 0.5}, {"params": p[1:], "maximize": False}],
        lr=0.1,
        eps=1e-3,
    ),
    "betas": lambda p: Tadam(p, lr=0.05, betas=(0.6, 0.9)),
}


def trained(
    make: Callable[[list[Tensor]], SecondOrder], dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    x, y = torch.randn(8, 5).to(dtype), torch.randint(0, 3, (8,))
    params: list[Tensor] = list(model.parameters())
    optimizer = make(params)
    told = []
    for t in range(9):
        optimizer.zero_grad()
        optimizer.backward(nn.functional.cross_entropy(model(x), y))
        if t == 4:
            params[0].grad = None  # the general path's step, between those in blocks
        optimizer.step()
        told.append(torch.tensor(list(optimizer.step_info.as_floats().values())))
    state = [m for p in params for m in optimizer.state[p].values() if isinstance(m, Tensor)]
    return [*(p.detach() for p in params), *state], told


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_blocks_take_the_general_step(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", 7)  # more than one block a tensor, the last one shorter
    taken: list[Any] = []
    step_ = centred_step.step_
    monkeypatch.setattr(centred_step, "step_", lambda *a: taken.append(1) or step_(*a))
    fast, fast_told = trained(CASES[name], dtype)
    assert len(taken) == 8
    monkeypatch.setattr(centred_step, "suits", lambda *a: False)
    general, told = trained(CASES[name], dtype)
    assert len(taken) == 8
    close = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    for a, b in zip(fast, general, strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close, equal_nan=True)
    for a, b in zip(fast_told, told, strict=True):
        torch.testing.assert_close(a, b, rtol=max(10 * close, 1e-6), atol=max(close, 1e-9), equal_nan=True)
