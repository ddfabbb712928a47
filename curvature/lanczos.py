"""The Lanczos process with full reorthogonalisation, on flat vectors.

Legend: B symmetric (P, P), Q = [q_1 … q_m] orthonormal (m, P, a row a vector), T the tridiagonal matrix of
(α, β) with B Qᵀ = Qᵀ T + β_m q_{m+1} e_mᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors

FlatProduct = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tridiagonal:
    """What m steps of Lanczos give.

    Args:
        diagonal: α, (m,).
        off_diagonal: β_1 … β_{m-1}, (m-1,).
        last: β_m, 0-d; zero where the Krylov space closed on itself.
        basis: Q, (m, P).
    """

    diagonal: Tensor
    off_diagonal: Tensor
    last: Tensor
    basis: Tensor

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,) in ascending order and eigenvectors (m, m) of T."""
        T = torch.diag(self.diagonal) + torch.diag(self.off_diagonal, 1) + torch.diag(self.off_diagonal, -1)
        eigenvalues, eigenvectors = torch.linalg.eigh(T)
        return eigenvalues, eigenvectors

    def ritz_residuals(self, eigenvectors: Tensor) -> Tensor:
        """‖B x - θ x‖ = β_m |s_m| of every Ritz pair, (m,)."""
        return self.last * eigenvectors[-1].abs()


class Lanczos:
    """The process, to be continued step by step.

    Every new vector is made orthogonal to all earlier ones, twice ("twice is enough"), so that no spurious copies
    of converged eigenvalues appear.

    Args:
        product: flat v ↦ B v, B symmetric.
        start: the first direction, (P,), not zero.

    Cost: one product a step and O(m P) for the orthogonalisation; m P memory. References: Lanczos 1950;
    Parlett 1998, chapter 13.
    """

    def __init__(self, product: FlatProduct, start: Tensor) -> None:
        self._product = product
        self._basis = [start / vectors.norm([start])]
        self._alpha: list[Tensor] = []
        self._beta: list[Tensor] = []
        self.closed = False

    @property
    def steps(self) -> int:
        """m."""
        return len(self._alpha)

    def step(self) -> None:
        """One product; sets ``closed`` where the Krylov space is exhausted, after which there is no further step."""
        if self.closed:
            raise ValueError("the Krylov space is exhausted: there is no further Lanczos step")
        q = self._basis[-1]
        w = self._product(q)
        alpha = torch.dot(q, w)
        Q = torch.stack(self._basis)
        size = vectors.norm([w])
        for _ in range(2):
            w = w - Q.T @ (Q @ w)
        beta = vectors.norm([w])
        if not bool(torch.isfinite(beta)):
            raise ArithmeticError("a product with this curvature is not finite: no spectrum")
        self._alpha.append(alpha)
        self._beta.append(beta)
        scale = torch.stack([size, *self._beta, *(a.abs() for a in self._alpha)]).amax()
        floor = 100 * torch.finfo(beta.dtype).eps * scale
        self.closed = len(self._alpha) >= len(w) or not bool(beta > floor)
        if self.closed:
            self._beta[-1] = torch.zeros_like(beta)
        else:
            self._basis.append(w / beta)

    def restart(self, direction: Tensor) -> None:
        """Go on outside a closed Krylov space, along the part of ``direction`` that is orthogonal to it."""
        Q = torch.stack(self._basis)
        w = direction / vectors.norm([direction])
        for _ in range(2):
            w = w - Q.T @ (Q @ w)
            w = w / vectors.norm([w])
        self._basis.append(w)
        self.closed = False

    def result(self) -> Tridiagonal:
        """What the steps so far give."""
        if not self._alpha:
            raise ValueError("take at least one Lanczos step")
        m = self.steps
        off_diagonal = torch.stack(self._beta)[: m - 1]
        return Tridiagonal(
            torch.stack(self._alpha), off_diagonal, self._beta[-1], torch.stack(self._basis[:m])
        )
