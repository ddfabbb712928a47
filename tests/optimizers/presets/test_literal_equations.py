"""Presets against their papers written literally in NumPy, on a problem whose derivatives are closed forms.

The problem is softmax regression: with X = [x; 1], p the probabilities and Y one-hot, the gradient over W' = [W, b] is
(p - Y)ᵀX/N and the Hessian Σ_n (diag p_n - p_n p_nᵀ) ⊗ X_n X_nᵀ / N. No derivative is taken by autograd on that side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import optimizers
from curvature import Hessian
from curvature.probes import probe
from optimizers import SOAA, SecondOrder
from tests.trust_region.rosenbrock import rosenbrock
from trust_region import CAT, AdaptiveCubic, CubicModel, Krylov, L2Ball, TrustRegion, Unbounded

INPUTS, CLASSES, SAMPLES = 5, 3, 16
Array = np.ndarray


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            2.0 * torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (SAMPLES,), generator=generator),
        )
        for _ in range(steps)
    ]


def network() -> torch.nn.Linear:
    model = torch.nn.Linear(INPUTS, CLASSES).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


@dataclass
class Softmax:
    """Loss, gradient and Hessian products of one batch, by the closed forms above."""

    X: Array
    Y: Array

    def probabilities(self, W: Array, b: Array) -> Array:
        z = self.X @ W.T + b
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def loss(self, theta: list[Array]) -> float:
        return -float(np.log((self.probabilities(*theta) * self.Y).sum(axis=1)).mean())

    def gradient(self, theta: list[Array]) -> list[Array]:
        r = (self.probabilities(*theta) - self.Y) / len(self.X)
        return [r.T @ self.X, r.sum(axis=0)]

    def product(self, theta: list[Array], v: list[Array]) -> list[Array]:
        p = self.probabilities(*theta)
        z = self.X @ v[0].T + v[1]
        r = (p * z - p * (p * z).sum(axis=1, keepdims=True)) / len(self.X)
        return [r.T @ self.X, r.sum(axis=0)]


Step = Callable[[int, list[Array], list[Array], Softmax], None]


def follow(
    optimizer_of: Callable[[Any], SecondOrder], step: Step, steps: int = 60, graph: bool = True
) -> SecondOrder:
    """Both from the same start over the same batches, compared after every step."""
    model = network()
    optimizer = optimizer_of(model.parameters())
    theta = [p.detach().numpy().copy() for p in model.parameters()]
    start = [p.copy() for p in theta]
    for t, (x, y) in enumerate(batches(steps), start=1):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.backward(loss)
        optimizer.step()
        batch = Softmax(x.numpy(), np.eye(CLASSES)[y.numpy()])
        step(t, theta, batch.gradient(theta), batch)
        for p, q in zip(model.parameters(), theta, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), q, rtol=1e-9, atol=1e-12, err_msg=f"step {t}")
    assert max(np.abs(a - b).max() for a, b in zip(theta, start, strict=True)) > 1e-2
    return optimizer


def test_the_closed_forms_are_the_derivatives() -> None:
    """The premise, by differences."""
    x, y = batches(1)[0]
    batch = Softmax(x.numpy(), np.eye(CLASSES)[y.numpy()])
    theta = [p.detach().numpy().copy() for p in network().parameters()]
    rng = np.random.default_rng(0)
    v = [rng.standard_normal(p.shape) for p in theta]
    h = 1e-5
    plus, minus = ([p + s * h * d for p, d in zip(theta, v, strict=True)] for s in (1, -1))
    slope = sum((g * d).sum() for g, d in zip(batch.gradient(theta), v, strict=True))
    assert slope == pytest.approx((batch.loss(plus) - batch.loss(minus)) / (2 * h), rel=1e-8)
    for a, b, c in zip(batch.product(theta, v), batch.gradient(plus), batch.gradient(minus), strict=True):
        np.testing.assert_allclose(a, (b - c) / (2 * h), rtol=1e-6, atol=1e-9)


def probes_of(theta: list[Array], seed: int, index: int, distribution: Any) -> list[Array]:
    """The random signs or normals that the estimator draws: they are given, all else is the paper's."""
    return [z.numpy() for z in probe([torch.from_numpy(p) for p in theta], seed, index, distribution)]


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("interval", [1, 3])
def test_adahessian_equals_algorithm_1(power: float, interval: int) -> None:
    """Yao et al. 2021, equations (8), (11), (12): θ ← θ - η m̂ / (v̂^(k/2) + ε), D = z ⊙ Hz, v̂ counting refreshes."""
    lr, b1, b2, eps, decay, seed = 0.1, 0.9, 0.99, 1e-4, 0.02, 7
    m: list[Any] = [0.0, 0.0]
    v: list[Any] = [0.0, 0.0]
    count = 0

    def step(t: int, theta: list[Array], g: list[Array], batch: Softmax) -> None:
        nonlocal count
        if (t - 1) % interval == 0:
            count += 1
            z = probes_of(theta, seed, t - 1, "rademacher")
            D = [a * b for a, b in zip(z, batch.product(theta, z), strict=True)]
            for i in range(2):
                v[i] = b2 * v[i] + (1 - b2) * D[i] ** 2
        for i in range(2):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            m_hat, v_hat = m[i] / (1 - b1**t), v[i] / (1 - b2**count)
            theta[i] *= 1 - lr * decay
            theta[i] -= lr * m_hat / (np.sqrt(v_hat) ** power + eps)

    follow(
        lambda p: optimizers.AdaHessian(p, lr, (b1, b2), eps, power, decay, interval=interval, seed=seed),
        step,
    )


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_sophia_h_equals_algorithm_3_with_hutchinsons_estimator(distribution: Any) -> None:
    """Liu et al. 2023, equation (6) and algorithms 1, 3: θ ← θ - ηλθ - η clip(m / max(γh, ε), ρ)."""
    lr, b1, b2, gamma, rho, eps, decay, interval = 0.05, 0.9, 0.8, 0.6, 0.8, 1e-8, 0.05, 4
    m: list[Any] = [0.0, 0.0]
    h: list[Any] = [0.0, 0.0]
    clipped = []

    def step(t: int, theta: list[Array], g: list[Array], batch: Softmax) -> None:
        if (t - 1) % interval == 0:
            z = probes_of(theta, 0, t - 1, distribution)
            Hz = batch.product(theta, z)
            for i in range(2):
                h[i] = b2 * h[i] + (1 - b2) * z[i] * Hz[i]
        for i in range(2):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            ratio = m[i] / np.maximum(gamma * h[i], eps)
            clipped.append(float((np.abs(ratio) > rho).mean()))
            theta[i] -= lr * decay * theta[i]
            theta[i] -= lr * np.clip(ratio, -rho, rho)

    follow(
        lambda p: optimizers.SophiaH(
            p, lr, (b1, b2), gamma, rho, eps, decay, interval=interval, distribution=distribution
        ),
        step,
    )
    assert 0.05 < np.mean(clipped) < 0.95  # both branches are met


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_lars_equals_its_equations(momentum: float, nesterov: bool) -> None:
    """You, Gitman & Ginsburg 2017, equation (6): λ_i = c ‖θ_i‖/‖m_i‖; momentum and decay as the preset has them."""
    lr, c, decay = 0.8, 0.05, 0.01
    m: list[Any] = [0.0, 0.0]

    def step(t: int, theta: list[Array], g: list[Array], batch: Softmax) -> None:
        for i in range(2):
            m[i] = momentum * m[i] + g[i]
            direction = g[i] + momentum * m[i] if nesterov else m[i]
            local = c * np.linalg.norm(theta[i]) / np.linalg.norm(direction)
            theta[i] = theta[i] - lr * decay * theta[i] - lr * local * direction

    follow(lambda p: optimizers.LARS(p, lr, momentum, c, decay, nesterov), step)


