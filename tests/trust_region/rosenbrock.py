"""The Rosenbrock function and a driver through propose and judge, for every test of a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvature import Needs
from trust_region import StepContext, TrustRegion
from trust_region.testing import MatrixOperator

Function = Callable[[Tensor], Tensor]


def rosenbrock(x: Tensor) -> Tensor:
    return (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def gradient(f: Function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def hessian(f: Function, x: Tensor) -> Tensor:
    """By double backward, all rows at once."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    if not g.requires_grad:
        return torch.zeros(x.numel(), x.numel(), dtype=x.dtype)
    unit = torch.eye(x.numel(), dtype=x.dtype)
    (H,) = torch.autograd.grad(g, x, unit, is_grads_batched=True)
    return 0.5 * (H + H.T).detach()


@dataclass
class Run:
    x: Tensor
    iterates: list[Tensor] = field(default_factory=list)
    radii: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_norm: float = float("inf")
    functions: int = 1
    gradients: int = 1
    hessians: int = 0


def minimise(
    trust: TrustRegion,
    f: Function,
    x0: Tensor,
    gtol: float = 1e-8,
    max_steps: int = 500,
    spoil: Callable[[int, Tensor], Tensor] | None = None,
) -> Run:
    """Accept and reject until ‖g‖ < gtol. ``spoil(step, trial_loss)`` may replace a trial's loss."""
    x, state = x0.clone(), trust.init([x0])
    run = Run(x)
    loss, g = f(x).detach(), gradient(f, x)
    H: Tensor | None = None
    for k in range(max_steps):
        run.gradient_norm = float(g.norm())
        if run.gradient_norm < gtol:
            break
        if H is None:
            H = hessian(f, x)
            run.hessians += 1
        with torch.no_grad():
            proposal = trust.propose(state, [g], MatrixOperator(H, [x]), StepContext(loss=loss))
            trial = x + proposal.step[0]
            trial_loss = f(trial)
        run.functions += 1
        if spoil is not None:
            trial_loss = spoil(k, trial_loss)
        trial_g = gradient(f, trial) if trust.needs & Needs.TRIAL_GRADIENT else None
        if trial_g is not None:
            run.gradients += 1
        verdict = trust.judge(
            state, proposal, loss - trial_loss, trial_g.norm() if trial_g is not None else None
        )
        if bool(verdict.accepted):
            x, loss, H = trial, trial_loss, None
            if trial_g is None:
                run.gradients += 1
            g = trial_g if trial_g is not None else gradient(f, x)
        run.iterates.append(x.clone())
        run.radii.append(float(verdict.radius))
        run.accepted.append(bool(verdict.accepted))
        run.losses.append(float(loss))
    run.x, run.gradient_norm = x, float(g.norm())
    return run
