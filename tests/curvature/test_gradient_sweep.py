"""One backward pass hands over what ``torch.autograd.grad`` gives for the same edges, one after the other."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from curvature.gradient_sweep import Sweep
from curvature.layer_io import Recorder


class Branching(nn.Module):
    """A layer called twice, a branch that ends in a layer of its own, an activation in place, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.side = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(3, 4)
        self.unused = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        h = nn.functional.relu(self.first(x), inplace=True)
        return self.twice(torch.tanh(self.twice(h))) * self.side(x)


def prepared() -> tuple[Tensor, Tensor, list[torch.autograd.graph.GradientEdge], Sweep]:
    torch.manual_seed(0)
    model = Branching().double()
    recorder = Recorder(model, ["first", "twice", "side", "unused"])
    y = model(torch.randn(5, 3, dtype=torch.float64))
    trace = recorder.trace(y)
    edges = [call.edge for calls in trace.calls.values() for call in calls]
    assert len(edges) == 4
    return y, torch.randn_like(y), edges, Sweep(edges, trace.readers)


def test_every_gradient_is_that_of_autograd() -> None:
    y, seed, edges, sweep = prepared()
    for _ in range(2):  # the graph is kept
        found: dict[int, Tensor] = {}
        sweep.run(y, seed, lambda k, g, found=found: found.__setitem__(k, g))  # type: ignore[misc]
        expected = torch.autograd.grad(y, edges, seed, retain_graph=True)
        assert sorted(found) == list(range(4))
        for k, g in enumerate(expected):
            assert torch.equal(found[k], g)


def test_an_edge_that_the_gradient_does_not_reach_is_left_out() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    recorder = Recorder(model, ["0", "1"])
    x = torch.ones(1, 2)
    a, b = model[0](x), model[1](x)
    trace = recorder.trace((a + b).sum())
    sweep = Sweep([trace.calls[name][0].edge for name in "01"], trace.readers)
    seen: list[int] = []
    sweep.run(b, torch.ones_like(b), lambda k, _: seen.append(k))
    assert seen == [1]


def test_a_gradient_on_the_way_is_gone_when_the_next_comes() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    recorder = Recorder(model, [str(k) for k in range(5)])
    y = model(torch.ones(2, 4))
    trace = recorder.trace(y)
    sweep = Sweep([trace.calls[str(k)][0].edge for k in range(5)], trace.readers)
    held: list[weakref.ref[Tensor]] = []
    living: list[int] = []

    def take(k: int, g: Tensor) -> None:
        living.append(sum(ref() is not None for ref in held))
        held.append(weakref.ref(g))

    sweep.run(y, torch.ones_like(y), take)
    assert len(held) == 5
    assert max(living) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left(fails: bool) -> None:
    y, seed, _, sweep = prepared()
    calls: list[int] = []

    def take(k: int, g: Tensor) -> None:
        calls.append(k)
        if fails:
            raise ValueError("no")

    if fails:
        with pytest.raises(ValueError, match="no"):
            sweep.run(y, seed, take)
    else:
        sweep.run(y, seed, take)
    before = len(calls)
    y.backward(seed)
    assert len(calls) == before
