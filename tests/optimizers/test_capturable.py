"""Steps that a CUDA graph may record: replayed on a CPU as the stream of operations that a graph would hold.

Replays are compared bit for bit with steps that Python takes; the steps of other ways with 1e-10.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimizers
from curvature import EmpiricalFisherDiagonal, RootDiagonal
from optimizers import LAMB, LARS, SOAA, Adam, AdamW, Muon, SecondOrder, Tadam
from tests.optimizers.recorded_stream import NotCapturableError, kept, recorded
from trust_region import Box, CauchyPoint, FixedRadius, KLBall, L2Ball, TrustRegion

STEPS = 20

Make = Callable[[nn.Module, bool], SecondOrder]


def rate(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def composed(m: nn.Module, c: bool, curvature: Any, region: TrustRegion) -> SecondOrder:
    return SecondOrder(
        m.parameters(), lr=rate(1e-2), curvature=curvature, trust_region=region, momentum=0.9, capturable=c
    )


MAKES: dict[str, Make] = {
    "SOAA": lambda m, c: SOAA(m.parameters(), lr=rate(1e-2), total_steps=15, weight_decay=0.1, capturable=c),
    "SOAA, scale of the step before": lambda m, c: SOAA(
        m.parameters(), lr=rate(1e-2), fisher_scale="lagged", capturable=c
    ),
    "SOAA, a radius a tensor": lambda m, c: SOAA(m.parameters(), lr=rate(1e-2), scope="tensor", capturable=c),
    "Adam": lambda m, c: Adam(m.parameters(), lr=rate(1e-2), capturable=c),
    "AdamW": lambda m, c: AdamW(m.parameters(), lr=rate(1e-2), capturable=c),
    "Tadam": lambda m, c: Tadam(m.parameters(), lr=rate(1e-2), total_steps=100, capturable=c),
    "LAMB, two groups": lambda m, c: LAMB(
        [{"params": m[0].parameters(), "lr": rate(3e-3)}, {"params": m[2].parameters(), "weight_decay": 0.0}],
        lr=rate(1e-2),
        weight_decay=0.1,
        capturable=c,
    ),
    "LARS": lambda m, c: LARS(m.parameters(), lr=rate(1e-1), nesterov=True, capturable=c),
    "Muon": lambda m, c: Muon(m.parameters(), lr=rate(1e-2), ns_dtype=None, capturable=c),
    "box": lambda m, c: composed(
        m,
        c,
        RootDiagonal(EmpiricalFisherDiagonal(beta=0.99)),
        TrustRegion(region=Box(), radius=FixedRadius(1.0, damping=1e-8)),
    ),
    "Cauchy point": lambda m, c: composed(
        m,
        c,
        EmpiricalFisherDiagonal(),
        TrustRegion(region=L2Ball(), subproblem=CauchyPoint(), radius=FixedRadius(0.1)),
    ),
    "KL ball": lambda m, c: composed(
        m, c, EmpiricalFisherDiagonal(), TrustRegion(region=KLBall(), radius=FixedRadius(0.1, damping=1e-3))
    ),
}


class Training:
    """A small model, its data at one address, and whole training steps of it."""

    def __init__(self, make: Make, capturable: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.optimizer = make(self.model, capturable)
        self.x, self.y = torch.zeros(8, 6, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)

    def feed(self, t: int) -> None:
        """Step t's batch and learning rate, written in place; the gradient of batch 7 is not finite."""
        g = torch.Generator().manual_seed(100 + t)
        self.x.copy_(torch.randn(8, 6, generator=g, dtype=torch.float64))
        if t == 7:
            self.x[0, 0] = float("inf")
        self.y.copy_(torch.randint(0, 3, (8,), generator=g))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(0.95)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.optimizer.backward(nn.functional.cross_entropy(self.model(self.x), self.y))
        self.optimizer.step()

    def known(self) -> list[Tensor]:
        return [self.x, self.y, *kept(self.optimizer)]

    def numbers(self) -> list[Tensor]:
        info = self.optimizer.step_info
        told = [
            getattr(info, name) for name in ("loss", "ratio", "radius", "predicted_reduction", "step_norm")
        ]
        return [x.detach().clone() for x in (*kept(self.optimizer), *told)]


