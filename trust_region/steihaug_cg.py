"""Steihaug's truncated conjugate gradients: inexact Newton steps in a ball, by products with B alone.

Legend (Nocedal & Wright 2006, algorithm 7.2): z the iterate, r = Bz + g the residual, d the direction, ε the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, Needs
from trust_region.l2_ball import L2Ball
from trust_region.protocols import Solution


@dataclass(frozen=True)
class SteihaugCG:
    """Conjugate gradients on (B+λI)p = -g that stop at the boundary, at negative curvature, or when close enough.

    Choose it for large problems: it needs products only, takes B of any sign, and does at least as well as the Cauchy
    point, which is its first iterate. It stops at ‖r‖ < min(½, √‖g‖) ‖g‖, which makes Newton's method converge
    superlinearly; these are the constants of ``scipy.optimize.minimize(method="trust-ncg")``.

    Args:
        max_iterations: products at most; ``None`` means 2 P + 10, which only rounding can need.
        tolerance: stop at ‖r‖ < tolerance ‖g‖; ``None`` means the rule above.

    Raises:
        ValueError: for negative curvature in the first iteration and an infinite radius: the model has no minimum.

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([1.0, 4.0], dtype=torch.float64)])
    >>> found = SteihaugCG(tolerance=1e-12).solve([torch.ones(2, dtype=torch.float64)], B, torch.tensor(10.0))
    >>> found.step, found.iterations
    ([tensor([-1.0000, -0.2500], dtype=torch.float64)], 2)

    Cost: one product and O(P) an iteration; every iteration waits for the host. Memory: 4 P.
    Reference: Steihaug 1983; Nocedal & Wright 2006, Numerical Optimization, algorithm 7.2.
    """

    max_iterations: int | None = None
    tolerance: float | None = None

    regions = (L2Ball,)
    shardable = True

    def __post_init__(self) -> None:
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ValueError(f"max_iterations must be >= 1 or None, got {self.max_iterations}")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1) or None, got {self.tolerance}")

    @property
    def needs(self) -> Needs:
        """Only gradient and curvature."""
        return Needs.GRAD

    def solve(
        self,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor,
        damping: Tensor | float = 0.0,
    ) -> Solution:
        """A step in the ball; a product that is not finite ends the iteration at the last good iterate."""
        norm_g, bound, shift = float(vectors.norm(gradient)), float(radius), float(damping)
        limit = self.max_iterations if self.max_iterations is not None else 2 * vectors.numel(gradient) + 10
        target = forcing(norm_g) if self.tolerance is None else self.tolerance * norm_g
        z, Bz = vectors.zeros_like(gradient), vectors.zeros_like(gradient)
        r = vectors.copy(gradient)
        d = vectors.negative(r)
        r_squared = float(vectors.dot(r, r))
        zz = zd = 0.0
        dd = r_squared
        iterations, boundary, negative, broken = 0, False, False, not math.isfinite(norm_g)
        while norm_g > 0 and not broken and iterations < limit:
            Bd = curvature.matvec(d)
            iterations += 1
            bend = float(vectors.dot(d, Bd)) + shift * dd
            if not math.isfinite(bend):
                broken = True
                break
            if bend <= 0:
                negative = True
                if not math.isfinite(bound):
                    if iterations > 1:
                        break
                    raise ValueError(
                        "the curvature is not positive along the gradient, and without a region the model has no "
                        "minimum: use a finite radius, a larger damping, or a curvature that is positive semi-definite"
                    )
                low, high = intersections(zz, zd, dd, bound)
                # m(z + td) - m(z) = t rᵀd + ½ t² dᵀBd
                slope = float(vectors.dot(r, d))
                t = low if low * slope + 0.5 * low**2 * bend < high * slope + 0.5 * high**2 * bend else high
                _advance(z, Bz, d, Bd, t)
                boundary = True
                break
            alpha = r_squared / bend
            if _length(z, d, alpha) >= bound:
                _advance(z, Bz, d, Bd, intersections(zz, zd, dd, bound)[1])
                boundary = True
                break
            _advance(z, Bz, d, Bd, alpha)
            torch._foreach_add_(r, Bd, alpha=alpha)
            if shift:
                torch._foreach_add_(r, d, alpha=alpha * shift)
            r_next = float(vectors.dot(r, r))
            if math.sqrt(r_next) < target:
                break
            torch._foreach_mul_(d, r_next / r_squared)
            torch._foreach_sub_(d, r)
            r_squared = r_next
            zz, zd, dd = (float(vectors.dot(a, b)) for a, b in ((z, z), (z, d), (d, d)))
        residual = vectors.norm([a + b + shift * c for a, b, c in zip(Bz, gradient, z, strict=True)])
        device = z[0].device
        return Solution(
            step=z,
            on_boundary=torch.tensor(boundary, device=device),
            negative_curvature=torch.tensor(negative, device=device),
            iterations=iterations,
            residual=residual,
            curvature_step=Bz,
            diagnostics={"non_finite_product": broken},
        )


def forcing(gradient_norm: float) -> float:
    """min(½, √‖g‖) ‖g‖: the residual at which Newton's method still converges superlinearly."""
    return min(0.5, math.sqrt(gradient_norm)) * gradient_norm if math.isfinite(gradient_norm) else 0.0


def intersections(zz: float, zd: float, dd: float, radius: float) -> tuple[float, float]:
    """Both t with ‖z + t d‖ = Δ, the smaller first, from ‖z‖², zᵀd and ‖d‖²; without cancellation.

    >>> intersections(0.0, 0.0, 4.0, 1.0)
    (-0.5, 0.5)
    """
    b, c = 2 * zd, zz - radius**2
    root = math.sqrt(max(b * b - 4 * dd * c, 0.0))
    aux = b + math.copysign(root, b)
    first, second = -aux / (2 * dd), (-2 * c / aux if aux else 0.0)
    return min(first, second), max(first, second)


def _advance(z: list[Tensor], Bz: list[Tensor], d: list[Tensor], Bd: list[Tensor], t: float) -> None:
    torch._foreach_add_(z, d, alpha=t)
    torch._foreach_add_(Bz, Bd, alpha=t)


def _length(z: Sequence[Tensor], d: Sequence[Tensor], t: float) -> float:
    return float(vectors.norm(vectors.add(z, d, t)))
