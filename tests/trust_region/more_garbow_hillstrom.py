"""Classical test problems of Moré, Garbow & Hillstrom 1981, Testing unconstrained optimization software.

Every problem is Σ r_i(x)², float64, from its standard start. ``minima`` are the values that the paper lists for local
minimisers (several where there are several); numbers are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64


def count(n: int) -> Tensor:
    """1 … n."""
    return torch.arange(1, n + 1, dtype=F64)


@dataclass(frozen=True)
class Problem:
    number: int
    name: str
    residuals: Callable[[Tensor], Tensor]
    start: tuple[float, ...]
    minima: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return (self.residuals(x) ** 2).sum()

    @property
    def x0(self) -> Tensor:
        return torch.tensor(self.start, dtype=F64)


def rosenbrock(x: Tensor) -> Tensor:
    return torch.cat([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]])


def freudenstein_roth(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def powell_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]) - 1.0001])


def brown_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: Tensor) -> Tensor:
    y = torch.tensor([1.5, 2.25, 2.625], dtype=F64)
    return y - x[0] * (1 - x[1] ** count(3))


def jennrich_sampson(x: Tensor) -> Tensor:
    i = count(10)
    return 2 + 2 * i - (torch.exp(i * x[0]) + torch.exp(i * x[1]))


def helical_valley(x: Tensor) -> Tensor:
    angle = torch.atan(x[1] / x[0]) / (2 * math.pi) + torch.where(x[0] < 0, 0.5, 0.0)
    return torch.stack([10 * (x[2] - 10 * angle), 10 * (torch.sqrt(x[0] ** 2 + x[1] ** 2) - 1), x[2]])


BARD = [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]


def bard(x: Tensor) -> Tensor:
    u = count(15)
    v = 16 - u
    return torch.tensor(BARD, dtype=F64) - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


GAUSSIAN = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989]


def gaussian(x: Tensor) -> Tensor:
    t = (8 - count(15)) / 2
    y = torch.tensor(GAUSSIAN + GAUSSIAN[-2::-1], dtype=F64)
    return x[0] * torch.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


def box_three_dimensional(x: Tensor) -> Tensor:
    t = 0.1 * count(10)
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def powell_singular(x: Tensor) -> Tensor:
    a, b, c, d = x.reshape(-1, 4).T
    return torch.cat([a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2])


def wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    return torch.stack(
        [
            10 * (b - a**2),
            1 - a,
            math.sqrt(90) * (d - c**2),
            1 - c,
            math.sqrt(10) * (b + d - 2),
            (b - d) / math.sqrt(10),
        ]
    )


KOWALIK_Y = [0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246]
KOWALIK_U = [4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625]


def kowalik_osborne(x: Tensor) -> Tensor:
    y, u = torch.tensor(KOWALIK_Y, dtype=F64), torch.tensor(KOWALIK_U, dtype=F64)
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Tensor) -> Tensor:
    t = count(20) / 5
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


def biggs_exp6(x: Tensor) -> Tensor:
    t = 0.1 * count(13)
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


def watson(x: Tensor) -> Tensor:
    n = len(x)
    t = (count(29) / 29)[:, None]
    j = count(n)
    slope = ((j[1:] - 1) * x[1:] * t ** (j[1:] - 2)).sum(dim=1)
    value = (x * t ** (j - 1)).sum(dim=1)
    return torch.cat([slope - value**2 - 1, x[:1], x[1:2] - x[:1] ** 2 - 1])


def penalty_1(x: Tensor) -> Tensor:
    return torch.cat([math.sqrt(1e-5) * (x - 1), (x**2).sum()[None] - 0.25])


def penalty_2(x: Tensor) -> Tensor:
    n, a = len(x), math.sqrt(1e-5)
    i = count(n)[1:]
    y = torch.exp(i / 10) + torch.exp((i - 1) / 10)
    return torch.cat(
        [
            x[:1] - 0.2,
            a * (torch.exp(x[1:] / 10) + torch.exp(x[:-1] / 10) - y),
            a * (torch.exp(x[1:] / 10) - math.exp(-0.1)),
            ((n - count(n) + 1) * x**2).sum()[None] - 1,
        ]
    )


def variably_dimensioned(x: Tensor) -> Tensor:
    s = (count(len(x)) * (x - 1)).sum()[None]
    return torch.cat([x - 1, s, s**2])


def trigonometric(x: Tensor) -> Tensor:
    n = len(x)
    return n - torch.cos(x).sum() + count(n) * (1 - torch.cos(x)) - torch.sin(x)


def _padded(x: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros(1, dtype=F64)
    return torch.cat([zero, x[:-1]]), torch.cat([x[1:], zero])


def discrete_boundary_value(x: Tensor) -> Tensor:
    h = 1 / (len(x) + 1)
    before, after = _padded(x)
    return 2 * x - before - after + h**2 * (x + h * count(len(x)) + 1) ** 3 / 2


def broyden_tridiagonal(x: Tensor) -> Tensor:
    before, after = _padded(x)
    return (3 - 2 * x) * x - before - 2 * after + 1


def broyden_banded(x: Tensor) -> Tensor:
    n = len(x)
    i = count(n)
    gap = i[None, :] - i[:, None]
    band = ((gap >= -5) & (gap <= 1) & (gap != 0)).to(F64)
    return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))


def chebyquad(x: Tensor) -> Tensor:
    n = len(x)
    before, now, out = torch.ones_like(x), 2 * x - 1, []
    for i in range(1, n + 1):
        out.append(now.mean() + (1 / (i**2 - 1) if i % 2 == 0 else 0.0))
        before, now = now, 2 * (2 * x - 1) * now - before
    return torch.stack(out)


_ten = tuple(j / 11 for j in range(1, 11))

PROBLEMS = [
    Problem(1, "Rosenbrock", rosenbrock, (-1.2, 1.0), (0.0,)),
    Problem(2, "Freudenstein and Roth", freudenstein_roth, (0.5, -2.0), (0.0, 48.9842)),
    Problem(3, "Powell badly scaled", powell_badly_scaled, (0.0, 1.0), (0.0,)),
    Problem(4, "Brown badly scaled", brown_badly_scaled, (1.0, 1.0), (0.0,)),
    Problem(5, "Beale", beale, (1.0, 1.0), (0.0,)),
    Problem(6, "Jennrich and Sampson", jennrich_sampson, (0.3, 0.4), (124.362,)),
    Problem(7, "Helical valley", helical_valley, (-1.0, 0.0, 0.0), (0.0,)),
    Problem(8, "Bard", bard, (1.0, 1.0, 1.0), (8.21487e-3,)),
    Problem(9, "Gaussian", gaussian, (0.4, 1.0, 0.0), (1.12793e-8,)),
    Problem(12, "Box three-dimensional", box_three_dimensional, (0.0, 10.0, 20.0), (0.0,)),
    Problem(13, "Powell singular", powell_singular, (3.0, -1.0, 0.0, 1.0), (0.0,)),
    Problem(14, "Wood", wood, (-3.0, -1.0, -3.0, -1.0), (0.0,)),
    Problem(15, "Kowalik and Osborne", kowalik_osborne, (0.25, 0.39, 0.415, 0.39), (3.07505e-4,)),
    Problem(16, "Brown and Dennis", brown_dennis, (25.0, 5.0, -5.0, -1.0), (85822.2,)),
    Problem(18, "Biggs EXP6", biggs_exp6, (1.0, 2.0, 1.0, 1.0, 1.0, 1.0), (0.0, 5.65565e-3)),
    Problem(20, "Watson, n = 6", watson, (0.0,) * 6, (2.28767e-3,)),
    Problem(21, "Extended Rosenbrock, n = 10", rosenbrock, (-1.2, 1.0) * 5, (0.0,)),
    Problem(22, "Extended Powell singular, n = 8", powell_singular, (3.0, -1.0, 0.0, 1.0) * 2, (0.0,)),
    Problem(23, "Penalty I, n = 4", penalty_1, (1.0, 2.0, 3.0, 4.0), (2.24997e-5,)),
    Problem(24, "Penalty II, n = 4", penalty_2, (0.5,) * 4, (9.37629e-6,)),
    Problem(
        25,
        "Variably dimensioned, n = 10",
        variably_dimensioned,
        tuple(1 - j / 10 for j in range(1, 11)),
        (0.0,),
    ),
    Problem(26, "Trigonometric, n = 10", trigonometric, (0.1,) * 10, (0.0, 2.79506e-5)),
    Problem(
        28,
        "Discrete boundary value, n = 10",
        discrete_boundary_value,
        tuple(t * (t - 1) for t in _ten),
        (0.0,),
    ),
    Problem(30, "Broyden tridiagonal, n = 10", broyden_tridiagonal, (-1.0,) * 10, (0.0,)),
    Problem(31, "Broyden banded, n = 10", broyden_banded, (-1.0,) * 10, (0.0,)),
    Problem(35, "Chebyquad, n = 8", chebyquad, tuple(j / 9 for j in range(1, 9)), (3.51687e-3,)),
]
