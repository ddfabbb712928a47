"""Powell's dogleg: from the Cauchy point towards the Newton point, for positive definite curvature.

Legend: p_U the unconstrained minimiser along -g, p_B the Newton point -(B+λI)⁻¹g.
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
from trust_region.steihaug_cg import intersections


@dataclass(frozen=True)
class Dogleg:
    """The point where the path 0 → p_U → p_B leaves the ball, or p_B if it never does.

    Choose it where ``solve`` is cheap and B is positive definite: Kronecker factors, limited-memory BFGS, Gauss-Newton
    with damping. It equals ``scipy.optimize.minimize(method="dogleg")``.

    Raises:
        ValueError: where B + λI is seen to be indefinite, on the plane of g and p_B in which the path lies.

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([1.0, 4.0], dtype=torch.float64)])
    >>> g = [torch.tensor([4.0, 4.0], dtype=torch.float64)]
    >>> Dogleg().solve(g, B, torch.tensor(100.0, dtype=torch.float64)).step
    [tensor([-4., -1.], dtype=torch.float64)]

    Cost: one ``solve``, one product; waits for the host.
    Reference: Powell 1970; Nocedal & Wright 2006, section 4.1.
    """

    regions = (L2Ball,)
    definite_only = True

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
        """Nocedal & Wright, equation (4.16)."""
        norm_g, bound, shift = float(vectors.norm(gradient)), float(radius), float(damping)
        if norm_g == 0:
            zeros = [torch.zeros_like(g) for g in gradient]
            return _solution(zeros, zeros, False, 0)
        newton = vectors.negative(curvature.solve(gradient, damping))
        slope = float(vectors.dot(gradient, newton))
        if slope >= 0:
            raise ValueError(_indefinite("the Newton step is uphill"))
        norm_newton = float(vectors.norm(newton))
        newton_product = vectors.negative(vectors.add(gradient, newton, shift))
        Bg = curvature.matvec(gradient)
        bend = float(vectors.dot(gradient, Bg)) + shift * norm_g**2
        # On the plane of g and p_B the matrix is [[gᵀBg, -‖g‖²], [-‖g‖², -gᵀp_B]]: definite if its determinant is > 0.
        if bend <= 0 or bend * -slope < norm_g**4 * (1 - 1e-6):
            raise ValueError(_indefinite("the curvature is not positive on the dogleg's plane"))
        if norm_newton < bound:
            return _solution(newton, newton_product, False, 1)
        t = norm_g**2 / bend
        if not math.isfinite(t):
            zeros = [torch.zeros_like(g) for g in gradient]
            return _solution(zeros, zeros, False, 1)
        if t * norm_g >= bound:
            t = bound / norm_g
            return _solution(vectors.scale(gradient, -t), vectors.scale(Bg, -t), True, 1)
        cauchy = vectors.scale(gradient, -t)
        leg = vectors.add(newton, cauchy, -1.0)
        zz, zd, dd = (float(vectors.dot(a, b)) for a, b in ((cauchy, cauchy), (cauchy, leg), (leg, leg)))
        s = intersections(zz, zd, dd, bound)[1]
        product = vectors.add(vectors.scale(newton_product, s), Bg, -(1 - s) * t)
        return _solution(vectors.add(cauchy, leg, s), product, True, 1)


def _indefinite(why: str) -> str:
    return (
        f"Dogleg needs positive definite curvature, and {why}: use SteihaugCG, Krylov or ExactSubproblem, or a larger "
        "damping"
    )


def _solution(step: list[Tensor], product: list[Tensor], boundary: bool, iterations: int) -> Solution:
    device = step[0].device
    return Solution(
        step=step,
        on_boundary=torch.tensor(boundary, device=device),
        negative_curvature=torch.tensor(False, device=device),
        iterations=iterations,
        curvature_step=product,
    )
