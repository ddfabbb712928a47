"""The secular equation of a diagonal model: exact steps in a Euclidean ball, and exact cubic steps.

Legend: the model is gᵀp + ½ Σ h_i p_i², with vectors g and h in the eigenbasis of B. The multiplier μ >= 0 makes
(h + μ) p = -g. With μ = t + max(-min(h), 0) and d = h + max(-min(h), 0) >= 0 the step is p(t) = -g / (d + t), t >= 0:
neither d + t nor μ suffers cancellation, near μ = -min(h) as little as near μ = 0. E is where d = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: More Newton steps than any case needs: from the left of the root Newton's method is monotone and quadratic.
MAX_ITERATIONS = 200


@dataclass(frozen=True)
class SecularStep:
    """The minimiser of a diagonal model in a ball, or with a cubic term.

    Args:
        step: p, flat.
        multiplier: μ >= 0.
        on_boundary: whether ‖p‖ = Δ decided.
        hard: whether the gradient had no part in the lowest eigenspace and a multiple of an eigenvector was added.
        iterations: how often ‖p(t)‖ was computed.
    """

    step: Tensor
    multiplier: float
    on_boundary: bool
    hard: bool
    iterations: int = 1


def _step(g: Tensor, d: Tensor, t: float) -> Tensor:
    # g = 0 gives p = 0 also where d + t = 0.
    return torch.where(g == 0, torch.zeros_like(g), -g / (d + t))


def _slope(p: Tensor, norm: float, d: Tensor, t: float) -> float:
    """Σ (p/‖p‖)² / (d + t), which is d(1/‖p‖)/dt · ‖p‖; scaled so that no square overflows."""
    w = p / norm
    return float(torch.where(p == 0, torch.zeros_like(p), w * w / (d + t)).sum())


def _newton(t: float, correction: float, low: float, high: float) -> float:
    """The Newton iterate, or the middle where it leaves the bracket."""
    new = t + correction
    if not low < new < high:
        new = 0.5 * (low + high)
    return new


def minimise_in_ball(g: Tensor, h: Tensor, radius: float) -> SecularStep:
    """argmin gᵀp + ½ Σ h p² over ‖p‖ <= Δ, exactly, the hard case included.

    Args:
        g: gradient, flat.
        h: curvature, flat, of any sign.
        radius: Δ > 0; ``inf`` only for h > 0.

    Returns:
        the step and its multiplier: (h+μ)p = -g, h+μ >= 0, μ(Δ - ‖p‖) = 0 to rounding.

    Raises:
        ValueError: for an infinite radius and a model that is unbounded below.

    >>> minimise_in_ball(torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.0]), 2.0).hard
    True

    Cost: O(P) an iteration, some five to ten iterations, each waits for the host.
    Reference: Moré & Sorensen 1983, Computing a trust region step; Conn, Gould & Toint 2000, section 7.3.
    """
    norm_g, h_min, h_max = float(torch.linalg.vector_norm(g)), float(h.min()), float(h.max())
    if not (math.isfinite(norm_g) and math.isfinite(h_min) and math.isfinite(h_max)):
        return SecularStep(torch.full_like(g, math.nan), math.nan, False, False)
    if norm_g == 0:
        return SecularStep(torch.zeros_like(g), 0.0, False, False, 0)
    if h_min > 0:
        p = -g / h
        if float(torch.linalg.vector_norm(p)) <= radius:
            return SecularStep(p, 0.0, False, False)
    if not math.isfinite(radius):
        raise ValueError(
            f"the curvature has the eigenvalue {h_min:.3g} <= 0, so that the model has no minimum without a region: "
            "use a finite radius or a larger damping"
        )
    shift = max(-h_min, 0.0)
    d = h + shift
    norm_e = float(torch.linalg.vector_norm(torch.where(d == 0, g, torch.zeros_like(g))))
    if h_min <= 0 and norm_e == 0:
        p = _step(g, d, 0.0)
        rest = float(torch.linalg.vector_norm(p))
        if rest <= radius:
            p[int(torch.argmin(h))] = math.sqrt((radius - rest) * (radius + rest))
            return SecularStep(p, shift, True, True)
    # ‖g_E‖/t and ‖g‖/(max d + t) bound ‖p(t)‖ from below, ‖g‖/t from above
    low = max(norm_e / radius, norm_g / radius - float(d.max()), 0.0)
    high = max(norm_g / radius, low)
    t, p, norm = low, _step(g, d, low), math.inf
    eps = torch.finfo(g.dtype).eps
    iterations = 0
    while iterations < MAX_ITERATIONS:
        iterations += 1
        p = _step(g, d, t)
        norm = float(torch.linalg.vector_norm(p))
        if abs(norm - radius) <= 2 * eps * radius:
            break
        low, high = (t, high) if norm > radius else (low, t)
        slope = _slope(p, norm, d, t) if math.isfinite(norm) else math.inf
        new = _newton(t, (norm / radius - 1) / slope if math.isfinite(slope) else math.nan, low, high)
        if new in (t, low) and norm <= radius * (1 + 64 * eps):
            break
        t = new
    if norm > radius:
        p = p * (radius / norm)
    return SecularStep(p, t + shift, True, False, iterations)


def minimise_cubic(g: Tensor, h: Tensor, sigma: float) -> SecularStep:
    """argmin gᵀp + ½ Σ h p² + (σ/3) ‖p‖³, exactly: the root of μ = σ ‖p(μ)‖.

    Args:
        g: gradient, flat.
        h: curvature, flat, of any sign.
        sigma: σ > 0.

    Returns:
        the step and its multiplier μ = σ‖p‖.

    >>> step = minimise_cubic(torch.tensor([2.0]), torch.tensor([0.0]), 2.0).step
    >>> round(float(step), 6)
    -1.0

    Cost: O(P) an iteration.
    Reference: Cartis, Gould & Toint 2011, Adaptive cubic regularisation methods, part I, section 6.1.
    """
    norm_g, h_min, h_max = float(torch.linalg.vector_norm(g)), float(h.min()), float(h.max())
    if not (math.isfinite(norm_g) and math.isfinite(h_min) and math.isfinite(h_max)):
        return SecularStep(torch.full_like(g, math.nan), math.nan, False, False)
    if norm_g == 0:
        return SecularStep(torch.zeros_like(g), 0.0, False, False, 0)
    shift = max(-h_min, 0.0)
    d = h + shift
    norm_e = float(torch.linalg.vector_norm(torch.where(d == 0, g, torch.zeros_like(g))))
    if h_min < 0 and norm_e == 0:
        p = _step(g, d, 0.0)
        rest, wanted = float(torch.linalg.vector_norm(p)), shift / sigma
        if rest <= wanted:
            p[int(torch.argmin(h))] = math.sqrt((wanted - rest) * (wanted + rest))
            return SecularStep(p, shift, True, True)
    # From ‖g‖/(h_max+μ) <= ‖p‖, ‖g_E‖/t <= ‖p‖ and ‖p‖ <= ‖g‖/t, with ‖p‖ = μ/σ and μ = t + shift.
    low = max(_root(h_max, sigma * norm_g) - shift, _root(shift, sigma * norm_e) if shift else 0.0, 0.0)
    high = max(_root(shift, sigma * norm_g) * (1 + 1e-12), low)
    t, p = low, _step(g, d, low)
    eps = torch.finfo(g.dtype).eps
    iterations = 0
    while iterations < MAX_ITERATIONS:
        iterations += 1
        p = _step(g, d, t)
        norm, mu = float(torch.linalg.vector_norm(p)), t + shift
        if abs(sigma * norm - mu) <= 4 * eps * mu or not low < high:
            break
        low, high = (t, high) if sigma * norm > mu else (low, t)
        # ψ(t) = 1/‖p‖ - σ/μ = 0, so ψ·‖p‖ = 1 - σ‖p‖/μ and ψ'·‖p‖ = slope + σ‖p‖/μ².
        excess = sigma * norm / mu
        correction = (excess - 1) / (_slope(p, norm, d, t) + excess / mu) if math.isfinite(norm) else math.nan
        new = _newton(t, correction, low, high)
        if new in (t, low, high):
            break
        t = new
    return SecularStep(p, t + shift, True, False, iterations)


def _root(b: float, c: float) -> float:
    """The root x >= 0 of x(x + b) = c, without cancellation."""
    root = math.hypot(b, 2 * math.sqrt(c))
    return 2 * c / (b + root) if b > 0 else 0.5 * (root - b)
