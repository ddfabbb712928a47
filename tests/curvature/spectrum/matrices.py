"""Dense symmetric matrices as operators on two parameters, with spectra of every kind."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature import MatrixFreeOperator
from curvature.vectors import flatten, unflatten


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A random matrix with these eigenvalues, float64."""
    g = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    return Q @ torch.diag(eigenvalues.double()) @ Q.T


def operator(B: Tensor) -> MatrixFreeOperator:
    like = [torch.zeros(2, 3, dtype=B.dtype), torch.zeros(len(B) - 6, dtype=B.dtype)]
    return MatrixFreeOperator(lambda v: unflatten(B @ flatten(v), like), like)


def decaying(n: int = 60) -> Tensor:
    return symmetric(torch.arange(1, n + 1).double() ** -2, seed=1)


def indefinite(n: int = 60) -> Tensor:
    return symmetric(torch.linspace(-1.0, 3.0, n), seed=2)


def low_rank(n: int = 60) -> Tensor:
    return symmetric(torch.cat([torch.tensor([4.0, 2.0, -1.0]), torch.zeros(n - 3)]), seed=3)


def flat_spectrum(n: int = 60) -> Tensor:
    return symmetric(1 + 0.1 * torch.linspace(-1, 1, n), seed=4)
