"""K-FAC's solve kept beside the momentum: the numbers of whole products, wherever rows may stand in for them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvature.kronecker import solved_mean
from optimizers import KFAC
from optimizers.momentum import HeavyBall

Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(model, x, y) ↦ (loss, outputs)."""


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three layers for which four rows are worth taking, one without bias, and a last one for which they are not."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 25, bias=False), nn.Tanh(), nn.Linear(25, 40), nn.Tanh(),
        nn.Linear(40, 3),
    ).to(dtype)  # fmt: skip


def plain(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy."""
    outputs = model(x)
    return nn.functional.cross_entropy(outputs.flatten(0, -2), y.flatten()), outputs


def trained(
    model: nn.Module,
    *,
    rows: bool,
    steps: int = 60,
    loss_of: Loss = plain,
    before_step: Callable[[int, KFAC], None] = lambda step, optimizer: None,
    shape: tuple[int, ...] = (4,),
    since: int = 0,
    **options: Any,
) -> tuple[KFAC, list[int]]:
    """Train ``model`` in place; how many blocks' gradients came as rows in each step, too.

    Before the step ``since`` the loss is the plain one, so that layers are proven to give rows.
    """
    optimizer = KFAC(model, **{"damping": "fixed", "lr": 0.5, **options})
    if not rows:
        optimizer._watch = lambda loss, outputs: None  # type: ignore[method-assign]
    seen = more(optimizer, model, range(since), plain, before_step, shape)
    return optimizer, seen + more(optimizer, model, range(since, steps), loss_of, before_step, shape)


def more(
    optimizer: KFAC,
    model: nn.Module,
    steps: range,
    loss_of: Loss = plain,
    before_step: Callable[[int, KFAC], None] = lambda step, optimizer: None,
    shape: tuple[int, ...] = (4,),
) -> list[int]:
    """Take further steps; data by the number of the step."""
    first = next(model.parameters())
    seen = []
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x = torch.randn(*shape, 20, generator=g, dtype=torch.float64).to(first.dtype)
        y = torch.randint(0, 3, shape, generator=g)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss, outputs = loss_of(model, x, y)
            optimizer.backward(loss, outputs)
            return loss

        if optimizer.needs.trial:
            optimizer.step(closure)
        else:
            closure()
            before_step(step, optimizer)
            optimizer.step()
        seen.append(kept(optimizer))
    return seen


def kept(optimizer: KFAC) -> int:
    """For how many weights s is kept."""
    return sum("solved_mean" in s and p.dim() == 2 for p, s in optimizer.state.items())


def distance(a: nn.Module, b: nn.Module) -> float:
    """Relative, over all parameters."""
    x, y = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (a, b))
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 1.0, "damping": "trial", "initial_damping": 3.0, "radius": 10.0},
        {"lr": 1.0, "damping": "lagged", "initial_damping": 3.0, "radius": 10.0},
        {"factor_interval": 5, "inverse_interval": 7},
        {"fisher": "type-2", "weight_decay": 0.1},
        {"fisher": "forward-only", "momentum": 0.5},
        {"shape": (2, 2)},
    ],
    ids=["fixed", "trial", "lagged", "intervals", "type-2", "forward-only", "sequence"],
)
def test_rows_give_the_numbers_of_whole_products(options: dict[str, Any]) -> None:
    one, other = network(), network()
    _, seen = trained(one, rows=True, **options)
    whole, without = trained(other, rows=False, **options)
    assert min(seen) == 3
    assert max(without) == 0
    if "initial_damping" in options:
        assert float(whole._region_state["damping"]) != options["initial_damping"]  # type: ignore[arg-type]
    assert distance(one, other) < 1e-10


def test_step_is_the_formula_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Δθ = -η (G + √λ/π I)⁻¹ m̂ (A + π√λ I)⁻¹, m̂ by its own recursion, inverses by another routine."""
    model, steps = network(), []
    optimizer = KFAC(model, lr=0.1, damping="fixed", radius=1e9, initial_damping=0.2, inverse_interval=9)
    added = counted(monkeypatch, "add_rows_")
    layer = model[0]
    mean, before = torch.zeros(30, 21, dtype=torch.float64), torch.zeros(30, 21, dtype=torch.float64)
    for t in range(1, 41):
        before = torch.cat([layer.weight.detach(), layer.bias.detach().unsqueeze(1)], 1)
        more(optimizer, model, range(t, t + 1))
        g = torch.cat([layer.weight.grad, layer.bias.grad.unsqueeze(1)], 1)
        mean = 0.9 * mean + 0.1 * g
        A, G = (optimizer._curvature_state[key][0][0] for key in ("A_used", "G_used"))  # type: ignore[index]
        pi = ((A.trace() / 21) / (G.trace() / 30)).sqrt()
        A = torch.linalg.inv(A + pi * 0.2**0.5 * torch.eye(21, dtype=A.dtype))
        G = torch.linalg.inv(G + 0.2**0.5 / pi * torch.eye(30, dtype=G.dtype))
        taken = torch.cat([layer.weight.detach(), layer.bias.detach().unsqueeze(1)], 1) - before
        steps.append(float((taken + 0.1 * G @ (mean / (1 - 0.9**t)) @ A).norm() / taken.norm()))
    assert len(added) > 60
    assert max(steps) < 1e-10


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """One entry for every call of a function of the module."""
    calls: list[None] = []
    function = getattr(solved_mean, name)

    def counting(*args: Any) -> Any:
        calls.append(None)
        return function(*args)

    monkeypatch.setattr(solved_mean, name, counting)
    return calls


def test_whole_products_are_taken_only_where_inverses_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    added, full = counted(monkeypatch, "add_rows_"), counted(monkeypatch, "solved_in_full")
    trained(network(), rows=True, steps=100)
    assert len(added) + len(full) == 300
    assert len(full) < 45


def clipped(step: int, optimizer: KFAC) -> None:
    """Gradients scaled in place."""
    nn.utils.clip_grad_norm_(optimizer._params, 1e-2)


def replaced(step: int, optimizer: KFAC) -> None:
    """Other gradients of the same size in their place."""
    for p in optimizer._params:
        p.grad = None if p.grad is None else p.grad * 2.0


def inputs_overwritten(step: int, optimizer: KFAC) -> None:
    """The rows changed after the backward pass, not the gradients."""
    for rows in optimizer._pending.rows.values():
        rows.X.mul_(2.0)


@pytest.mark.parametrize("change", [clipped, replaced, inputs_overwritten])
def test_changed_gradients_go_by_whole_products(change: Callable[[int, KFAC], None]) -> None:
    one, other = network(), network()
    _, seen = trained(one, rows=True, before_step=change)
    trained(other, rows=False, before_step=change)
    assert max(seen) == 0
    assert distance(one, other) == 0.0


def test_gradients_changed_now_and_then_cost_no_accuracy() -> None:
    def now_and_then(step: int, optimizer: KFAC) -> None:
        if step % 3 == 0:
            clipped(step, optimizer)

    one, other = network(), network()
    optimizer, seen = trained(one, rows=True, steps=58, before_step=now_and_then)
    trained(other, rows=False, steps=58, before_step=now_and_then)
    assert (min(seen), max(seen)) == (0, 3)
    assert not any("solved_damping" in s for s in optimizer.state.values())  # the last step's were clipped
    assert distance(one, other) < 1e-10


def penalised(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A term that reads the first three weights beside their layers."""
    loss, outputs = plain(model, x, y)
    return loss + sum(model[i].weight.square().sum() for i in (0, 2, 4)), outputs  # type: ignore[index, operator, union-attr]


def penalised_bias(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A term that reads the biases of the first and third layer, and the second's weight."""
    loss, outputs = plain(model, x, y)
    read = (model[0].bias, model[2].weight, model[4].bias)  # type: ignore[index]
    return loss + sum(p.square().sum() for p in read), outputs  # type: ignore[misc, operator]


def called_twice(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Every layer at two places of the graph."""
    outputs = model(x) + model(2.0 * x)
    return nn.functional.cross_entropy(outputs, y), outputs


def many_rows(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """More rows than are worth it."""
    return plain(model, x.repeat(40, 1), y.repeat(40))


@pytest.mark.parametrize("loss_of", [penalised, penalised_bias, called_twice, many_rows])
def test_what_is_no_product_of_one_calls_few_rows_goes_by_whole_products(loss_of: Loss) -> None:
    one, other = network(), network()
    options: dict[str, Any] = {"loss_of": loss_of, "steps": 20, "since": 6, "beside_outputs": "drop"}
    _, seen = trained(one, rows=True, **options)
    trained(other, rows=False, **options)
    assert (set(seen[:6]), set(seen[6:])) == ({3}, {0})
    assert distance(one, other) < 1e-10


def tripled(p: Tensor) -> None:
    """A hook on what was accumulated."""
    assert p.grad is not None
    p.grad.mul_(3.0)


@pytest.mark.parametrize("kind", ["tensor", "accumulated"])
def test_hooks_on_a_parameter_go_by_whole_products(kind: str) -> None:
    def hooked_later(step: int, optimizer: KFAC) -> None:
        for p in optimizer._params if step == 5 else ():
            if kind == "tensor":
                p.register_hook(lambda g: 3.0 * g)
            else:
                p.register_post_accumulate_grad_hook(tripled)  # type: ignore[attr-defined]

    one, other = network(), network()
    _, seen = trained(one, rows=True, steps=16, before_step=hooked_later)
    trained(other, rows=False, steps=16, before_step=hooked_later)
    assert (set(seen[:6]), set(seen[6:])) == ({3}, {0})
    assert distance(one, other) < 1e-10


@pytest.mark.parametrize("kind", ["two backward calls", "gradients from before"])
def test_accumulated_gradients_go_by_whole_products(kind: str) -> None:
    def run(rows: bool) -> tuple[nn.Module, list[int]]:
        model = network()
        optimizer, seen = trained(model, rows=rows, steps=6)
        for step in range(6, 16):
            g = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            for part in range(2):
                x = torch.randn(4, 20, generator=g, dtype=torch.float64)
                loss, outputs = plain(model, x, torch.randint(0, 3, (4,), generator=g))
                if part == 0 and kind == "gradients from before":
                    loss.backward()
                else:
                    optimizer.backward(loss / 2, outputs)
            optimizer.step()
            seen.append(kept(optimizer))
        return model, seen

    (one, seen), (other, _) = run(True), run(False)
    assert (set(seen[:6]), set(seen[6:])) == ({3}, {0})
    assert distance(one, other) < 1e-10


@pytest.mark.parametrize("where", ["output", "module", "node"])
def test_gradients_changed_on_the_way_down_are_seen_as_they_arrive(where: str) -> None:
    """Hooks above the product change its rows and the gradient alike."""

    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        middle = model[:5](x)  # type: ignore[index]
        if where == "output":
            middle.register_hook(lambda g: 3.0 * g)
        elif where == "node":
            middle.grad_fn.register_prehook(lambda gradients: tuple(3.0 * g for g in gradients))
        outputs = model[5:](middle)  # type: ignore[index]
        return nn.functional.cross_entropy(outputs, y), outputs

    def hooked() -> nn.Sequential:
        model = network()
        if where == "module":
            model[4].register_full_backward_hook(lambda module, into, out: tuple(3.0 * g for g in into))
        return model

    one, other = hooked(), hooked()
    _, seen = trained(one, rows=True, loss_of=loss_of)
    trained(other, rows=False, loss_of=loss_of)
    assert max(seen) >= 2
    assert distance(one, other) < 1e-10


def test_a_forward_of_ones_own_is_found_out_by_its_product() -> None:
    def doubled() -> nn.Sequential:
        model = network()
        layer = model[0]
        layer.forward = lambda x: nn.functional.linear(2.0 * x, layer.weight, layer.bias)
        return model

    one, other = doubled(), doubled()
    _, seen = trained(one, rows=True, steps=20, fisher="forward-only")
    trained(other, rows=False, steps=20, fisher="forward-only")
    assert max(seen) == 2  # all but that layer
    assert distance(one, other) < 1e-10


def test_checkpointed_layers_give_rows() -> None:
    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        middle = checkpoint(model[:5], x, use_reentrant=False)  # type: ignore[index]
        outputs = model[5:](middle)  # type: ignore[index]
        return nn.functional.cross_entropy(outputs, y), outputs

    one, other = network(), network()
    _, seen = trained(one, rows=True, steps=30, loss_of=loss_of)
    trained(other, rows=False, steps=30, loss_of=loss_of)
    assert min(seen) == 3
    assert distance(one, other) < 1e-10


def test_other_precision_and_other_momentum_go_by_whole_products() -> None:
    model = network(torch.bfloat16)
    _, seen = trained(model, rows=True, steps=4)
    assert max(seen) == 0

    def autocast(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(model, x, y)

    _, seen = trained(network(torch.float32), rows=True, steps=4, loss_of=autocast)
    assert max(seen) == 0
    _, seen = trained(network(), rows=True, steps=4, momentum=HeavyBall(0.9))
    assert max(seen) == 0


def test_a_group_of_its_own_for_biases_and_a_schedule_of_momentum() -> None:
    def run(rows: bool, own: float) -> tuple[nn.Module, int]:
        model = network()
        weights = [p for p in model.parameters() if p.dim() == 2]
        biases = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": weights}, {"params": biases, "momentum": own}]
        optimizer = KFAC(model, lr=0.5, damping="fixed", params=groups)
        if not rows:
            optimizer._watch = lambda loss, outputs: None  # type: ignore[method-assign]
        seen = 0
        for step in range(40):
            for group in optimizer.param_groups:
                group["momentum"] *= 0.98
            seen = more(optimizer, model, range(step, step + 1))[0]
        return model, seen

    for own, expected in ((0.9, 3), (0.5, 1)):  # a block whose members have different β is solved in full
        (one, seen), (other, _) = run(True, own), run(False, own)
        assert seen == expected
        assert distance(one, other) < 1e-10


def test_a_member_without_a_gradient_goes_by_whole_products() -> None:
    def frozen_now_and_then(step: int, optimizer: KFAC) -> None:
        if step % 4 == 1:
            optimizer._params[1].grad = None

    one, other = network(), network()
    _, seen = trained(one, rows=True, before_step=frozen_now_and_then)
    trained(other, rows=False, before_step=frozen_now_and_then)
    assert seen[0] == 3
    assert set(seen[1:]) == {2}  # from then on the bias has had fewer gradients than the weight
    assert distance(one, other) < 1e-10


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("at", [9, 14, 23])
def test_resumed_run_continues_bit_for_bit(interval: int, at: int) -> None:
    model = network()
    optimizer, seen = trained(model, rows=True, steps=at, factor_interval=interval)
    assert seen[-1] == 3
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = network()
    other.load_state_dict(saved[0])
    resumed = KFAC(other, lr=0.5, damping="fixed", factor_interval=interval)
    resumed.load_state_dict(saved[1])
    more(optimizer, model, range(at, at + 10))
    more(resumed, other, range(at, at + 10))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_damping_moved_between_save_and_load_is_seen() -> None:
    model = network()
    optimizer, _ = trained(model, rows=True, steps=9)
    optimizer._region_state["damping"].mul_(2.0)  # type: ignore[union-attr]
    other = copy.deepcopy(model)
    resumed = KFAC(other, lr=0.5, damping="fixed")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed._watch = lambda loss, outputs: None  # type: ignore[method-assign]
    more(optimizer, model, range(9, 19))
    more(resumed, other, range(9, 19))
    assert distance(model, other) < 1e-10


def test_checkpoints_with_and_without_the_solve_load_into_any_run() -> None:
    model = network()
    optimizer, _ = trained(model, rows=True, steps=9)
    without = copy.deepcopy(optimizer.state_dict())
    for entries in without["state"].values():
        entries.pop("solved_mean", None)
        entries.pop("solved_damping", None)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    more(optimizer, model, range(9, 19))
    for given in (without, saved):
        other = network()
        busy, _ = trained(other, rows=True, steps=5)  # whose own s must not survive the load
        busy.load_state_dict(given)
        other.load_state_dict(weights)
        more(busy, other, range(9, 19))
        assert distance(model, other) < 1e-10


def test_nothing_of_a_graph_is_kept_after_the_step() -> None:
    model, held = network(), []

    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model[:2](x)  # type: ignore[index]
        held.append(weakref.ref(hidden))
        outputs = model[2:](hidden)  # type: ignore[index]
        return nn.functional.cross_entropy(outputs, y), outputs

    optimizer, seen = trained(model, rows=True, steps=8, loss_of=loss_of)
    assert seen[-1] == 3
    assert not optimizer._pending.rows
    gc.collect()
    assert not any(x() is not None for x in held)
