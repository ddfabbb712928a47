"""The block-by-block step is the general step: same parameters, state and record."""

from __future__ import annotations

import copy

import pytest
import torch

from optimizers import SOAA, Adam, AdamW, SecondOrder, blocked
from optimizers.step_paths import StepPaths


def run(make, dtype: torch.dtype) -> tuple[torch.nn.Module, SecondOrder]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3)).to(dtype)
    optimizer = make(model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        x = torch.randn(8, 30, generator=generator, dtype=dtype)
        y = torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        optimizer.backward(20.0 * torch.nn.functional.cross_entropy(model(x), y))
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda m: SOAA(m.parameters(), lr=1e-2, total_steps=30, weight_decay=0.1),
        lambda m: SOAA(m.parameters(), lr=1e-2, total_steps=30, prediction="model"),
        lambda m: SOAA([{"params": m[0].parameters(), "lr": 1e-3}, {"params": m[2].parameters()}], lr=1e-2),
        lambda m: AdamW(m.parameters(), lr=1e-5, maximize=True),
        lambda m: Adam(m.parameters(), lr=1e-2),
        lambda m: SOAA(m.parameters(), lr=1e-2, total_steps=30, fisher_scale="lagged"),
    ],
)
@pytest.mark.parametrize(("size", "small"), [(64, 0), (1 << 17, 1 << 15), (130, 100)])
def test_block_by_block_equals_the_general_step(
    make, size: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = blocked.BlockedPasses.step_on_host_
    monkeypatch.setattr(blocked, "BLOCK", size)
    monkeypatch.setattr(blocked, "SMALL", small)
    monkeypatch.setattr(blocked.BlockedPasses, "step_on_host_", lambda *a: calls.append(1) or original(*a))
    model, optimizer = run(make, torch.float64)
    assert len(calls) == 30
    monkeypatch.setattr(StepPaths, "_built", lambda *a: None)
    general, reference = run(make, torch.float64)
    assert len(calls) == 30
    for p, q in zip(model.parameters(), general.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    for name, value in optimizer.step_info.items():
        torch.testing.assert_close(
            value.double(),
            reference.step_info[name].double(),
            rtol=1e-8,
            atol=1e-12,
            equal_nan=True,
            msg=name,
        )
    ours, theirs = optimizer.state_dict()["state"], reference.state_dict()["state"]
    for i, entries in theirs.items():
        for name, value in entries.items():
            torch.testing.assert_close(ours[i][name], value, rtol=1e-8, atol=1e-12, msg=name)


def test_bfloat16_parameters_keep_float32_moments() -> None:
    model, optimizer = run(lambda m: SOAA(m.parameters(), lr=1e-2, total_steps=30), torch.bfloat16)
    entries = optimizer.state[model[0].weight]
    assert {x.dtype for n, x in entries.items() if n in ("momentum", "curvature/second_moment")} == {
        torch.float32
    }
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_state_takes_two_numbers_a_parameter() -> None:
    model, optimizer = run(lambda m: SOAA(m.parameters(), lr=1e-2, total_steps=30), torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    scalars = optimizer.state_bytes() - 8 * parameters
    assert 0 < scalars <= 4 * (2 * 4 + 8)  # two counts a tensor, and a handful for the whole


def test_a_parameter_without_gradient_takes_the_general_step() -> None:
    model, optimizer = run(lambda m: SOAA(m.parameters(), lr=1e-2, total_steps=30), torch.float64)
    before = copy.deepcopy(model[2].weight)
    model[2].weight.grad = None
    optimizer.step(loss=1.0)
    assert torch.equal(model[2].weight, before)
    assert not torch.equal(model[0].weight, before.new_zeros(model[0].weight.shape))


def test_parameters_without_elements_are_no_trouble() -> None:
    w = torch.nn.Parameter(torch.empty(0, dtype=torch.float64))
    optimizer = AdamW([w], lr=1e-2)
    w.grad = torch.empty_like(w)
    optimizer.step()
    other = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SOAA([w, other], lr=1e-2)
    other.grad = torch.ones_like(other)
    optimizer.step(loss=1.0)
    assert bool((other < 1.0).all())
