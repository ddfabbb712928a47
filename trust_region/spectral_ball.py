"""The spectral-norm ball: every matrix moves by at most Δ in its largest singular value. Muon's region.

Legend: G = U S Vᵀ the gradient of a matrix; U Vᵀ its orthogonal factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from curvature import vectors
from curvature.operators import IdentityOperator
from curvature.protocols import CurvatureOperator, State
from trust_region.projected import choose, each, solve_then_project
from trust_region.protocols import Solution, StepContext
from trust_region.unbounded import Shape

#: Keller Jordan's quintic: steepest at 0, singular values end between 0.7 and 1.2 after five steps.
QUINTIC = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class SpectralBall(Shape):
    """{P : ‖P‖₂ <= Δ} for every parameter as a matrix (first dimension by the rest; a vector by its length).

    With ``fill=True`` (Muon) the step is -Δ U Vᵀ, the minimiser of the linear model gᵀp: it always fills the ball, and
    its prediction is the linear model's. Curvature other than the identity preconditions first: the orthogonal factor
    is then that of B⁻¹g, or of g where that would go uphill. With ``fill=False`` the step is (B+λI)⁻¹g with singular
    values cut at Δ, the exact minimiser for B = cI.

    Args:
        fill: as above.
        steps: Newton-Schulz iterations of the orthogonal factor, >= 1.
        dtype: in which they run; ``torch.bfloat16`` is Muon's own, fast on accelerators; ``None`` is the gradient's.
        scale: Muon's factor by shape (rows, columns): ``"original"`` is √max(1, rows/columns),
            ``"match_rms_adamw"`` is 0.2 √max(rows, columns), ``None`` is 1, the ball itself.

    >>> from curvature import IdentityOperator
    >>> g = [torch.tensor([[3.0, 0.0], [0.0, 0.5]])]
    >>> ball = SpectralBall(fill=False)
    >>> ball.minimise({}, g, IdentityOperator(g), torch.tensor(1.0), 0.0, StepContext()).step
    [tensor([[-1.0000,  0.0000],
            [ 0.0000, -0.5000]])]

    Cost: 15 matrix products a parameter (``fill``), else a singular value decomposition.
    References: Jordan et al. 2024, Muon; Bernstein & Newhouse 2024, arXiv 2409.20325; Liu et al. 2025, arXiv
    2502.16982 (``match_rms_adamw``).
    """

    fill: bool = True
    steps: int = 5
    dtype: torch.dtype | None = torch.bfloat16
    scale: Literal["original", "match_rms_adamw"] | None = None

    scope = "tensor"
    finite_only = True

    def __post_init__(self) -> None:
        if not 1 <= self.steps < 100:
            raise ValueError(f"steps must be in [1, 100), got {self.steps}")
        if self.scale not in ("original", "match_rms_adamw", None):
            raise ValueError(f"scale must be 'original', 'match_rms_adamw' or None, got {self.scale!r}")
        if self.scale is not None and not self.fill:
            raise ValueError("scale is Muon's and goes with fill=True; leave it None")

    def minimise(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        damping: Tensor | float,
        context: StepContext,
    ) -> Solution:
        """-Δ U Vᵀ, or singular values cut at Δ."""
        if not self.fill:
            return solve_then_project(self, state, gradient, curvature, radius, damping, context)
        step = self._filled(gradient, radius)
        negative = torch.zeros((), dtype=torch.bool, device=step[0].device)
        if not isinstance(curvature, IdentityOperator):
            newton = curvature.solve(gradient, damping)
            negative = vectors.dot(gradient, newton) < 0
            preconditioned = self._filled(newton, radius)
            step = choose(vectors.dot(gradient, preconditioned) < 0, preconditioned, step)
        return Solution(
            step=step,
            on_boundary=torch.ones((), dtype=torch.bool, device=step[0].device),
            negative_curvature=negative,
            iterations=1,
            # the linear model has no curvature
            curvature_step=[torch.zeros_like(p) for p in step],
        )

    def project(
        self,
        state: State,
        step: Sequence[Tensor],
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """Singular values cut at Δ: the nearest point in the Euclidean (Frobenius) norm."""
        return [
            _through_svd(p, partial(torch.clamp, max=r))
            for p, r in zip(step, each(radius, step), strict=True)
        ]

    def steepest(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """-Δ U Vᵀ over the singular values that are not 0."""
        radii = each(radius, gradient)
        return [_through_svd(g, partial(_equal, to=-r)) for g, r in zip(gradient, radii, strict=True)]

    def _filled(self, direction: Sequence[Tensor], radius: Tensor | Sequence[Tensor]) -> list[Tensor]:
        radii = each(radius, direction)
        return [
            orthogonal_factor(d, self.steps, self.dtype).mul_(-r * shape_factor(d.shape, self.scale))
            for d, r in zip(direction, radii, strict=True)
        ]


def shape_factor(shape: torch.Size, scale: str | None) -> float:
    """Muon's factor of the learning rate for a parameter of this shape."""
    if scale is None or len(shape) < 2:
        return 1.0
    rows, columns = shape[0], math.prod(shape[1:])
    return math.sqrt(max(1, rows / columns)) if scale == "original" else 0.2 * math.sqrt(max(rows, columns))


def newton_schulz(
    matrix: Tensor, steps: int = 5, dtype: torch.dtype | None = torch.bfloat16, eps: float = 1e-7
) -> Tensor:
    """U S' Vᵀ with S' near 1, by the quintic X ← aX + (bXXᵀ + c(XXᵀ)²)X from X = G/‖G‖.

    Args:
        matrix: G, (rows, columns).
        steps: iterations.
        dtype: in which they run; ``None`` is that of ``matrix``.
        eps: the smallest ‖G‖ that is divided by.

    >>> Q = newton_schulz(torch.diag(torch.tensor([4.0, 1.0])), dtype=None)
    >>> bool((torch.linalg.svdvals(Q) > 0.6).all() and (torch.linalg.svdvals(Q) < 1.3).all())
    True

    Cost: three products of the smaller side an iteration. Reference: Jordan et al. 2024, Muon.
    """
    a, b, c = QUINTIC
    X = matrix.to(dtype if dtype is not None else matrix.dtype)
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:
        X = X.T
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        gram = X @ X.T
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.T if tall else X


def orthogonal_factor(x: Tensor, steps: int, dtype: torch.dtype | None) -> Tensor:
    """A new tensor shaped like ``x``: U Vᵀ of the matrix, or x/‖x‖ of a vector or scalar."""
    kept = vectors.compute_dtype(x.dtype)
    if not x.numel():
        return x.to(kept, copy=True)
    if x.dim() < 2:
        norm = torch.linalg.vector_norm(x)
        return (x / torch.where(norm > 0, norm, torch.ones_like(norm))).to(kept)
    return newton_schulz(x.reshape(x.shape[0], -1), steps, dtype).reshape(x.shape).to(kept, copy=True)


def _equal(s: Tensor, to: Tensor) -> Tensor:
    """Every singular value that is not 0 becomes ``to``."""
    return torch.where(s > s.max() * torch.finfo(s.dtype).eps, to, torch.zeros_like(s))


def _through_svd(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    matrix = x.reshape(x.shape[0], -1) if x.dim() >= 2 else x.reshape(-1, 1)
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    new = change(s)
    changed: Tensor = (U * new) @ Vh
    # what is not changed is given back as it was, without the rounding of the decomposition
    return torch.where((new == s).all(), x, changed.reshape(x.shape))
