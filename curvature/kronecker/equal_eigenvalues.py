"""EK-FAC's moments where a factor has equal eigenvalues, so that they do not depend on which eigenvectors were found.

Legend: S (groups, d_out, size_in) the diagonal of a block in the basis Q_G ⊗ Q_A; λ (groups, d) a factor's eigenvalues,
ascending.

Any orthonormal basis of an eigenspace is as good as another, and rounding picks one: another split of the batch picks
another. The mean of S over the eigenspace is the same in all of them. It keeps the trace, and is no further from the
block than K-FAC's, which is constant there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def without_choice(
    S: Tensor, eigenvalues: tuple[Tensor, Tensor], bases: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """S with its mean over every eigenspace of each factor.

    Args:
        S: the moments.
        eigenvalues: of G, (groups, d_out), and of A, (groups, size_in).
        bases: (Q_G, Q_A), ``None`` for the identity, in which nothing was chosen.

    >>> S = torch.tensor([[[1.0, 3.0, 5.0]]])
    >>> without_choice(S, (torch.ones(1, 1), torch.tensor([[2.0, 2.0, 7.0]])), (None, torch.eye(3)))
    tensor([[[2., 2., 5.]]])
    """
    g, a = eigenvalues
    cancelled = (S.sum((-2, -1)) / (g.sum(-1) * a.sum(-1))).clamp(min=1.0).unsqueeze(-1)
    if bases[0] is not None:
        S = averaged(S.mT, g, cancelled).mT
    return S if bases[1] is None else averaged(S, a, cancelled)


def averaged(S: Tensor, eigenvalues: Tensor, cancelled: Tensor) -> Tensor:
    """The mean over the last axis where neighbouring eigenvalues are equal up to rounding.

    Args:
        S: (groups, …, d).
        eigenvalues: (groups, d).
        cancelled: (groups, 1), how much larger than the sum its terms were; not a number, which nothing exceeds, where
            the sum is zero.
    """
    size = eigenvalues.shape[-1]
    rounding = 1e3 * torch.finfo(eigenvalues.dtype).eps * size * cancelled
    apart = eigenvalues.diff(dim=-1) > rounding * eigenvalues[..., -1:]
    if apart.device.type == "cpu" and bool(apart.all()):
        return S
    first = torch.zeros_like(eigenvalues[..., :1], dtype=torch.long)
    space = torch.cat([first, apart.long().cumsum(-1)], -1).unsqueeze(-2).expand_as(S)
    sums = torch.zeros_like(S).scatter_add_(-1, space, S)
    counts = torch.zeros_like(S).scatter_add_(-1, space, torch.ones_like(S))
    return (sums / counts.clamp(min=1.0)).gather(-1, space)
