"""MINRES: the least residual over Krylov spaces, for a symmetric matrix of any signs.

Legend: A symmetric, v_k the Lanczos vectors, (α, β) the tridiagonal entries, (c, s) the plane rotations that make
it upper triangular, w the directions, φ the residual norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature import vectors
from curvature.conjugate_gradient import Apply


def minres(apply: Apply, b: Sequence[Tensor], *, tolerance: float, max_iterations: int) -> list[Tensor]:
    """x that minimises ‖b - A x‖ over the Krylov spaces of b, until φ <= tolerance ‖b‖ or a Krylov space is closed.

    Args:
        apply: v ↦ A v, A symmetric, indefinite or not.
        b: right-hand side, not zero.
        tolerance: on the residual relative to ‖b‖.
        max_iterations: at most so many products.

    Returns:
        The last iterate; the caller computes its residual.

    Cost: one product an iteration, 6 vectors of memory. Reference: Paige & Saunders 1975.
    """
    beta = vectors.norm(b)
    start = beta
    v_old, v = [torch.zeros_like(x) for x in b], vectors.scale(b, 1.0 / beta)
    w_old, w = [torch.zeros_like(x) for x in b], [torch.zeros_like(x) for x in b]
    x = [torch.zeros_like(t) for t in b]
    zero, one = torch.zeros_like(beta), torch.ones_like(beta)
    c_old, s_old, c, s = one, zero, one, zero
    phi, beta = beta, zero
    epsilon = max(torch.finfo(t.dtype).eps for t in b)
    largest = zero
    for _ in range(max_iterations):
        Av = apply(v)
        alpha = vectors.dot(v, Av)
        u = vectors.add(vectors.add(Av, v, -alpha), v_old, -beta)
        beta_next = vectors.norm(u)
        # The two earlier rotations act on the new column (β, α, β₊) of the tridiagonal matrix.
        far = s_old * beta
        near = c * c_old * beta + s * alpha
        corner = -s * c_old * beta + c * alpha
        gamma = torch.hypot(corner, beta_next)
        largest = torch.maximum(largest, gamma)
        if not bool(gamma > epsilon * largest):  # A is singular on this Krylov space
            break
        c_old, s_old, c, s = c, s, corner / gamma, beta_next / gamma
        w_new = vectors.scale(vectors.add(vectors.add(v, w, -near), w_old, -far), 1.0 / gamma)
        x = vectors.add(x, w_new, c * phi)
        phi = -s * phi
        w_old, w = w, w_new
        if not bool((phi.abs() > tolerance * start) & (beta_next > epsilon * largest)):
            break
        v_old, v, beta = v, vectors.scale(u, 1.0 / beta_next), beta_next
    return x
