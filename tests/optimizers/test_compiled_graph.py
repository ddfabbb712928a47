"""The compiled step of every composition whose signals are gradients: one graph, never compiled twice, equal numbers.

Ordinary runs stop after tracing and functionalisation (``aot_eager``), which is all that this project's code takes part
in; with ``-m slow`` every case goes through the compiler itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import optimizers
from curvature import EmpiricalFisherDiagonal, RootDiagonal
from optimizers import LAMB, LARS, SOAA, AdamWReplay, Muon, SecondOrder, Tadam
from optimizers.compiled import graph_path
from trust_region import Box, CauchyPoint, FixedRadius, KLBall, L2Ball, SteihaugCG, TrustRegion

Make = Callable[[nn.Module, bool], SecondOrder]
STEPS = 200


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def composed(model: nn.Module, compiles: bool, curvature: Any, trust_region: TrustRegion) -> SecondOrder:
    return SecondOrder(
        model.parameters(),
        lr=1e-2,
        curvature=curvature,
        trust_region=trust_region,
        momentum=0.9,
        compile=compiles,
    )


MAKES: dict[str, Make] = {
    "Tadam": lambda m, c: Tadam(m.parameters(), lr=1e-2, total_steps=100, compile=c),
    "LAMB, two groups": lambda m, c: LAMB(
        [{"params": m[0].parameters(), "lr": 3e-3, "weight_decay": 0.0}, {"params": m[2].parameters()}],
        lr=1e-2,
        weight_decay=0.1,
        compile=c,
    ),
    "LARS, nesterov": lambda m, c: LARS(m.parameters(), lr=1e-1, nesterov=True, compile=c),
    "Muon": lambda m, c: Muon(m.parameters(), lr=1e-2, ns_dtype=None, compile=c),
    "SOAA, a radius a tensor": lambda m, c: SOAA(
        m.parameters(), lr=1e-2, scope="tensor", total_steps=100, compile=c
    ),
    "SOAA without momentum": lambda m, c: SOAA(m.parameters(), lr=1e-2, betas=(0.0, 0.99), compile=c),
    "AdamW, replayed": lambda m, c: AdamWReplay(m.parameters(), lr=1e-2, radii=[1.0, 1.1, 0.9], compile=c),
    "Adagrad-like box, one group climbs": lambda m, c: SecondOrder(
        [{"params": m[0].parameters()}, {"params": m[2].parameters(), "maximize": True}],
        lr=1e-3,
        curvature=RootDiagonal(EmpiricalFisherDiagonal(beta=0.99)),
        trust_region=TrustRegion(region=Box(), radius=FixedRadius(1.0, damping=1e-8)),
        momentum=0.9,
        compile=c,
    ),
    "Cauchy point": lambda m, c: composed(
        m,
        c,
        EmpiricalFisherDiagonal(),
        TrustRegion(region=L2Ball(), subproblem=CauchyPoint(), radius=FixedRadius(0.1)),
    ),
    "KL ball": lambda m, c: composed(
        m,
        c,
        EmpiricalFisherDiagonal(),
        TrustRegion(region=KLBall(), radius=FixedRadius(0.1, damping=1e-3)),
    ),
    "Shampoo": lambda m, c: optimizers.Shampoo(m.parameters(), lr=1e-2, interval=20, compile=c),
    "SOAP": lambda m, c: optimizers.SOAP(m.parameters(), lr=1e-2, interval=20, compile=c),
}


def train(
    model: nn.Module, optimizer: SecondOrder, steps: int, spoilt: tuple[int, ...] = ()
) -> list[dict[str, float]]:
    """Steps under OneCycle, which moves lr and momentum; in ``spoilt`` ones a gradient is not finite."""
    cycles = optimizer.param_groups[0]["momentum"] > 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[g["lr"] for g in optimizer.param_groups],
        total_steps=steps + 1,
        base_momentum=0.85,
        max_momentum=0.95,
        cycle_momentum=cycles,
    )
    records = []
    for t in range(steps):
        g = torch.Generator().manual_seed(t)
        x = torch.randn(8, 6, generator=g, dtype=torch.float64)
        y = torch.randn(8, 3, generator=g, dtype=torch.float64)
        optimizer.zero_grad()
        optimizer.backward((model(x) - y).square().mean())
        if t in spoilt:
            next(model.parameters()).grad[0, 0] = float("inf")
        optimizer.step()
        schedule.step()
        records.append(optimizer.step_info.as_floats() if t < 20 or t == steps - 1 else {})
    return records


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def state_differs(a: SecondOrder, b: SecondOrder) -> float:
    """The largest relative difference between two states."""
    worst = 0.0
    for (_, x), (_, y) in zip(a.state_dict()["state"].items(), b.state_dict()["state"].items(), strict=True):
        assert x.keys() == y.keys()
        for name, value in x.items():
            if isinstance(value, Tensor):
                if not value.numel():
                    continue
                scale = value.abs().max().clamp(min=1e-30)
                difference = (
                    (value - y[name]).abs().max() / scale
                ).nan_to_num()  # a ratio that is not known yet
                worst = max(worst, float(difference))
            else:
                assert value == y[name]
    return worst


def check(name: str, steps: int) -> None:
    models = [network(), network()]
    made = [MAKES[name](m, c) for m, c in zip(models, (False, True), strict=True)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.utils.counters["graph_break"].clear()
    records = [train(m, o, steps, spoilt=(5, 31)) for m, o in zip(models, made, strict=True)]
    assert made[0]._paths._graph is None
    assert made[1]._paths._graph is not None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-11, atol=1e-13)
    assert state_differs(*made) < 1e-11
    for plain, fast in zip(*records, strict=True):
        assert plain == pytest.approx(fast, rel=1e-10, nan_ok=True)
    assert records[1][5]["accepted"] == 0.0
    assert records[1][-1]["skipped_steps"] == 2.0


FEW = ["Tadam", "LAMB, two groups", "Muon", "SOAP"]


@pytest.mark.parametrize("name", FEW)
def test_equals_the_general_step_by_one_graph_under_one_cycle(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_path, "BACKEND", "aot_eager")
    check(name, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKES)
def test_so_does_the_compiler_itself_for_every_composition(name: str) -> None:
    check(name, STEPS)


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def outside(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` out of a mode's sight, under which nothing is compiled; a graph without breaks has no read within."""

    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return step(*args)

    return call


