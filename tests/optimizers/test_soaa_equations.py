"""SOAA composed from its parts against the paper's equations, written literally in NumPy (arXiv 2410.02293)."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from curvature import EmpiricalFisherDiagonal
from optimizers import SOAA, SecondOrder
from trust_region import RmsBox, SOAARadius, TrustRegion


@dataclass
class LiteralSOAA:
    """The equations of the paper over lists of arrays; one dictionary a group."""

    groups: list[dict]  # {"params": [index], "lr", "weight_decay"}
    beta1: float = 0.9
    beta2: float = 0.999
    gamma: float = 0.1
    eps: float = 1e-8
    total_steps: int | None = None
    scope: str = "global"
    t: int = 0
    losses: int = 0
    loss_mean: float = 0.0
    m: dict = field(default_factory=dict)
    v: dict = field(default_factory=dict)
    d: dict = field(default_factory=dict)
    P: dict = field(default_factory=dict)

    def step(self, theta: list[np.ndarray], gradients: list[np.ndarray], loss: float | None) -> None:
        self.t += 1
        t = self.t
        indices = [i for group in self.groups for i in group["params"]]
        keys = {i: (i if self.scope == "tensor" else "all") for i in indices}
        m_hat, v_hat = {}, {}
        for i in indices:
            g = gradients[i]
            self.m[i] = self.beta1 * self.m.get(i, 0.0) + (1 - self.beta1) * g
            self.v[i] = self.beta2 * self.v.get(i, 0.0) + (1 - self.beta2) * g**2
            m_hat[i] = self.m[i] / (1 - self.beta1**t)
            v_hat[i] = self.v[i] / (1 - self.beta2**t)
        new_P: dict = {}
        for key in set(keys.values()):
            members = [i for i in indices if keys[i] == key]
            s = sum((m_hat[i] ** 2).sum() for i in members) / sum(
                (v_hat[i] + self.eps).sum() for i in members
            )
            d = self.d.setdefault(key, 1.0)
            self.P.setdefault(key, 0.0)
            new_P[key] = 0.0
            for group in self.groups:
                for i in set(group["params"]) & set(members):
                    F = (1 + s) * v_hat[i]
                    u = d * m_hat[i] / (np.maximum(d * F, np.sqrt(v_hat[i])) + self.eps)
                    theta[i] -= group["lr"] * group["weight_decay"] * theta[i]
                    theta[i] -= group["lr"] * u
                    new_P[key] += group["lr"] * ((m_hat[i] * u).sum() - 0.5 * (v_hat[i] * u**2).sum())
        if loss is None or not np.isfinite(loss):
            return
        self.losses += 1
        self.loss_mean = self.beta1 * self.loss_mean + (1 - self.beta1) * loss
        smoothed = self.loss_mean / (1 - self.beta1**self.losses)
        x = 1.0 if self.total_steps is None else min(1.0, (t - 1) / self.total_steps)
        for key in self.P:
            if self.P[key] != 0.0:
                rho = (smoothed - loss) / max(self.P[key], self.eps)
                self.d[key] = min(max(rho * self.d[key], (1 - self.gamma) ** x), 1 + self.gamma**x)
        self.P = new_P


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)).double()


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (16,), generator=generator),
        )
        for _ in range(steps)
    ]


def loss_with_ratio(literal: LiteralSOAA, ratio: float) -> float | None:
    """The loss for which this step's ratio times the radius is ``ratio``, between the bounds.

    Minibatch losses put nearly every ratio beyond its bounds; a test with those alone would prove little of the ratio.
    """
    t = literal.losses + 1
    if t == 1:
        return None
    correction = 1 - literal.beta1**t
    key = 3 if literal.scope == "tensor" else "all"
    lag = ratio / literal.d[key] * max(literal.P[key], literal.eps)
    return (literal.beta1 * literal.loss_mean / correction - lag) / (1 - (1 - literal.beta1) / correction)


def relative_error(model: torch.nn.Module, theta: list[np.ndarray]) -> float:
    ours = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    literal = np.concatenate([a.ravel() for a in theta])
    return float(np.linalg.norm(ours - literal) / np.linalg.norm(literal))


def run(optimizer_of, literal: LiteralSOAA, steps: int = 200, losses=None) -> tuple[float, SecondOrder]:
    model = network()
    optimizer = optimizer_of(model)
    theta = [p.detach().numpy().copy() for p in model.parameters()]
    radii = []
    for t, (x, y) in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        value = loss.item() if losses is None else losses(t, loss.item())
        if losses is None and t % 2:
            chosen = loss_with_ratio(literal, 1.0 + 0.08 * np.sin(t))
            value = loss.item() if chosen is None else chosen
        gradients = [p.grad.numpy().copy() for p in model.parameters()]
        optimizer.step(loss=value)
        literal.step(theta, gradients, value)
        radii.append(float(optimizer.step_info.radius))
    assert relative_error(model, theta) <= 1e-10
    if losses is None:
        assert len({round(r, 12) for r in radii}) > 90
    return relative_error(model, theta), optimizer


@pytest.mark.parametrize("total_steps", [None, 200, 50])
def test_soaa_equals_the_papers_equations_over_200_steps(total_steps: int | None) -> None:
    literal = LiteralSOAA(
        [{"params": [0, 1, 2, 3], "lr": 1e-2, "weight_decay": 0.0}], total_steps=total_steps
    )
    _, optimizer = run(lambda m: SOAA(m.parameters(), lr=1e-2, total_steps=total_steps), literal)
    assert float(optimizer.step_info.radius) == pytest.approx(literal.d["all"], rel=1e-9)
    assert float(optimizer.step_info.predicted_reduction) == pytest.approx(literal.P["all"], rel=1e-9)


def test_soaa_composed_by_hand_equals_the_papers_equations() -> None:
    literal = LiteralSOAA(
        [{"params": [0, 1, 2, 3], "lr": 1e-2, "weight_decay": 0.0}], total_steps=200, gamma=0.2
    )
    run(
        lambda m: SecondOrder(
            m.parameters(),
            lr=1e-2,
            curvature=EmpiricalFisherDiagonal(beta=0.999),
            trust_region=TrustRegion(region=RmsBox(), radius=SOAARadius(total_steps=200, gamma=0.2)),
            momentum=0.9,
        ),
        literal,
    )


def test_soaa_with_one_radius_a_tensor() -> None:
    literal = LiteralSOAA(
        [{"params": [0, 1, 2, 3], "lr": 1e-2, "weight_decay": 0.0}], total_steps=200, scope="tensor"
    )
    _, optimizer = run(lambda m: SOAA(m.parameters(), lr=1e-2, total_steps=200, scope="tensor"), literal)
    radii = [float(r) for r in optimizer._region_state["radius"]]
    assert radii == pytest.approx([literal.d[i] for i in range(4)], rel=1e-9)
    assert len(set(radii)) > 1


def test_soaa_with_weight_decay_and_two_groups_sums_over_both() -> None:
    literal = LiteralSOAA(
        [
            {"params": [0, 1], "lr": 1e-2, "weight_decay": 0.1},
            {"params": [2, 3], "lr": 3e-3, "weight_decay": 0.01},
        ],
        total_steps=200,
        beta1=0.8,
        beta2=0.99,
    )
    run(
        lambda m: SOAA(
            [
                {"params": list(m[0].parameters())},
                {"params": list(m[2].parameters()), "lr": 3e-3, "weight_decay": 0.01},
            ],
            lr=1e-2,
            total_steps=200,
            betas=(0.8, 0.99),
            weight_decay=0.1,
        ),
        literal,
    )


def test_fisher_branch_is_live_where_the_gradient_is_large() -> None:
    """With gradients of order 10, √v̂ > 1/(d(1+s)): the interior step is taken, and still equals the equations."""
    literal = LiteralSOAA([{"params": [0, 1, 2, 3], "lr": 1e-3, "weight_decay": 0.0}], total_steps=200)
    model = network()
    optimizer = SOAA(model.parameters(), lr=1e-3, total_steps=200)
    theta = [p.detach().numpy().copy() for p in model.parameters()]
    for x, y in batches(50):
        optimizer.zero_grad()
        loss = 50.0 * torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        gradients = [p.grad.numpy().copy() for p in model.parameters()]
        optimizer.step(loss=loss)
        literal.step(theta, gradients, loss.item())
    assert 0.2 < float(optimizer.step_info.fisher_active_fraction) < 1.0
    assert relative_error(model, theta) <= 1e-10


def test_steps_without_a_finite_loss_leave_radius_running_loss_and_prediction() -> None:
    literal = LiteralSOAA([{"params": [0, 1, 2, 3], "lr": 1e-2, "weight_decay": 0.0}], total_steps=200)
    pattern = [float("nan"), float("inf"), None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # None is one of the losses
        run(
            lambda m: SOAA(m.parameters(), lr=1e-2, total_steps=200),
            literal,
            losses=lambda t, loss: pattern[(t // 7) % 3] if t % 7 == 3 else loss,
        )


def test_step_without_any_loss_leaves_the_radius_and_warns_once() -> None:
    model = network()
    optimizer = SOAA(model.parameters(), lr=1e-2)
    x, y = batches(1)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert [w.category for w in caught] == [UserWarning]
    assert "given none" in str(caught[0].message)
    assert float(optimizer.step_info.radius) == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(value: float) -> None:
    model = network()
    optimizer = SOAA(model.parameters(), lr=1e-2, total_steps=10)
    for x, y in batches(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.backward(loss)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    theta = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.backward(torch.nn.functional.cross_entropy(model(x), y))
    model[0].weight.grad[0, 0] = value
    optimizer.step()
    after = optimizer.state_dict()["state"]
    assert float(optimizer.step_info.skipped_steps) == 1.0
    assert not bool(optimizer.step_info.accepted)
    assert all(torch.equal(a, b) for a, b in zip(theta, model.parameters(), strict=True))
    for i, entries in before.items():
        for name, x0 in entries.items():
            if name != "skipped_steps":
                assert torch.equal(x0, after[i][name]), (i, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be >= 0, got nan"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\), got -0.1"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 0.25\], got 0.0"),
        ({"gamma": 0.3}, r"gamma must be in \(0, 0.25\], got 0.3"),
        ({"total_steps": 0}, "total_steps must be >= 1 or None, got 0"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
        ({"scope": "layer"}, "scope must be 'global' or 'tensor', got 'layer'"),
    ],
)
def test_bad_arguments_are_refused_when_built(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOAA(network().parameters(), **arguments)
