"""Faults to survive: killed processes, torn checkpoints, layers that come and go, models that move."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizers import SOAA, AdamW, SecondOrder, available, build


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


X = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (10,), generator=torch.Generator().manual_seed(2))


def step(model: torch.nn.Module, *optimizers: SecondOrder) -> float:
    for optimizer in optimizers:
        optimizer.zero_grad()
    outputs = model(X)
    loss = torch.nn.functional.cross_entropy(outputs, Y)
    if len(optimizers) == 1:
        optimizers[0].backward(loss, outputs)
        optimizers[0].step()
    else:
        loss.backward()
        for optimizer in optimizers:
            optimizer.step(loss=loss)
    return float(loss.detach())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_leaves_radius_and_running_loss(bad: float) -> None:
    model = network()
    optimizer = SOAA(model.parameters(), lr=1e-2)
    for _ in range(3):
        step(model, optimizer)
    first = optimizer.state[next(model.parameters())]
    names = ("trust_region/radius", "trust_region/running_loss", "trust_region/predicted")
    before = [first[n].clone() for n in names]
    optimizer.step(loss=bad)
    assert [first[n] for n in names] == before


@pytest.mark.parametrize("name", ["soaa", "adamw", "adahessian", "sophia-h"])
def test_frozen_and_later_unfrozen_layer(name: str) -> None:
    """A frozen layer stands still, its counters too; unfrozen it joins in as if new."""
    model = network()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = build(model, name, params=model.parameters())
    held = model[0].weight.detach().clone()
    for _ in range(3):
        step(model, optimizer)
    assert torch.equal(model[0].weight, held)
    assert float(optimizer.state[model[0].weight]["step"]) == 0
    for p in model[0].parameters():
        p.requires_grad_(True)
    losses = [step(model, optimizer) for _ in range(10)]
    assert not torch.equal(model[0].weight, held)
    assert float(optimizer.state[model[0].weight]["step"]) == 10
    assert losses[-1] < losses[0]


def test_parameter_without_gradient_is_left_alone() -> None:
    model = network()
    unused = torch.nn.Parameter(torch.ones(3))
    optimizer = SOAA([*model.parameters(), unused], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        step(model, optimizer)
    assert torch.equal(unused.detach(), torch.ones(3))


def test_two_optimizers_over_one_model_do_not_meddle() -> None:
    model, other = network(), network()
    body, head = SOAA(model[0].parameters(), lr=1e-2), AdamW(model[2].parameters(), lr=1e-2)
    for _ in range(5):
        step(model, body, head)
    reference = torch.optim.AdamW(other[2].parameters(), lr=1e-2)
    lone = SOAA(other[0].parameters(), lr=1e-2)
    for _ in range(5):
        other.zero_grad()
        loss = torch.nn.functional.cross_entropy(other(X), Y)
        loss.backward()
        lone.step(loss=loss)
        reference.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("order", [0, 1])
def test_two_optimizers_that_both_look_at_the_loss(order: int, parts: int) -> None:
    """One observes, the other goes backward: each moves its part as it would alone, and gradients are counted once."""
    x, y = X.double(), Y

    def made(model: torch.nn.Module) -> tuple[SecondOrder, SecondOrder]:
        body = build(model, "adahessian", params=model[0].parameters(), lr=1e-2)
        options = {"damping": "fixed", "radius": 1.0, "fisher": "type-2"}
        return body, build(model, "kfac", params=model[2].parameters(), lr=1e-1, **options)

    model = network().double()
    pair = made(model)
    alone = [network().double() for _ in range(2)]
    single = [made(m)[i] for i, m in enumerate(alone)]
    for _ in range(3):
        for optimizer in pair:
            optimizer.zero_grad()
        for px, py in zip(x.chunk(parts), y.chunk(parts), strict=True):
            outputs = model(px)
            loss = torch.nn.functional.cross_entropy(outputs, py) / parts
            pair[order].observe(loss, outputs)
            pair[1 - order].backward(loss, outputs)
        for optimizer in pair:
            optimizer.step()
        for m, optimizer in zip(alone, single, strict=True):
            m.zero_grad()
            optimizer.zero_grad()
            for px, py in zip(x.chunk(parts), y.chunk(parts), strict=True):
                outputs = m(px)
                optimizer.backward(torch.nn.functional.cross_entropy(outputs, py) / parts, outputs)
            optimizer.step()
        with torch.no_grad():  # what the one moved the other sees
            for p, q in zip(alone[0][2].parameters(), alone[1][2].parameters(), strict=True):
                p.copy_(q)
            for p, q in zip(alone[1][0].parameters(), alone[0][0].parameters(), strict=True):
                p.copy_(q)
    for p, q in zip(model.parameters(), alone[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    assert not torch.equal(model[0].weight, network().double()[0].weight)


@pytest.mark.parametrize("name", ["soaa", "kfac", "lbfgs-trust-region", "shampoo"])
def test_cleared_state_starts_the_optimizer_again(name: str) -> None:
    """As it does one of ``torch.optim``, which creates state in the step that lacks it."""
    model, other = network(), network()
    optimizer = build(model, name)

    def train(m: torch.nn.Module, o: SecondOrder, steps: int) -> None:
        def closure() -> torch.Tensor:
            o.zero_grad()
            outputs = m(X)
            loss = torch.nn.functional.cross_entropy(outputs, Y)
            o.backward(loss, outputs)
            return loss

        for _ in range(steps):
            o.step(closure)

    train(model, optimizer, 3)
    optimizer.state.clear()
    other.load_state_dict(model.state_dict())
    train(model, optimizer, 3)
    fresh = build(other, name)
    train(other, fresh, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    saved = optimizer.state_dict()
    optimizer.state.clear()
    optimizer.load_state_dict(saved)
    for m, o in ((model, optimizer), (other, fresh)):
        train(m, o, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_model_moved_to_another_dtype_is_a_clear_error(dtype: torch.dtype) -> None:
    model = network()
    optimizer = SOAA(model.parameters())
    step(model, optimizer)
    model.to(dtype)
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(X.to(dtype)), Y).backward()
    with pytest.raises(RuntimeError, match="move the model first"):
        optimizer.step(loss=1.0)


def test_ten_thousand_steps_do_not_grow() -> None:
    """Objects and tensors after 10,000 steps are those after 100."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = SOAA([w], lr=1e-3, total_steps=10_000)

    def run(steps: int) -> int:
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.backward((w * w).sum())
            optimizer.step()
        gc.collect()
        return sum(1 for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))

    early = run(100)
    assert run(9_900) <= early


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", available()["optimizers"])
def test_no_preset_grows(name: str) -> None:
    """Living tensors and bytes of state after 80 steps are those after 30, when every history is full."""
    model = network()
    optimizer = build(model, name)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        outputs = model(X)
        loss = torch.nn.functional.cross_entropy(outputs, Y)
        optimizer.backward(loss, outputs)
        return loss

    found = []
    for steps in (30, 50):
        for _ in range(steps):
            optimizer.step(closure)
        gc.collect()
        found.append((sum(type(x) is torch.Tensor for x in gc.get_objects()), optimizer.state_bytes()))
    assert found[1][0] <= found[0][0]
    assert found[1][1] == found[0][1] > 0