@pytest.mark.parametrize("cap", [float("inf"), 1.5])
def test_lamb_equals_algorithm_2(cap: float) -> None:
    """You et al. 2019: r = m̂/(√v̂+ε), θ_i ← θ_i - η φ(‖θ_i‖)/‖r_i‖ r_i with φ(x) = min(x, cap); the decay decoupled."""
    lr, b1, b2, eps, decay = 0.05, 0.9, 0.99, 1e-6, 0.03
    m: list[Any] = [0.0, 0.0]
    v: list[Any] = [0.0, 0.0]

    def step(t: int, theta: list[Array], g: list[Array], batch: Softmax) -> None:
        for i in range(2):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            r = (m[i] / (1 - b1**t)) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
            phi = min(np.linalg.norm(theta[i]), cap)
            theta[i] = theta[i] - lr * decay * theta[i] - lr * phi * r / np.linalg.norm(r)

    follow(lambda p: optimizers.LAMB(p, lr, (b1, b2), eps, decay, cap), step)


@pytest.mark.parametrize("total_steps", [None, 60])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_soaa_with_the_models_prediction(total_steps: int | None, scale: float) -> None:
    """P = η⟨m̂,u⟩ - ½η²⟨(1+s)v̂,u²⟩: what the quadratic model that the box minimises promises for the step -ηu."""
    lr, b1, b2, gamma, eps = 0.03, 0.9, 0.99, 0.2, 1e-8
    m: list[Any] = [0.0, 0.0]
    v: list[Any] = [0.0, 0.0]
    kept = {"d": 1.0, "P": 0.0, "loss": 0.0}
    moved = {"low": 0, "between": 0, "high": 0}
    model = network()
    optimizer = SOAA(model.parameters(), lr, total_steps, (b1, b2), gamma, eps, prediction="model")
    paper = SOAA(network().parameters(), lr, total_steps, (b1, b2), gamma, eps)
    assert paper.trust_region != optimizer.trust_region
    theta = [p.detach().numpy().copy() for p in model.parameters()]
    for t, (x, y) in enumerate(batches(60), start=1):
        batch = Softmax(x.numpy(), np.eye(CLASSES)[y.numpy()])
        g = [scale * a for a in batch.gradient(theta)]
        loss = scale * batch.loss(theta)
        smooth = kept["loss"] / (1 - b1 ** (t - 1)) if t > 1 else 0.0
        if (
            t % 2 == 0 and kept["P"] > 0
        ):  # a loss whose ratio lies between the bounds, which noise seldom gives
            # ℓ̂_t - ℓ_t = (β₁ℓ̄ - (β₁ - β₁ᵗ)ℓ)/(1-β₁ᵗ) set to P / d
            loss = (b1 * kept["loss"] - (1 - b1**t) * kept["P"] / kept["d"]) / (b1 - b1**t)
        optimizer.zero_grad()
        (scale * torch.nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step(loss=loss)
        for i in range(2):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
        m_hat, v_hat = ([a / (1 - b**t) for a in w] for w, b in ((m, b1), (v, b2)))
        s = sum((a**2).sum() for a in m_hat) / sum((a + eps).sum() for a in v_hat)
        d, P = kept["d"], 0.0
        for i in range(2):
            F = (1 + s) * v_hat[i]
            u = d * m_hat[i] / (np.maximum(d * F, np.sqrt(v_hat[i])) + eps)
            theta[i] -= lr * u
            P += lr * (m_hat[i] * u).sum() - 0.5 * lr**2 * (F * u**2).sum()
        kept["loss"] = b1 * kept["loss"] + (1 - b1) * loss
        smooth = kept["loss"] / (1 - b1**t)
        exponent = 1.0 if total_steps is None else min(1.0, (t - 1) / total_steps)
        low, high = (1 - gamma) ** exponent, 1 + gamma**exponent
        if kept["P"] != 0.0:
            wanted = (smooth - loss) / max(kept["P"], eps) * d
            moved["low" if wanted <= low else "high" if wanted >= high else "between"] += 1
            kept["d"] = min(max(wanted, low), high)
        kept["P"] = P
        assert float(optimizer.step_info.predicted_reduction) == pytest.approx(P, rel=1e-9)
        assert float(optimizer.step_info.radius) == pytest.approx(kept["d"], rel=1e-9)
        for p, q in zip(model.parameters(), theta, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), q, rtol=1e-9, atol=1e-12, err_msg=f"step {t}")
    assert moved["between"] > 5
    assert moved["low"] + moved["high"] > 5


