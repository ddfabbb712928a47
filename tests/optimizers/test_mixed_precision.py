"""Autocast, and ``GradScaler``: scaled gradients, a loss as it is, and skipped steps that leave nothing behind."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

from curvature import KFAC
from optimizers import SOAA, AdamW, SecondOrder, build
from trust_region import FixedRadius, TrustRegion


def network(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)


X = torch.randn(10, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (10,), generator=torch.Generator().manual_seed(2))


def loss_of(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = model(X.to(next(model.parameters()).dtype))
    return torch.nn.functional.cross_entropy(outputs, Y), outputs


def make(model: torch.nn.Module, name: str, **options: Any) -> SecondOrder:
    """A preset, or K-FAC in the flat loop (its preset judges trials, which a scaler cannot drive)."""
    if name == "kfac":
        damped = {"radius": FixedRadius(1.0, damping=0.1)}
        return SecondOrder(
            model.parameters(),
            curvature=KFAC(model, fisher="type-2"),
            trust_region=TrustRegion(**damped),
            **options,
        )
    return build(model, name, **options)


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)


@pytest.mark.parametrize("name", ["soaa", "adamw", "adahessian", "sophia-g", "kfac"])
@pytest.mark.parametrize("clip", [False, True])
def test_scaled_run_equals_the_plain_one(name: str, clip: bool) -> None:
    """Powers of two scale without rounding, so curvature, radius and steps are the same."""
    plain, scaled = network(), network()
    a, b, grad_scaler = make(plain, name), make(scaled, name), scaler()
    for _ in range(6):
        a.zero_grad()
        a.backward(*loss_of(plain))
        if clip:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        a.step()
        b.zero_grad()
        b.backward(*loss_of(scaled), scaler=grad_scaler)
        if clip:
            grad_scaler.unscale_(b)
            torch.nn.utils.clip_grad_norm_(scaled.parameters(), 0.05)
        grad_scaler.step(b)
        grad_scaler.update()
        assert float(a.step_info.loss) == float(b.step_info.loss)
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_plain_loop_with_the_loss_given_to_the_scaler() -> None:
    plain, scaled = network(), network()
    a, b, grad_scaler = SOAA(plain.parameters()), SOAA(scaled.parameters()), scaler()
    for _ in range(5):
        a.zero_grad()
        loss = loss_of(plain)[0]
        loss.backward()
        a.step(loss=loss)
        b.zero_grad()
        loss = loss_of(scaled)[0]
        grad_scaler.scale(loss).backward()
        grad_scaler.step(b, loss=loss)
        grad_scaler.update()
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["soaa", "adahessian", "kfac"])
def test_skipped_step_leaves_everything_and_discards_what_was_observed(name: str) -> None:
    model, grad_scaler = network(), scaler()
    optimizer = make(model, name)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(*loss_of(model), scaler=grad_scaler)
        grad_scaler.step(optimizer)
        grad_scaler.update()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.backward(*loss_of(model), scaler=grad_scaler)
    next(model.parameters()).grad[0, 0] = float("inf")
    grad_scaler.step(optimizer)
    scale = grad_scaler.get_scale()
    grad_scaler.update()
    assert grad_scaler.get_scale() == scale / 2
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    after = optimizer.state_dict()["state"]
    assert float(after[0].pop("skipped_steps")) == float(state[0].pop("skipped_steps")) + 1
    for i, entries in state.items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[i][key])), key
    assert optimizer._pending.loss is None
    assert not optimizer._pending.statistics


def test_scaled_loss_where_the_loss_itself_is_needed_is_refused() -> None:
    for name in ("soaa", "adahessian"):
        model, grad_scaler = network(), scaler()
        optimizer = build(model, name)
        loss, outputs = loss_of(model)
        optimizer.backward(grad_scaler.scale(loss), outputs)
        with pytest.raises(RuntimeError, match="scaler=scaler"):
            grad_scaler.step(optimizer)


def test_closure_under_a_scaler_is_refused() -> None:
    model, grad_scaler = network(), scaler()
    optimizer = SOAA(model.parameters())
    grad_scaler.scale(loss_of(model)[0]).backward()
    with pytest.raises(RuntimeError, match="closure"):
        grad_scaler.step(optimizer, lambda: None)


def test_disabled_scaler_changes_nothing() -> None:
    model, grad_scaler = network(), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = SOAA(model.parameters())
    optimizer.backward(loss_of(model)[0], scaler=grad_scaler)
    grad_scaler.step(optimizer)
    assert float(optimizer.step_info.loss) == pytest.approx(float(loss_of(network())[0].detach()))


@pytest.mark.parametrize("name", ["soaa", "adamw", "adahessian", "kfac"])
def test_autocast_bfloat16_trains_with_float32_state(name: str) -> None:
    model = network(torch.float32)
    optimizer = make(model, name, lr=1e-2)
    first = loss_of(model)[0].item()
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, outputs = loss_of(model)
        optimizer.backward(loss, outputs)
        optimizer.step()
    assert loss_of(model)[0].item() < first
    assert {x.dtype for e in optimizer.state.values() for x in e.values() if torch.is_tensor(x)} == {
        torch.float32
    }


def test_clipping_enters_the_step() -> None:
    model, other = network(), network()
    ours, theirs = AdamW(model.parameters(), lr=1e-2), torch.optim.AdamW(other.parameters(), lr=1e-2)
    for t in range(5):
        for m, o in ((model, ours), (other, theirs)):
            o.zero_grad()
            loss_of(m)[0].backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1 / (1 + t))
            o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "name", ["ekfac", "hessian-free", "kfac", "lbfgs-trust-region", "muon", "soap", "trust-region-newton"]
)
def test_a_step_inside_autocast_is_the_one_outside_of_it(name: str) -> None:
    """Whole loops are put under autocast: the closure casts, trial included, and the step's own arithmetic does not."""

    def train(inside: bool) -> list[torch.Tensor]:
        model = network(torch.float32)
        optimizer = build(model, name)

        def cast(enabled: bool) -> Any:
            return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            with contextlib.nullcontext() if inside else cast(True):
                loss, outputs = loss_of(model)
            optimizer.backward(loss, outputs)
            return loss

        for _ in range(4):
            with cast(inside):
                optimizer.step(closure)
        return list(model.parameters())

    for p, q in zip(train(True), train(False), strict=True):
        assert torch.equal(p, q)