TRAINING = """
    import os, signal, sys, torch
    from pathlib import Path
    from optimizers import SOAA
    folder, total, die_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = SOAA(model.parameters(), lr=1e-2, total_steps=total)
    done = 0
    found = sorted(folder.glob("step-*.pt"))
    if found:
        saved = torch.load(found[-1], weights_only=True)
        model.load_state_dict(saved["model"]); optimizer.load_state_dict(saved["optimizer"]); done = saved["done"]
    for t in range(done, total):
        generator = torch.Generator().manual_seed(t)
        x, y = torch.randn(10, 6, generator=generator), torch.randint(0, 3, (10,), generator=generator)
        optimizer.zero_grad()
        optimizer.backward(torch.nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        if (t + 1) % 3 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": t + 1}
            torch.save(state, folder / "unfinished")
            if t + 1 == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            os.replace(folder / "unfinished", folder / f"step-{t + 1:04d}.pt")
    torch.save(model.state_dict(), folder / "end.pt")
"""


def train_in_a_process(folder: Path, die_at: int) -> int:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(TRAINING), str(folder), "12", str(die_at)]
    return subprocess.run(command, env=environment, check=False, timeout=120).returncode


def test_sigkill_between_two_checkpoint_files_then_restart_ends_the_same(tmp_path: Path) -> None:
    assert train_in_a_process(tmp_path / "whole", -1) == 0
    assert train_in_a_process(tmp_path / "killed", 9) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "step-0009.pt").exists()
    assert (tmp_path / "killed" / "step-0006.pt").exists()
    assert train_in_a_process(tmp_path / "killed", -1) == 0
    ends: list[Any] = [torch.load(tmp_path / n / "end.pt", weights_only=True) for n in ("whole", "killed")]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
