"""What the check says of estimators that break a law by an exception, by writing into a vector, or only at λ = 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from curvature import EmpiricalFisherDiagonal, GaussNewton, MatrixFreeOperator, Operator, testing, vectors
from curvature.operators import DiagonalOperator
from curvature.problem import Problem
from curvature.protocols import State


def giving(operator: type[DiagonalOperator]) -> Any:
    @dataclass(frozen=True)
    class Broken(EmpiricalFisherDiagonal):
        def operator(self, state: State) -> DiagonalOperator:
            return operator([h + 1.0 for h in super().operator(state).diagonal()])

        def estimate(self, problem: Problem) -> DiagonalOperator:
            return operator([torch.ones_like(p) for p in problem.params])

    return Broken


class Crashing(DiagonalOperator):
    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        raise KeyError("weight")


class Flat(DiagonalOperator):
    def diagonal(self) -> list[Tensor]:
        return [h.reshape(-1) for h in super().diagonal()]


class Unchecked(DiagonalOperator):
    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        return [x / (h + damping) for x, h in zip(v, self.values, strict=True)]


class Doubled(DiagonalOperator):
    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__([2 * h for h in values])


class WritesProduct(Doubled):
    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [x.mul_(h) for x, h in zip(v, self.values, strict=True)]


class WritesSolution(DiagonalOperator):
    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        found = super().solve(v, damping)
        for x, y in zip(v, found, strict=True):
            x.copy_(y)
        return found


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Crashing, "matvec: ended in KeyError: 'weight'"),
        (Flat, r"diagonal: diagonal\(\) has shapes"),
        (
            Unchecked,
            "vectors: solve of a vector .* must raise ValueError, not RuntimeError: call check_vector",
        ),
        (WritesProduct, "matvec: matvec wrote into the vector"),
        (WritesSolution, "solve: solve wrote into the vector"),
    ],
)
def test_the_first_law_that_is_broken_is_named(operator: type[DiagonalOperator], message: str) -> None:
    only = {Unchecked: ["vectors"], Flat: []}.get(operator, ["diagonal", "matvec", "solve"])
    with pytest.raises(AssertionError, match=f"^{message}"):
        testing.check_estimator(giving(operator), only=only)


def test_a_least_norm_solution_of_a_singular_matrix_is_seen() -> None:
    class LeastNorm(Operator):
        def __init__(self, inner: MatrixFreeOperator) -> None:
            super().__init__(inner.like)
            self.matvec, self.inner = inner.matvec, inner  # type: ignore[method-assign]

        def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
            if damping != 0:
                return self.inner.solve(v, damping)
            return vectors.unflatten(torch.linalg.pinv(self.to_dense()) @ vectors.flatten(v), self.like)

    @dataclass(frozen=True)
    class Broken(GaussNewton):
        def estimate(self, problem: Problem) -> Any:
            return LeastNorm(super().estimate(problem))

    with pytest.raises(AssertionError, match=r"^solve: solve\(v, 0\) of a singular B must raise"):
        testing.check_estimator(Broken, only=["solve"])
    testing.check_estimator(GaussNewton, only=["solve"])
