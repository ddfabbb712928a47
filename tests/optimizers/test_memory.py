"""Bytes that a step holds beside parameters, gradients and state, counted by allocations."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optimizers import LAMB, LARS, SOAA, AdamW, Muon, SecondOrder, SophiaH, Tadam, blocked
from optimizers.compiled import elementwise_path

SHAPES = [(1200, 512), (512,), (77, 3), (900, 300)]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors allocated inside ``run`` held at once, by the profiler's allocation events."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    held, most = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def with_gradients() -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def check(make: Callable[[list[nn.Parameter]], SecondOrder], warm_up: int) -> SecondOrder:
    params = with_gradients()
    optimizer = make(params)
    size = sum(p.numel() * p.element_size() for p in params)
    for t in range(warm_up):
        optimizer.step(loss=torch.tensor(2.0 - 0.1 * t))
    peak = max(peak_bytes(lambda: optimizer.step(loss=torch.tensor(1.0))) for _ in range(2))
    assert peak <= 0.05 * size, f"{peak / size:.3f} of the parameters"
    assert optimizer.state_bytes() <= 8 * size // 4 + 4 * (2 * len(params) + 8)
    return optimizer


PRESETS = [lambda p: SOAA(p, compile=False), lambda p: AdamW(p, compile=False)]


def test_the_count_sees_a_copy_of_the_parameters() -> None:
    params = with_gradients()
    size = sum(p.numel() * p.element_size() for p in params)
    assert size <= peak_bytes(lambda: [p.detach().clone() for p in params]) <= 1.05 * size


@pytest.mark.parametrize("make", PRESETS)
def test_a_step_in_blocks_holds_its_blocks_alone(
    make: Callable[[list[nn.Parameter]], SecondOrder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first step on, which makes them; they are shortened, since their size does not depend on the model's."""
    monkeypatch.setattr(blocked, "BLOCK", 1 << 12)
    monkeypatch.setattr(blocked, "SMALL", 1 << 10)
    optimizer = check(make, warm_up=0)
    assert isinstance(optimizer._paths._path.passes, blocked.BlockedPasses)
    assert peak_bytes(lambda: optimizer.step_info.step_norm) <= 0.05 * 4 * 1200 * 512  # its record, too


def shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", 1 << 12)
    monkeypatch.setattr(blocked, "SMALL", 1 << 10)


def test_tadam_in_blocks_holds_its_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The general path held 5.4 times the parameters."""
    shortened(monkeypatch)
    params = with_gradients()
    size = sum(p.nbytes for p in params)
    optimizer = Tadam(params)
    for t in range(3):
        assert peak_bytes(lambda t=t: optimizer.step(loss=torch.tensor(2.0 - 0.1 * t))) <= 0.05 * size


@pytest.mark.parametrize("compiles", ["auto", True])
def test_sophia_holds_its_blocks_alone(compiles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step that refreshes too, which takes in what ``backward`` measured; native passes hold nothing."""
    shortened(monkeypatch)
    params = with_gradients()
    size = sum(p.nbytes for p in params)
    optimizer = SophiaH(params, interval=2, compile=compiles)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(sum(p.square().sum() for p in params))
        assert peak_bytes(optimizer.step) <= (0.05 if compiles != True else 0.005) * size  # noqa: E712


@pytest.mark.parametrize("make", [LAMB, LARS, Muon])
def test_a_step_tensor_by_tensor_holds_a_layers_worth(
    make: Callable[[list[nn.Parameter]], SecondOrder],
) -> None:
    """Of 40 layers; the general path held four to six times all of them."""
    params = [nn.Parameter(torch.randn(64, 64)) for _ in range(40)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make(params)
    for _ in range(2):
        assert peak_bytes(optimizer.step) <= 8 * params[0].nbytes


def test_native_passes_hold_nothing() -> None:
    check(lambda p: SOAA(p, compile=True), warm_up=0)


@pytest.mark.slow
def test_passes_of_the_compiler_hold_the_pools_of_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise_path, "serves", lambda kind: False)
    check(lambda p: SOAA(p, compile=True), warm_up=2)


@pytest.mark.slow
def test_the_graph_of_any_composition_holds_less_than_three_copies() -> None:
    """Its sums stand between the new state and the parameters, so the compiler keeps what it has formed till then."""
    params = with_gradients()
    optimizer = Tadam(params, compile=True)
    for t in range(3):
        optimizer.step(loss=torch.tensor(2.0 - 0.1 * t))
    size = sum(p.numel() * p.element_size() for p in params)
    assert peak_bytes(lambda: optimizer.step(loss=torch.tensor(1.0))) <= 2.5 * size
