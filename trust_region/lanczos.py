"""The Lanczos process: an orthonormal basis of the Krylov space of B and g, in which B is tridiagonal.

Legend: Q = [q₁ … q_k] the basis, q₁ = g/‖g‖, T = QᵀBQ with diagonal α and off-diagonal β.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator


class Lanczos:
    """One basis vector an :meth:`extend`, kept orthogonal by a second Gram-Schmidt pass.

    Args:
        curvature: B.
        gradient: g, not 0.

    Cost: a product and O(kP) for vector k; memory k P.
    """

    def __init__(self, curvature: CurvatureOperator, gradient: Sequence[Tensor]) -> None:
        self.curvature = curvature
        self.norm = float(vectors.norm(gradient))
        self.basis: list[list[Tensor]] = [vectors.scale(gradient, 1 / self.norm)]
        self.alpha: list[float] = []
        self.beta: list[float] = []
        #: whether a product was not finite; the process ended there.
        self.broken = False
        #: whether the Krylov space is invariant: B maps it into itself, and it has nothing more to give.
        self.invariant = False

    @property
    def size(self) -> int:
        """k, vectors for which B q is known."""
        return len(self.alpha)

    def extend(self) -> bool:
        """One more product; False where it was not finite."""
        q = self.basis[-1]
        w = vectors.copy(self.curvature.matvec(q))
        alpha = float(vectors.dot(q, w))
        if not math.isfinite(alpha):
            self.broken = True
            return False
        scale = float(vectors.norm(w))
        for _ in range(2):
            for v in self.basis:
                torch._foreach_sub_(w, vectors.scale(v, vectors.dot(v, w)))
        beta = float(vectors.norm(w))
        if not math.isfinite(beta):
            self.broken = True
            return False
        self.alpha.append(alpha)
        eps = torch.finfo(w[0].dtype).eps
        if beta <= 10 * eps * max(scale, max(abs(a) for a in self.alpha)) or self.size >= vectors.numel(q):
            self.invariant = True
            beta = 0.0
        else:
            self.basis.append(vectors.scale(w, 1 / beta))
        self.beta.append(beta)
        return True

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues h and eigenvectors V of T, and the gradient ‖g‖ Vᵀe₁ in that basis, float64 on the host."""
        T = torch.diag(torch.tensor(self.alpha, dtype=torch.float64))
        if self.size > 1:
            off = torch.diag(torch.tensor(self.beta[: self.size - 1], dtype=torch.float64), 1)
            T = T + off + off.T
        h, V = torch.linalg.eigh(T)
        return h, V, self.norm * V[0]

    def combine(self, y: Tensor) -> list[Tensor]:
        """Q y."""
        out = vectors.scale(self.basis[0], float(y[0]))
        for q, c in zip(self.basis[1:], y[1:].tolist(), strict=False):
            torch._foreach_add_(out, q, alpha=c)
        return out

    def product(self, y: Tensor) -> list[Tensor]:
        """B Q y = Q T y + β_k y_k q_{k+1}, without another product."""
        T_y = torch.tensor(self.alpha, dtype=y.dtype) * y
        if self.size > 1:
            off = torch.tensor(self.beta[: self.size - 1], dtype=y.dtype)
            T_y[:-1] += off * y[1:]
            T_y[1:] += off * y[:-1]
        if not self.invariant:
            T_y = torch.cat([T_y, self.beta[-1] * y[-1:]])
        return self.combine(T_y)