# --- second-order methods on Rosenbrock's function, its derivatives by hand -------------------------------------------


def rosen(x: Array) -> tuple[float, Array, Array]:
    """f, ∇f and ∇²f of 100 (y - x²)² + (1 - x)²."""
    a, b = x
    f = 100 * (b - a**2) ** 2 + (1 - a) ** 2
    g = np.array([-400 * a * (b - a**2) - 2 * (1 - a), 200 * (b - a**2)])
    H = np.array([[1200 * a**2 - 400 * b + 2, -400 * a], [-400 * a, 200.0]])
    return f, g, H


def shifted_step(g: Array, H: Array, excess: Callable[[float, float], float]) -> tuple[Array, float]:
    """p(μ) = -(H+μI)⁻¹g with μ >= max(0, -λ_min) and excess(‖p(μ)‖, μ) = 0, by bisection."""
    lowest = float(np.linalg.eigvalsh(H)[0])

    def p(mu: float) -> Array:
        return np.linalg.solve(H + mu * np.eye(len(g)), -g)

    low = max(0.0, -lowest) * (1 + 1e-15) + (1e-300 if lowest > 0 else 1e-14)
    high = low + 1.0
    while excess(float(np.linalg.norm(p(high))), high) > 0:
        high = low + 2 * (high - low)
    for _ in range(300):
        middle = 0.5 * (low + high)
        if excess(float(np.linalg.norm(p(middle))), middle) > 0:
            low = middle
        else:
            high = middle
    return p(high), high


