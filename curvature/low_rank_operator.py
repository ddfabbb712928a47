"""B = γI + U diag(μ) Uᵀ with orthonormal U: the operator of low-rank and limited-memory curvature.

Legend: P parameters' elements, r the rank, U (P, r) kept as one tensor (r, *shape) a parameter, μ (r,), γ 0-d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature import vectors
from curvature.operators import Operator, check_damping
from curvature.protocols import SingularCurvatureError


class LowRankOperator(Operator):
    """B = γI + Σ_j μ_j u_j u_jᵀ, of any signs.

    Args:
        basis: u, one tensor (r, *shape) a parameter; the r vectors over all parameters are orthonormal.
        change: μ, (r,), on the first parameter's device: the eigenvalues of B are γ + μ, and γ.
        shift: γ, 0-d; without it 0, so that B has rank r.

    >>> basis = [torch.tensor([[1.0, 0.0, 0.0]])]
    >>> B = LowRankOperator(basis, torch.tensor([3.0]), torch.tensor(1.0))
    >>> B.matvec([torch.ones(3)]), B.solve([torch.ones(3)], damping=1.0)
    ([tensor([4., 1., 1.])], [tensor([0.2000, 0.5000, 0.5000])])

    Cost: O(r P) for each of matvec, solve and diagonal.
    """

    def __init__(self, basis: Sequence[Tensor], change: Tensor, shift: Tensor | None = None) -> None:
        super().__init__([u.new_empty(()).expand(u.shape[1:]) for u in basis])
        self.basis = list(basis)
        self.change = change
        self.shift = torch.zeros((), dtype=change.dtype, device=change.device) if shift is None else shift

    def coefficients(self, v: Sequence[Tensor]) -> Tensor:
        """Uᵀ v, (r,), on the device of μ."""
        parts = [
            (u.reshape(len(u), -1) @ x.to(u.dtype).reshape(-1)).to(self.change.device)
            for u, x in zip(self.basis, v, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def combine(self, v: Sequence[Tensor], factor: Tensor, weights: Tensor) -> list[Tensor]:
        """factor · v + U weights."""
        return [
            x.to(u.dtype) * factor.to(u.device, u.dtype)
            + (weights.to(u.device, u.dtype) @ u.reshape(len(u), -1)).reshape(x.shape)
            for u, x in zip(self.basis, v, strict=True)
        ]

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """γ v + U (μ ⊙ Uᵀ v)."""
        self.check_vector(v)
        return self.combine(v, self.shift, self.change * self.coefficients(v))

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        """((γ+λ)I + U diag(μ) Uᵀ)⁻¹ v, exactly: 1/(γ+λ+μ_j) along u_j and 1/(γ+λ) across.

        Raises:
            curvature.SingularCurvatureError: where one of these is a division by zero, on a CPU.
        """
        self.check_vector(v)
        check_damping(damping)
        outside = self.shift + damping
        inside = outside + self.change
        rank = len(self.change)
        if inside.device.type == "cpu":
            whole = rank >= vectors.numel(self.like)  # then there is nothing across
            used = inside if whole else torch.cat([inside, outside.reshape(1)])
            scale = torch.maximum(used.abs().amax(), self.shift.abs())
            if not bool((used.abs() > torch.finfo(used.dtype).eps * scale).all()):
                raise SingularCurvatureError(
                    f"the damped curvature of rank {rank} is singular; use a damping > 0 (or a larger one)"
                )
        across = torch.where(outside == 0, torch.ones_like(outside), outside)
        coefficients = self.coefficients(v)
        return self.combine(v, 1.0 / across, coefficients / inside - coefficients / across)

    def diagonal(self) -> list[Tensor]:
        """γ + Σ_j μ_j u_j²."""
        return [
            self.shift.to(u.device, u.dtype)
            + torch.tensordot(self.change.to(u.device, u.dtype), u.square(), dims=1)
            for u in self.basis
        ]

    def to_dense(self) -> Tensor:
        """γI + U diag(μ) Uᵀ."""
        self._check_size("to_dense")
        U = flat_rows(self.basis)
        return self.shift * torch.eye(U.shape[1], dtype=U.dtype, device=U.device) + U.T @ (
            self.change[:, None] * U
        )


def flat_rows(rows: Sequence[Tensor]) -> Tensor:
    """Tensors (r, *shape) as one matrix (r, P), on the device of the first, in the widest dtype."""
    device, dtype = rows[0].device, rows[0].dtype
    for x in rows:
        dtype = torch.promote_types(dtype, x.dtype)
    return torch.cat([x.reshape(len(x), -1).to(device, dtype) for x in rows], dim=1)


def split_rows(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`flat_rows`, for parameters ``like``: tensors (r, *shape) on their devices."""
    pieces = flat.split([x.numel() for x in like], dim=1)
    return [
        piece.reshape(len(flat), *x.shape).to(x.device, vectors.compute_dtype(x.dtype))
        for piece, x in zip(pieces, like, strict=True)
    ]
