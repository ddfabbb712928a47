"""Test functions of any size and their standard starts, float64, for step-by-step comparisons with SciPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """A function at one size, from one start."""

    name: str
    f: Callable[[Tensor], Tensor]
    start: tuple[float, ...]

    @property
    def x0(self) -> Tensor:
        return torch.tensor(self.start, dtype=F64)

    def __str__(self) -> str:
        return f"{self.name}-{len(self.start)}d"


def rosenbrock(x: Tensor) -> Tensor:
    return (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def himmelblau(x: Tensor) -> Tensor:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def beale(x: Tensor) -> Tensor:
    powers = torch.stack([x[1], x[1] ** 2, x[1] ** 3])
    return ((torch.tensor([1.5, 2.25, 2.625], dtype=F64) - x[0] * (1 - powers)) ** 2).sum()


def wood(x: Tensor) -> Tensor:
    """Moré, Garbow & Hillstrom's number 14, once for every four variables."""
    a, b, c, d = x.reshape(-1, 4).T
    first = 100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
    return (first + 10 * (b + d - 2) ** 2 + (b - d) ** 2 / 10).sum()


def powell_singular(x: Tensor) -> Tensor:
    """Number 22: convex, with a Hessian of rank 2 in 4 at its minimum."""
    a, b, c, d = x.reshape(-1, 4).T
    return ((a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4).sum()


def broyden_tridiagonal(x: Tensor) -> Tensor:
    """Number 30."""
    zero = torch.zeros(1, dtype=F64)
    left, right = torch.cat([zero, x[:-1]]), torch.cat([x[1:], zero])
    return (((3 - 2 * x) * x - left - 2 * right + 1) ** 2).sum()


def variably_dimensioned(x: Tensor) -> Tensor:
    """Number 25: convex."""
    weight = torch.arange(1, len(x) + 1, dtype=F64)
    linear = (weight * (x - 1)).sum()
    return ((x - 1) ** 2).sum() + linear**2 + linear**4


def trigonometric(x: Tensor) -> Tensor:
    """Number 26: many minima, an indefinite Hessian on the way."""
    n = len(x)
    i = torch.arange(1, n + 1, dtype=F64)
    return ((n - torch.cos(x).sum() + i * (1 - torch.cos(x)) - torch.sin(x)) ** 2).sum()


def logistic(x: Tensor) -> Tensor:
    """Regularised logistic loss of 3 n points: strictly convex, far from quadratic."""
    n = len(x)
    generator = torch.Generator().manual_seed(n)
    A = 3.0 * torch.randn(3 * n, n, generator=generator, dtype=F64)
    y = torch.sign(torch.randn(3 * n, generator=generator, dtype=F64))
    return torch.nn.functional.softplus(-y * (A @ x)).sum() + 0.05 * (x**2).sum()


def cosh(x: Tensor) -> Tensor:
    """Σ cosh of rotated variables: strictly convex, and steep away from its minimum."""
    n = len(x)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=F64)).Q
    scale = torch.linspace(0.5, 3.0, n, dtype=F64)
    return torch.cosh(scale * (Q @ x)).sum() + 0.1 * (x**2).sum()


def cases() -> list[Case]:
    """Two to twenty-five variables; the Hessian is indefinite on the way in most."""
    listed = [
        Case("rosenbrock", rosenbrock, (-1.2, 1.0) * (n // 2) + (-1.2,) * (n % 2)) for n in (2, 4, 10, 25)
    ]
    listed += [Case("himmelblau", himmelblau, (0.0, 0.0)), Case("beale", beale, (1.0, 1.0))]
    listed += [Case("wood", wood, (-3.0, -1.0, -3.0, -1.0) * k) for k in (1, 2)]
    listed += [Case("powell-singular", powell_singular, (3.0, -1.0, 0.0, 1.0) * k) for k in (1, 6)]
    listed += [Case("broyden-tridiagonal", broyden_tridiagonal, (-1.0,) * n) for n in (2, 4, 10, 25)]
    listed += [
        Case("variably-dimensioned", variably_dimensioned, tuple(1 - i / n for i in range(1, n + 1)))
        for n in (4, 10)
    ]
    listed += [Case("trigonometric", trigonometric, (1 / n,) * n) for n in (4, 10, 25)]
    return listed


def convex_cases() -> list[Case]:
    """For methods that need a positive definite Hessian."""
    listed = [Case("powell-singular", powell_singular, (3.0, -1.0, 0.0, 1.0) * k) for k in (1, 2)]
    listed += [
        Case("variably-dimensioned", variably_dimensioned, tuple(1 - i / n for i in range(1, n + 1)))
        for n in (2, 10, 25)
    ]
    for f in (logistic, cosh):
        listed += [Case(f.__name__, f, tuple(2.0 - 3.0 * (i % 3) for i in range(n))) for n in (2, 4, 10, 25)]
    return listed