@dataclass
class Trace:
    points: list[Array] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)


def literal_arc(x: Array, steps: int) -> Trace:
    """Cartis, Gould & Toint 2011, algorithm 2.1; σ as in section 7: min(σ, ‖g‖) if very successful, 2σ if refused."""
    sigma, trace = 1.0, Trace()
    f, g, H = rosen(x)
    for _ in range(steps):
        p, _ = shifted_step(g, H, lambda norm, mu, sigma=sigma: sigma * norm - mu)
        promised = -(g @ p + 0.5 * p @ H @ p + sigma / 3 * np.linalg.norm(p) ** 3)
        f_new, g_new, H_new = rosen(x + p)
        rho = (f - f_new) / promised
        if rho > 0.9:
            sigma = max(min(sigma, float(np.linalg.norm(g))), 1e-16)
        elif rho < 0.1:
            sigma = 2 * sigma
        if rho >= 0.1:
            x, f, g, H = x + p, f_new, g_new, H_new
        trace.points.append(x)
        trace.sizes.append(sigma)
        trace.accepted.append(rho >= 0.1)
    return trace


def literal_cat(x: Array, steps: int) -> Trace:
    """Hamad & Hinder 2022, algorithm 1 with β = θ = 0.1, ω = 8, r₁ = 1."""
    beta, theta, omega, r, trace = 0.1, 0.1, 8.0, 1.0, Trace()
    f, g, H = rosen(x)
    for _ in range(steps):
        inside = np.linalg.eigvalsh(H)[0] > 0 and np.linalg.norm(np.linalg.solve(H, g)) <= r
        p = -np.linalg.solve(H, g) if inside else shifted_step(g, H, lambda norm, mu, r=r: norm - r)[0]
        f_new, g_new, H_new = rosen(x + p)
        length = float(np.linalg.norm(p))
        promised = -(g @ p + 0.5 * p @ H @ p) + theta / 2 * np.linalg.norm(g_new) * length
        r = omega * length if (f - f_new) / promised >= beta else length / omega
        if f_new <= f:
            x, f, g, H = x + p, f_new, g_new, H_new
        trace.points.append(x)
        trace.sizes.append(r)
        trace.accepted.append(f_new <= f)
    return trace


def run_trials(optimizer_of: Callable[[Any], SecondOrder], size: str, start: Array, steps: int) -> Trace:
    w = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer, trace = optimizer_of([w]), Trace()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = rosenbrock(w)
        optimizer.backward(loss)
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        trace.points.append(w.detach().numpy().copy())
        trace.sizes.append(float(optimizer._region_state[size]))  # type: ignore[arg-type]
        trace.accepted.append(bool(optimizer.step_info.accepted))
    return trace


def assert_same(mine: Trace, literal: Trace, rtol: float) -> None:
    assert not all(literal.accepted)  # rejections are among what is compared
    for t, (a, b) in enumerate(zip(mine.points, literal.points, strict=True)):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-9, err_msg=f"step {t}")
    assert mine.sizes == pytest.approx(literal.sizes, rel=rtol)


@pytest.mark.parametrize("start", [(-1.2, 1.0), (0.0, 2.0)])
def test_arc_equals_algorithm_2_1(start: tuple[float, float]) -> None:
    x, steps = np.array(start), 20
    literal = literal_arc(x, steps)

    def arc(params: Any) -> SecondOrder:
        trust = TrustRegion(Unbounded(), CubicModel(tolerance=1e-14), AdaptiveCubic())
        return SecondOrder(params, lr=1.0, curvature=Hessian(), trust_region=trust)

    assert_same(run_trials(arc, "sigma", x, steps), literal, 1e-7)
    # the preset solves its model to ‖residual‖ <= min(1e-4, √‖g‖)‖g‖, which in two variables is nearly exact
    assert_same(run_trials(optimizers.ARC, "sigma", x, steps), literal, 1e-3)


@pytest.mark.parametrize("start", [(-1.2, 1.0), (0.0, 2.0)])
def test_cat_equals_algorithm_1(start: tuple[float, float]) -> None:
    x, steps = np.array(start), 25

    def cat(params: Any) -> SecondOrder:
        trust = TrustRegion(L2Ball(), Krylov(tolerance=1e-14), CAT())
        return SecondOrder(params, lr=1.0, curvature=Hessian(), trust_region=trust)

    assert_same(run_trials(cat, "radius", x, steps), literal_cat(x, steps), 1e-6)
    preset = optimizers.CAT([torch.nn.Parameter(torch.zeros(1))]).trust_region
    assert (preset.region, preset.radius) == (L2Ball(), CAT())