@pytest.mark.parametrize("name", MAKES)
def test_a_replay_takes_the_steps_that_python_takes(name: str) -> None:
    by_python, by_replay = Training(MAKES[name], True), Training(MAKES[name], True)
    for t in range(3):
        for training in (by_python, by_replay):
            training.feed(t)
            training.step()
    by_python.feed(3), by_replay.feed(3)
    by_python.step()
    stream = recorded(by_replay.step, by_replay.known())
    for t in range(4, 4 + STEPS):
        by_python.feed(t), by_replay.feed(t)
        by_python.step()
        stream.replay()
        for a, b in zip(by_replay.numbers(), by_python.numbers(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert float(by_replay.optimizer.step_info.skipped_steps) == 1.0
    assert all(bool(p.isfinite().all()) for p in by_replay.model.parameters())


@pytest.mark.parametrize("name", MAKES)
def test_steps_hold_their_addresses_and_send_the_same_numbers(name: str) -> None:
    training = Training(MAKES[name], True)
    training.feed(0)
    training.step()
    addresses = [x.data_ptr() for x in training.known()]
    streams = []
    for t in (1, 2):
        training.feed(t)
        streams.append(recorded(training.step, training.known()).signature())
        assert [x.data_ptr() for x in training.known()] == addresses
    assert streams[0] == streams[1]


@pytest.mark.parametrize("name", MAKES)
def test_its_numbers_are_those_of_other_steps(name: str) -> None:
    capturable, plain = Training(MAKES[name], True), Training(MAKES[name], False)
    for t in range(STEPS):
        for training in (capturable, plain):
            training.feed(t)
            training.step()
    for p, q in zip(capturable.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    for p, q in zip(capturable.model.parameters(), plain.model.parameters(), strict=True):
        for key, x in capturable.optimizer.state[p].items():
            torch.testing.assert_close(
                x, plain.optimizer.state[q][key], rtol=1e-10, atol=1e-12, equal_nan=True
            )


def test_the_recorder_sees_steps_that_are_not_for_a_graph() -> None:
    """The same optimizers without the flag, and a number of the host that changes from step to step."""
    for make in (MAKES["SOAA"], MAKES["Tadam"], MAKES["Muon"]):
        training = Training(make, False)
        training.feed(0)
        training.step()
        with pytest.raises(NotCapturableError):
            recorded(training.step, training.known())
    training = Training(lambda m, c: AdamW(m.parameters(), lr=1e-2, capturable=True), True)
    training.feed(0)
    training.step()
    recorded(training.step, training.known())
    training.optimizer.param_groups[0]["lr"] = 2e-2
    with pytest.raises(NotCapturableError, match="sends"):
        recorded(training.step, training.known())


def test_a_number_that_the_host_changes_between_steps_is_taken() -> None:
    found = []
    for capturable in (True, False):
        training = Training(
            lambda m, c: AdamW(m.parameters(), lr=1e-2, weight_decay=0.1, capturable=c), capturable
        )
        for t in range(4):
            training.feed(t)
            training.step()
            training.optimizer.param_groups[0]["lr"] *= 0.5
        found.append([p.detach() for p in training.model.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_copies_and_checkpoints_keep_on() -> None:
    training = Training(MAKES["SOAA"], True)
    training.feed(0)
    training.step()
    other = copy.deepcopy(training.optimizer)
    assert other.capturable
    fresh = Training(MAKES["SOAA"], True)
    fresh.model.load_state_dict(training.model.state_dict())
    fresh.optimizer.load_state_dict(training.optimizer.state_dict())
    for one in (training, fresh):
        for t in (1, 2):
            one.feed(t)
            one.step()
    for p, q in zip(training.model.parameters(), fresh.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "name", ["SophiaH", "AdaHessian", "Shampoo", "SOAP", "TrustRegionNewton", "ARC", "LBFGSTrustRegion"]
)
def test_what_the_host_takes_part_in_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"capturable=True is not supported: .*capture the forward"):
        getattr(optimizers, name)([nn.Parameter(torch.ones(2, 2))], capturable=True)


def test_kfac_is_refused() -> None:
    with pytest.raises(ValueError, match=r"capturable=True is not supported: .*capture the forward"):
        optimizers.KFAC(nn.Linear(2, 2), capturable=True)


def test_a_step_without_some_gradient_is_refused_and_without_any_is_none() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SOAA([p, q], capturable=True)
    optimizer.step(loss=torch.tensor(1.0))
    assert torch.equal(p.detach(), torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="every parameter has a dense gradient"):
        optimizer.step(loss=torch.tensor(1.0))


@pytest.mark.parametrize("value", ["yes", 2])
def test_the_flag_is_a_bool(value: Any) -> None:
    with pytest.raises(ValueError, match="capturable must be a bool or None"):
        SOAA([nn.Parameter(torch.ones(2))], capturable=value)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")


@cuda
@pytest.mark.parametrize("compiles", [False, "auto"])
@pytest.mark.parametrize("name", MAKES)
def test_a_cuda_graph_takes_the_steps_that_python_takes(name: str, compiles: Any) -> None:
    """Forward, backward and step of 20 batches, with the learning rate changed in place between replays."""

    def training() -> Training:
        found = Training(MAKES[name], False)
        found.model.cuda()
        for group in MAKES[name](found.model, True).param_groups:
            assert isinstance(group["lr"], Tensor)
        found.optimizer = MAKES[name](found.model, True)
        for group in found.optimizer.param_groups:
            group["lr"] = group["lr"].cuda()
        found.optimizer._paths.compiles = compiles
        found.x, found.y = found.x.cuda(), found.y.cuda()
        return found

    by_python, by_graph = training(), training()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for t in range(3):
            for one in (by_python, by_graph):
                one.feed(t)
                one.step()
    torch.cuda.current_stream().wait_stream(side)
    by_graph.optimizer.zero_grad()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        by_graph.step()
    for t in range(3, 3 + STEPS):
        by_python.feed(t), by_graph.feed(t)
        by_python.step()
        captured.replay()
    for p, q in zip(by_graph.model.parameters(), by_python.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@cuda
def test_a_capture_without_the_flag_is_refused() -> None:
    p = nn.Parameter(torch.ones(4, device="cuda"))
    optimizer = SOAA([p])
    p.grad = torch.ones_like(p)
    optimizer.step(loss=torch.ones((), device="cuda"))
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step(loss=torch.ones((), device="cuda"))