def stepped(optimizer: SecondOrder, model: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
    optimizer.step(loss=torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("name", ["Tadam", "SOAP"])
def test_an_ordinary_step_reads_nothing_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_path, "BACKEND", "eager")
    model = network()
    optimizer = MAKES[name](model, True)
    for t in range(4):
        stepped(optimizer, model, t)
    path = optimizer._paths._graph
    assert path is not None
    path._step = outside(path._step)
    with HostReads() as reads:
        stepped(optimizer, model, 4)
    assert reads.count == 0
    with HostReads() as reads:
        float(optimizer.step_info.radius)
    assert reads.count >= 1  # the counter counts


def test_a_missing_gradient_goes_the_general_way_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_path, "BACKEND", "aot_eager")
    models = [network(), network()]
    made = [MAKES["Tadam"](m, c) for m, c in zip(models, (False, True), strict=True)]
    for m, o in zip(models, made, strict=True):
        for t in range(8):
            g = torch.Generator().manual_seed(t)
            o.zero_grad()
            o.backward(m(torch.randn(8, 6, generator=g, dtype=torch.float64)).square().mean())
            if t in (3, 4):
                m[0].bias.grad = None
            o.step()
    torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-11, atol=1e-13)
    assert state_differs(*made) < 1e-11


def test_goes_on_bit_for_bit_from_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_path, "BACKEND", "aot_eager")
    model = network()
    optimizer = MAKES["SOAP"](model, True)
    for t in range(4):
        stepped(optimizer, model, t)
    other = copy.deepcopy(model)
    again = MAKES["SOAP"](other, True)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(4, 8):
        stepped(optimizer, model, t)
        stepped(again, other, t)
    assert torch.equal(vector(model), vector(other))
    assert state_differs(optimizer, again) == 0.0


def test_the_graph_is_not_touched_by_schedules_of_the_weight_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_path, "BACKEND", "eager")
    models = [network(), network()]
    made = [
        LAMB(m.parameters(), weight_decay=0.1, compile=c) for m, c in zip(models, (False, True), strict=True)
    ]
    for m, o in zip(models, made, strict=True):
        stepped(o, m, 0)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for t in range(1, 12):
            o.param_groups[0]["weight_decay"] = 0.1 / t
            stepped(o, m, t)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda p: optimizers.AdaHessian(p, hessian_power=0.5, compile=True),
            "AdaHessianDiagonal needs the loss's graph",
        ),
        (
            lambda p: SecondOrder(
                p,
                trust_region=TrustRegion(region=L2Ball(), subproblem=SteihaugCG()),
                compile=True,
            ),
            "SteihaugCG decides on the host",
        ),
        (lambda p: optimizers.CAT(p, compile=True), "loss's graph|judges a trial"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make(network().parameters())
