"""Tadam composed from its parts against its equations, written literally in NumPy (Yang, Cho & Lee 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from optimizers import Tadam


@dataclass
class LiteralTadam:
    """The equations over one flat vector."""

    lr: float
    total_steps: int | None
    beta1: float = 0.9
    beta2: float = 0.999
    gamma: float = 0.25
    eps: float = 1e-8
    t: int = 0
    losses: int = 0
    loss_mean: float = 0.0
    d: float = 1.0
    P: float = 0.0
    levels: dict = field(default_factory=lambda: {"shrink": 0, "keep": 0, "grow": 0})

    def __post_init__(self) -> None:
        self.m = 0.0
        self.v = self.eps
        self.s = 0.0

    def step(self, theta: np.ndarray, g: np.ndarray, loss: float | None) -> None:
        self.t += 1
        t, b1, b2 = self.t, self.beta1, self.beta2
        m_before = self.m / (1 - b1 ** (t - 1)) if t > 1 else 0.0
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * (g - m_before) ** 2 * (b2 - b2**t) / (1 - b2**t)
        self.s = b2 * self.s + (1 - b2) * g**2
        m_hat, v_hat, s_hat = self.m / (1 - b1**t), self.v / (1 - b2**t), self.s / (1 - b2**t)
        x = 1.0 if self.total_steps is None else min(1.0, (t - 1) / self.total_steps)
        low, high = (1 - self.gamma) ** x, 1 + self.gamma**x
        known = loss is not None and np.isfinite(loss)
        if known:
            if t > 1:
                rho = (self.loss_mean / (1 - b1**self.losses) - loss) / max(self.P, self.eps)
                level = "shrink" if rho < self.gamma else "grow" if rho > 1 - self.gamma else "keep"
                self.levels[level] += 1
                self.d = min(max(self.d * {"shrink": low, "keep": 1.0, "grow": high}[level], low), high)
            self.loss_mean = b1 * self.loss_mean + (1 - b1) * loss
            self.losses += 1
        F = (1 + (m_hat**2 / (v_hat + self.eps)).sum()) * v_hat
        u = self.d * m_hat / (np.maximum(self.d * F, np.sqrt(s_hat)) + self.eps)
        theta -= self.lr * u
        a = (m_hat * u).sum()
        if known:
            self.P = self.lr * (a - 0.5 * (a**2 + (v_hat * u**2).sum()))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)).double()


def run(total_steps: int | None, scale: float, losses=lambda t, loss: loss) -> tuple[Tadam, LiteralTadam]:
    model, steps = network(), 200
    optimizer = Tadam(model.parameters(), lr=1e-2, total_steps=total_steps)
    literal = LiteralTadam(lr=1e-2, total_steps=total_steps)
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()
    generator = torch.Generator().manual_seed(1)
    for t in range(steps):
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        loss = scale * torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        g = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy().copy()
        value = losses(t, loss.item())
        # every third loss is one whose ratio lies between γ and 1-γ, which minibatch noise seldom gives
        if t % 3 == 2 and value is not None and literal.losses:
            smoothed = literal.loss_mean / (1 - literal.beta1**literal.losses)
            value = smoothed - 0.5 * max(literal.P, literal.eps)
        optimizer.step(loss=value)
        literal.step(theta, g, value)
    ours = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    assert np.linalg.norm(ours - theta) <= 1e-10 * np.linalg.norm(theta)
    assert float(optimizer.step_info.radius) == pytest.approx(literal.d, rel=1e-10)
    assert float(optimizer.step_info.predicted_reduction) == pytest.approx(literal.P, rel=1e-8, abs=1e-14)
    return optimizer, literal


@pytest.mark.parametrize("total_steps", [None, 200, 50])
def test_tadam_equals_its_equations_over_200_steps(total_steps: int | None) -> None:
    _, literal = run(total_steps, scale=1.0)
    assert min(literal.levels.values()) > 20  # every level is met


def test_tadam_equals_its_equations_where_the_fisher_branch_is_live() -> None:
    optimizer, _ = run(200, scale=200.0)
    assert float(optimizer.step_info.fisher_active_fraction) > 0.05


def test_steps_without_a_finite_loss_leave_radius_running_loss_and_prediction() -> None:
    run(200, scale=1.0, losses=lambda t, loss: float("nan") if t % 5 == 3 else loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, 0.0)}, r"betas\[1\] must be in \(0, 1\), got 0.0"),
        ({"gamma": 0.5}, r"gamma must be in \(0, 0.5\), got 0.5"),
        ({"total_steps": 0}, "total_steps must be >= 1 or None, got 0"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
    ],
)
def test_bad_arguments_are_refused_when_built(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tadam(network().parameters(), **arguments)
