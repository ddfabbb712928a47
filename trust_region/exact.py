"""The exact step in a ball, by an eigendecomposition: for small problems, and the oracle of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, Needs
from trust_region.l2_ball import L2Ball
from trust_region.protocols import Solution
from trust_region.secular import minimise_in_ball


@dataclass(frozen=True)
class ExactSubproblem:
    """The global minimiser of the model in the ball, B of any sign, the hard case included.

    Choose it for small problems (P up to some hundred) with expensive losses. The step satisfies the conditions of
    Moré & Sorensen to rounding: (B+λI+μI)p = -g, B+λI+μI ⪰ 0, μ >= 0, μ(Δ - ‖p‖) = 0. SciPy's ``trust-exact`` solves
    only nearly: it stops when ‖p‖ is within 10% of Δ. Solved to the end its iterates are these.

    Args:
        max_size: largest P for which a dense matrix is formed.

    Raises:
        ValueError: for more elements than ``max_size``; for an infinite radius and a model without a minimum.

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([-1.0, 2.0], dtype=torch.float64)])
    >>> found = ExactSubproblem().solve([torch.tensor([0.0, 3.0], dtype=torch.float64)], B, torch.tensor(2.0))
    >>> found.diagnostics["hard_case"], round(float(found.step[0].norm()), 12)
    (True, 2.0)

    Cost: O(P³) and P products to form B; O(P) for a diagonal B. Waits for the host.
    Reference: Moré & Sorensen 1983; Nocedal & Wright 2006, section 4.3.
    """

    max_size: int = 2000

    regions = (L2Ball,)

    def __post_init__(self) -> None:
        if self.max_size < 1:
            raise ValueError(f"max_size must be >= 1, got {self.max_size}")

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
        """Eigendecomposition, then the secular equation, in float64."""
        g = vectors.flatten([x.to(gradient[0].device) for x in gradient]).double()
        shift = float(damping)
        if getattr(curvature, "is_diagonal", False):
            h = vectors.flatten([x.to(g.device) for x in curvature.diagonal()]).double()
            found = minimise_in_ball(g, h + shift, float(radius))
            flat, product, lowest = found.step, h * found.step, h.min()
        else:
            size = g.numel()
            if size > self.max_size:
                raise ValueError(
                    f"ExactSubproblem would decompose a {size} x {size} matrix, and max_size is {self.max_size}: use "
                    "SteihaugCG or Krylov, which need products only, or raise max_size"
                )
            B = curvature.to_dense().to(g.device).double()
            B = 0.5 * (B + B.T)
            if not bool(torch.isfinite(B).all() & torch.isfinite(g).all()):
                zeros = torch.zeros_like(g)
                return _solution(zeros, zeros, gradient, False, False, {"non_finite_product": True})
            h, Q = torch.linalg.eigh(B)
            found = minimise_in_ball(Q.T @ g, h + shift, float(radius))
            flat = Q @ found.step
            norm = torch.linalg.vector_norm(flat)
            if found.on_boundary:
                # rotating back rounds: stay inside
                flat = flat * torch.clamp(radius.to(flat) / norm, max=1.0)
            product, lowest = B @ flat, h[0]
        return _solution(
            flat,
            product,
            gradient,
            found.on_boundary,
            found.iterations > 0 and bool(lowest + shift <= 0),
            {"multiplier": found.multiplier, "hard_case": found.hard},
            torch.linalg.vector_norm(product + (shift + found.multiplier) * flat + g),
            found.iterations,
        )


def _solution(
    flat: Tensor,
    product: Tensor,
    like: Sequence[Tensor],
    boundary: bool,
    negative: bool,
    diagnostics: dict[str, object],
    residual: Tensor | None = None,
    iterations: int = 0,
) -> Solution:
    dtype = vectors.compute_dtype(like[0].dtype)
    step, Bp = (
        [p.to(x.device, dtype) for p, x in zip(vectors.unflatten(v, like), like, strict=True)]
        for v in (flat, product)
    )
    device = like[0].device
    return Solution(
        step=step,
        on_boundary=torch.tensor(boundary, device=device),
        negative_curvature=torch.tensor(negative, device=device),
        iterations=iterations,
        residual=residual,
        curvature_step=Bp,
        diagnostics=diagnostics,
    )
