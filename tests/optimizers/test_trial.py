"""A trial leaves no trace: parameters, buffers, random state and gradients after a rejection and an acceptance."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from curvature import Identity
from curvature.protocols import Needs
from optimizers import SecondOrder
from trust_region import L2Ball, Policy, RatioRadius, TrustRegion, Verdict


@dataclass(frozen=True)
class Judge(Policy):
    """Accepts or rejects whatever comes."""

    accept: bool
    gradient: bool = False

    @property
    def needs(self) -> Needs:
        return Needs.TRIAL_LOSS | (Needs.TRIAL_GRADIENT if self.gradient else Needs.GRAD)

    def init(self, params):
        return {"radius": torch.tensor(0.1)}

    def judge(self, state, proposal, actual_reduction, trial_gradient_norm=None):
        assert (trial_gradient_norm is not None) == self.gradient
        return Verdict(torch.tensor(self.accept), actual_reduction, state["radius"])


class Noisy(nn.Module):
    """Everything that a second forward pass could disturb: batch-norm statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1.0  # replaces the buffer in place of writing into it
        return self.body(x)


def run(
    policy: Policy, steps: int = 1, direct: bool = False
) -> tuple[Noisy, SecondOrder, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model = Noisy()
    x = torch.randn(16, 5)
    optimizer = SecondOrder(
        model.parameters(),
        lr=1.0,
        curvature=Identity(),
        trust_region=TrustRegion(region=L2Ball(), radius=policy),
    )
    losses: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        losses.append(loss.detach())
        if direct:
            loss.backward()
        else:
            optimizer.backward(loss)
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer, x, losses


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_rejected_step_restores_everything_bitwise(gradient: bool, direct: bool) -> None:
    torch.manual_seed(0)
    reference = Noisy()
    x = torch.randn(16, 5)
    start = [p.detach().clone() for p in reference.parameters()]
    reference(x).square().mean().backward()
    rng = torch.get_rng_state()

    model, optimizer, _, losses = run(Judge(accept=False, gradient=gradient), direct=direct)
    assert len(losses) == 2
    assert losses[1] != losses[0]  # the trial did move
    assert torch.equal(torch.get_rng_state(), rng)
    for p, q in zip(model.parameters(), start, strict=True):
        assert torch.equal(p, q)
    for name, b in reference.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], b), name
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert not bool(optimizer.step_info.accepted)


def test_accepted_step_moves_parameters_and_counts_the_batch_once() -> None:
    model, optimizer, _, losses = run(Judge(accept=True))
    assert float(model.calls) == 1.0
    assert int(model.body[1].num_batches_tracked) == 1
    assert float(optimizer.step_info.actual_reduction) == pytest.approx(float(losses[0] - losses[1]))
    assert bool(optimizer.step_info.accepted)


def test_trial_sees_the_same_dropout_mask() -> None:
    torch.manual_seed(3)
    model = nn.Dropout(0.5)
    w = nn.Parameter(torch.ones(50))
    masks: list[Tensor] = []
    optimizer = SecondOrder([w], lr=1.0, trust_region=TrustRegion(region=L2Ball(), radius=Judge(accept=True)))

    def closure() -> Tensor:
        optimizer.zero_grad()
        out = model(w)
        masks.append(out != 0)
        loss = out.square().sum()
        optimizer.backward(loss)
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_trial_that_raises_leaves_the_parameters_where_they_were() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = SecondOrder([w], lr=1.0, trust_region=TrustRegion(region=L2Ball(), radius=RatioRadius()))
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        loss = w.square().sum()
        optimizer.backward(loss)
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(w.detach(), torch.ones(3))
    calls.clear()
    calls.extend([1, 1])
    optimizer.step(closure)
    assert float(w.detach().norm()) < 3**0.5


@pytest.mark.parametrize("direct", [False, True])
def test_a_closure_may_clip_and_log_its_gradients_in_a_trial_too(direct: bool) -> None:
    model = nn.Linear(5, 1)
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    optimizer = SecondOrder(
        model.parameters(),
        lr=1.0,
        curvature=Identity(),
        trust_region=TrustRegion(L2Ball(), radius=Judge(True)),
    )
    norms = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward() if direct else optimizer.backward(loss)
        norms.append(float(sum(p.grad.norm() for p in model.parameters())))  # type: ignore[union-attr]
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        return loss

    optimizer.step(closure)
    assert len(norms) == 2
    assert all(0.0 < float(p.grad.abs().max()) <= 1.001e-3 for p in model.parameters())  # type: ignore[union-attr]


def test_policy_that_needs_a_trial_says_so_without_a_closure() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = SecondOrder([w], lr=1.0, trust_region=TrustRegion(region=L2Ball(), radius=RatioRadius()))
    w.square().sum().backward()
    with pytest.raises(
        RuntimeError, match=r"RatioRadius judges a trial point: call optimizer.step\(closure\)"
    ):
        optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_trial_loss_that_is_not_finite_is_rejected_and_shrinks_the_radius(bad: float) -> None:
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SecondOrder([w], lr=1.0, trust_region=TrustRegion(region=L2Ball(), radius=RatioRadius()))
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        calls.append(1)
        if len(calls) == 2:
            return loss * bad
        optimizer.backward(loss)
        return loss

    optimizer.step(closure)
    assert torch.equal(w.detach(), torch.ones(3, dtype=torch.float64))
    assert float(optimizer.step_info.radius) < 1.0


@pytest.mark.parametrize("accept", [False, True])
def test_a_trial_that_draws_more_numbers_leaves_the_generator_where_the_step_found_it(accept: bool) -> None:
    """A trial that draws as many as the first evaluation ends where that one did by itself: no proof."""
    w = nn.Parameter(torch.ones(3))
    optimizer = SecondOrder(
        [w], lr=1.0, trust_region=TrustRegion(region=L2Ball(), radius=Judge(accept=accept))
    )
    calls: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        torch.rand(5 if calls else 2)
        loss = w.square().sum()
        optimizer.backward(loss)
        if not calls:
            calls.append(torch.get_rng_state())
        return loss

    torch.manual_seed(0)
    optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), calls[0])
