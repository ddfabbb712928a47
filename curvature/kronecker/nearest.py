"""The Kronecker product that is nearest to a sum of two: for a weight that is used with its sides exchanged too.

Legend: B = G₁ ⊗ A₁ + G₂ ⊗ A₂, all factors symmetric positive semidefinite; the nearest product in the Frobenius norm is
G ⊗ A with G = Σ α_i G_i and A = Σ β_j A_j, the leading singular pair of B rearranged (Van Loan & Pitsianis 1993). With
P_ij = ⟨G_i, G_j⟩ and Q_ij = ⟨A_i, A_j⟩, stationarity reads β = P α / αᵀPα and α ∝ Q β, so α is the Perron vector of
Q P: all entries are >= 0, so the sums are semidefinite too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(G, A) with G ⊗ A nearest to the sum of two products, in the Frobenius norm.

    Args:
        one: (G₁, A₁), (groups, m, m) and (groups, n, n).
        other: (G₂, A₂), of the same shapes.

    Returns:
        G of Frobenius norm 1 (or 0) and A, positive semidefinite where the four factors are.

    >>> eye = torch.eye(2).unsqueeze(0)
    >>> G, A = nearest_product((eye, eye), (3 * eye, eye))
    >>> torch.allclose(torch.kron(G[0], A[0]), 4 * torch.eye(4))
    True

    Cost: O(m² + n²).
    """
    (G1, r1), (G2, r2) = (_unit(G) for G, _ in (one, other))
    (A1, s1), (A2, s2) = (_unit(A) for _, A in (one, other))
    w1, w2 = (r1 * s1).squeeze((-1, -2)), (r2 * s2).squeeze((-1, -2))
    p, q = (G1 * G2).sum((-1, -2)), (A1 * A2).sum((-1, -2)) * w1 * w2
    # M = Q P, for P = [[1, p], [p, 1]] (0 in place of 1 is harmless: that product's weight is 0) and Q = [[w1², q], …].
    m11, m12 = w1.square() + q * p, w1.square() * p + q
    m21, m22 = q + w2.square() * p, q * p + w2.square()
    half = (m11 - m22) / 2
    top = (m11 + m22) / 2 + (half.square() + m12 * m21).clamp(min=0.0).sqrt()
    # Both rows of (M - λ) α = 0 give α; one of them may vanish, their sum only where M is a multiple of the identity.
    a1, a2 = (top - m22) + m12, m21 + (top - m11)
    a1, a2 = a1.clamp(min=0.0), a2.clamp(min=0.0)
    a1 = torch.where((a1 == 0) & (a2 == 0), torch.ones_like(a1), a1)
    size = (a1.square() + 2 * p * a1 * a2 + a2.square()).clamp(min=torch.finfo(p.dtype).tiny).sqrt()
    a1, a2 = a1 / size, a2 / size
    b1, b2 = (a1 + p * a2) * w1, (p * a1 + a2) * w2
    G = a1[:, None, None] * G1 + a2[:, None, None] * G2
    A = b1[:, None, None] * A1 + b2[:, None, None] * A2
    return G, A


def _unit(X: Tensor) -> tuple[Tensor, Tensor]:
    """(X / ‖X‖, ‖X‖), zeros where X = 0."""
    size = torch.linalg.matrix_norm(X, keepdim=True)
    return X / torch.where(size > 0, size, torch.ones_like(size)), size
