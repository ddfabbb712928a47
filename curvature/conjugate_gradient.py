"""Conjugate gradients that say how they ended.

Legend: A = B + λI, b the right-hand side, M ≈ A⁻¹ the preconditioner, x the iterate, r = b - A x, p the direction.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature import vectors
from curvature.operators import check_damping
from curvature.protocols import CurvatureOperator

Apply = Callable[[Sequence[Tensor]], "list[Tensor]"]


class Outcome(enum.Enum):
    """How an iteration ended."""

    CONVERGED = "converged"
    """The true residual is within the tolerance."""
    MAX_ITERATIONS = "max-iterations"
    """The iterations were used up."""
    NEGATIVE_CURVATURE = "negative-curvature"
    """A direction p with pᵀ A p < 0 was met: A is indefinite."""
    BREAKDOWN = "breakdown"
    """A direction without curvature was met (A is singular), or rounding stopped all progress."""
    NON_FINITE = "non-finite"
    """A product held NaN or infinity; the solution is the last finite iterate."""


@dataclass(frozen=True)
class ConjugateGradientResult:
    """What conjugate gradients reached.

    Args:
        solution: x, shaped like the parameters; the last good iterate whatever the outcome.
        outcome: how it ended.
        iterations: products with B, but for those that check a residual.
        residual_norm: ‖b - A x‖, 0-d.
        direction: p with pᵀ A p <= 0 where negative curvature was met, or a breakdown on it, else ``None``.
    """

    solution: list[Tensor]
    outcome: Outcome
    iterations: int
    residual_norm: Tensor
    direction: list[Tensor] | None = None

    @property
    def converged(self) -> bool:
        """Whether the tolerance was reached."""
        return self.outcome is Outcome.CONVERGED


def conjugate_gradient(
    operator: CurvatureOperator | Apply,
    b: Sequence[Tensor],
    *,
    damping: float | Tensor = 0.0,
    preconditioner: Apply | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    initial: Sequence[Tensor] | None = None,
) -> ConjugateGradientResult:
    """Solve (B + λI) x = b for a positive definite B + λI, until ‖r‖ <= max(rtol ‖b‖, atol).

    Where B may be indefinite or singular the outcome says so, and the caller decides; ``operator.solve`` instead
    insists on working precision. A residual that the recurrence calls small is computed anew before it counts. A b so
    short or long that its dot products would leave the dtype's range is solved for at length 1, and scaled back.

    Args:
        operator: B, or its product v ↦ B v.
        b: right-hand side, one tensor a parameter.
        damping: λ >= 0, in curvature units.
        preconditioner: v ↦ M v, symmetric positive definite, near (B + λI)⁻¹.
        rtol: relative tolerance, >= 0.
        atol: absolute tolerance, >= 0, in units of b.
        max_iterations: at most so many products; P by default.
        initial: the first x; zero by default.

    Returns:
        Solution, outcome, iterations, residual norm.

    Raises:
        ValueError: for arguments out of range, or an ``initial``, product or preconditioned vector that is not shaped
            like b.

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([1.0, 2.0, 4.0])])
    >>> result = conjugate_gradient(B, [torch.ones(3)])
    >>> result.outcome.value, result.iterations, [x.round(decimals=4) for x in result.solution]
    ('converged', 3, [tensor([1.0000, 0.5000, 0.2500])])

    Cost: one product and 10 P flops an iteration; 4 vectors of memory. Reads the host once an iteration.
    Reference: Hestenes & Stiefel 1952.
    """
    check_damping(damping)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if max_iterations is None:
        max_iterations = max(vectors.numel(b), 1)
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be >= 1, got {max_iterations}")
    product: Apply = operator.matvec if isinstance(operator, CurvatureOperator) else operator
    if initial is not None:
        check_shapes(initial, b, "initial")

    def apply(v: Sequence[Tensor]) -> list[Tensor]:
        Bv = product(v)
        check_shapes(Bv, b, "a product with the operator")
        return vectors.add(Bv, v, damping)

    def precondition(v: list[Tensor]) -> list[Tensor]:
        if preconditioner is None:
            return v
        z = preconditioner(v)
        check_shapes(z, b, "what the preconditioner gives")
        return z

    epsilon = max(torch.finfo(x.dtype).eps for x in b)
    target = torch.clamp(rtol * vectors.norm(b), min=atol)
    if initial is None:
        x, r = [torch.zeros_like(t) for t in b], vectors.copy(b)
    else:
        x = vectors.copy(initial)
        r = vectors.add(b, apply(x), -1.0)
    size = vectors.norm(r)
    length = torch.maximum(size, vectors.norm(b))
    if bool(torch.isfinite(length)) and bool(size > target) and not in_range(length):
        found = conjugate_gradient(
            operator,
            [t / length.to(t.device, t.dtype) for t in b],
            damping=damping,
            preconditioner=preconditioner,
            rtol=rtol,
            atol=atol / float(length),
            max_iterations=max_iterations,
            initial=None if initial is None else [t / length.to(t.device, t.dtype) for t in initial],
        )
        return replace(
            found,
            solution=vectors.scale(found.solution, length),
            residual_norm=found.residual_norm * length,
        )
    if not bool(torch.isfinite(size)):
        return ConjugateGradientResult(x, Outcome.NON_FINITE, 0, size)
    if bool(size <= target):
        return ConjugateGradientResult(x, Outcome.CONVERGED, 0, size)
    z = precondition(r)
    p, rz = vectors.copy(z), vectors.dot(r, z)
    checked = size  # the last residual that was computed, not recurred
    for iteration in range(1, max_iterations + 1):
        Ap = apply(p)
        curvature = vectors.dot(p, Ap)
        noise = epsilon * vectors.norm(p) * vectors.norm(Ap)
        # One transfer decides about the whole iteration.
        finite, flat, negative = torch.stack(
            [torch.isfinite(curvature) & torch.isfinite(rz), curvature.abs() <= noise, curvature < 0]
        ).tolist()
        if not finite:
            return ConjugateGradientResult(x, Outcome.NON_FINITE, iteration, size)
        if flat or negative:
            outcome = Outcome.BREAKDOWN if flat else Outcome.NEGATIVE_CURVATURE
            return ConjugateGradientResult(x, outcome, iteration, size, p)
        length = rz / curvature
        x = vectors.add(x, p, length)
        r = vectors.add(r, Ap, -length)
        size = vectors.norm(r)
        if bool(size <= target):
            r = vectors.add(b, apply(x), -1.0)
            size = vectors.norm(r)
            if bool(size <= target):
                return ConjugateGradientResult(x, Outcome.CONVERGED, iteration, size)
            if not bool(size < 0.5 * checked):
                return ConjugateGradientResult(x, Outcome.BREAKDOWN, iteration, size)
            checked = size
            z = precondition(r)
            p, rz = vectors.copy(z), vectors.dot(r, z)
            continue
        z = precondition(r)
        previous, rz = rz, vectors.dot(r, z)
        p = vectors.add(z, p, rz / previous)
    return ConjugateGradientResult(x, Outcome.MAX_ITERATIONS, max_iterations, size)


def in_range(length: Tensor) -> bool:
    """Whether products of four numbers of this size are neither infinite nor without digits."""
    limits = torch.finfo(length.dtype)
    return bool(limits.tiny**0.25 < float(length.detach()) < limits.max**0.25)


def check_shapes(v: Sequence[Tensor], b: Sequence[Tensor], what: str) -> None:
    """Raise a clear error unless ``v`` is shaped like the right-hand side."""
    found, wanted = [tuple(x.shape) for x in v], [tuple(x.shape) for x in b]
    if found != wanted:
        raise ValueError(f"{what} must be shaped like b, {wanted}, got {found}")
