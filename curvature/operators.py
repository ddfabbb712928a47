"""Base class and the two simplest curvature operators.

Legend: P parameters' elements in all, ``v`` a list of tensors shaped like the parameters, ``n`` the one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import SingularCurvatureError


def check_damping(damping: float | Tensor) -> None:
    """Refuse a negative or NaN damping; one that the host cannot read without a wait is trusted."""
    if isinstance(damping, Tensor):
        if not vectors.readable(damping):
            return
        damping = float(damping)
    if not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}")


class Operator:
    """What an operator with a ``matvec`` gets for nothing: the dense matrix, its diagonal, an exact dense solve.

    Args:
        like: tensors shaped like the parameters; their values are never read.
    """

    #: Largest P for which the dense defaults below form a matrix; above it they refuse.
    dense_limit: int = 20_000
    #: Whether B is diagonal: a region then minimises exactly, elementwise.
    is_diagonal: bool = False

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.like = list(like)

    @property
    def shapes(self) -> list[torch.Size]:
        """The parameters' shapes."""
        return [x.shape for x in self.like]

    def check_vector(self, v: Sequence[Tensor]) -> None:
        """Raise a clear error unless ``v`` is shaped like the parameters."""
        if len(v) != len(self.like):
            raise ValueError(f"v must hold {len(self.like)} tensors, one a parameter, got {len(v)}")
        for i, (x, p) in enumerate(zip(v, self.like, strict=True)):
            if x.shape != p.shape:
                raise ValueError(f"v[{i}] must have shape {tuple(p.shape)}, got {tuple(x.shape)}")

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """B v."""
        raise NotImplementedError(f"{type(self).__name__} has no matvec")

    def _check_size(self, what: str) -> None:
        size = vectors.numel(self.like)
        if size > self.dense_limit:
            raise ValueError(
                f"{what} of {type(self).__name__} would form a dense {size} x {size} matrix; "
                f"it is for at most {self.dense_limit} elements: use matvec (with CG or Lanczos)"
            )

    def to_dense(self) -> Tensor:
        """B, one ``matvec`` a column: P products."""
        self._check_size("to_dense")
        flat = vectors.flatten(self.like)
        columns = []
        for i in range(flat.numel()):
            unit = torch.zeros_like(flat)
            unit[i] = 1.0
            columns.append(vectors.flatten(self.matvec(vectors.unflatten(unit, self.like))))
        return torch.stack(columns, dim=1)

    def diagonal(self) -> list[Tensor]:
        """The diagonal of the dense matrix."""
        return [d.clone() for d in vectors.unflatten(self.to_dense().diagonal(), self.like)]

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        """(B + λI)⁻¹ v through a dense factorisation: O(P³), for small problems."""
        self._check_size("solve")
        check_damping(damping)
        B = self.to_dense()
        B = B + damping * torch.eye(B.shape[0], dtype=B.dtype, device=B.device)
        return vectors.unflatten(solve_dense(B, vectors.flatten(v)), self.like)


def solve_dense(B: Tensor, v: Tensor) -> Tensor:
    """B⁻¹ v for a square B, or :class:`SingularCurvatureError` where B is singular to working precision."""
    solution: Tensor
    solution, info = torch.linalg.solve_ex(B, v)
    # LU of an exactly singular matrix may end with a pivot of the size of rounding: compare with the scale of B.
    singular_values = torch.linalg.svdvals(B)
    tolerance = B.shape[0] * torch.finfo(B.dtype).eps
    if int(info) != 0 or not bool(singular_values[-1] > tolerance * singular_values[0]):
        raise SingularCurvatureError("the damped curvature is singular; use a damping > 0 (or a larger one)")
    return solution


class DiagonalOperator(Operator):
    """B = diag(h).

    Args:
        values: h, one tensor a parameter, shaped like it; signs are kept.

    >>> op = DiagonalOperator([torch.tensor([2.0, 4.0])])
    >>> op.solve([torch.tensor([4.0, 4.0])], damping=0.0)
    [tensor([2., 1.])]
    """

    is_diagonal = True

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__(values)

    @property
    def values(self) -> list[Tensor]:
        """h."""
        return self.like

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """h v, elementwise: O(P)."""
        self.check_vector(v)
        return [h * x for h, x in zip(self.values, v, strict=True)]

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        """v / (h + λ), elementwise: O(P)."""
        self.check_vector(v)
        check_damping(damping)
        denominators = [
            h + (damping.to(h.device, h.dtype) if isinstance(damping, Tensor) else damping)
            for h in self.values
        ]
        for d in denominators:
            # On an accelerator the test would wait for the device; there 1/0 = inf shows, and the step's
            # finiteness test refuses it.
            if vectors.readable(d) and bool((d == 0).any()):
                raise SingularCurvatureError(
                    "the damped diagonal has zeros; use a damping > 0 (or a larger one)"
                )
        return [x / d for x, d in zip(v, denominators, strict=True)]

    def diagonal(self) -> list[Tensor]:
        """h itself (not a copy: read it)."""
        return self.values

    def to_dense(self) -> Tensor:
        """diag(h)."""
        self._check_size("to_dense")
        return torch.diag(vectors.flatten(self.values))


class MappedDiagonal(DiagonalOperator):
    """B = diag(φ(x)) for a function of the elements, formed where it is read: by a step in blocks, never in full.

    Args:
        base: x, one tensor a parameter; never changed.
        put: ``put(block, i, out)`` writes φ of a block of parameter i's x into ``out``.
        least: a number that no φ lies below, where one is known.

    >>> op = MappedDiagonal([torch.tensor([4.0, 9.0])], lambda x, i, out: torch.sqrt(x, out=out), least=0.0)
    >>> op.diagonal()
    [tensor([2., 3.])]
    """

    def __init__(
        self,
        base: Sequence[Tensor],
        put: Callable[[Tensor, int, Tensor], object],
        least: float | None = None,
    ) -> None:
        Operator.__init__(self, base)
        self.base = self.like
        self.put = put
        self.least = least
        self._values: list[Tensor] | None = None

    @property
    def values(self) -> list[Tensor]:
        """φ(x) in full, formed once."""
        if self._values is None:
            self._values = [torch.empty_like(x) for x in self.base]
            for i, (x, out) in enumerate(zip(self.base, self._values, strict=True)):
                self.put(x, i, out)
        return self._values


class PowerDiagonal(MappedDiagonal):
    """B = diag(max(γ x^k, ε)): Sophia's floor (k = 1), a root mean square (k = ½); native passes know the form.

    Args:
        base: x, one tensor a parameter; not negative where k is no 1.
        scales: γ > 0 of every tensor.
        power: k > 0.
        floor: ε >= 0; 0 is no floor, for an x that is not negative.

    >>> op = PowerDiagonal([torch.tensor([4.0, -9.0])], [0.5], power=1.0, floor=1.0)
    >>> op.diagonal()
    [tensor([2., 1.])]
    """

    def __init__(
        self, base: Sequence[Tensor], scales: Sequence[float | Tensor], power: float, floor: float
    ) -> None:
        self.scales, self.power, self.floor = list(scales), power, floor
        # a function of its own: a method would hold this object, and its values, until a garbage collection
        super().__init__(base, partial(_put_power, self.scales, power, floor), least=floor)


def _put_power(
    scales: Sequence[float | Tensor], power: float, floor: float, x: Tensor, i: int, out: Tensor
) -> None:
    """max(γ x^k, ε) of a block of tensor i's x."""
    scale = scales[i]
    if power != 1.0:
        torch.pow(x, power, out=out)
        if isinstance(scale, Tensor) or scale != 1.0:
            out.mul_(scale)
    else:
        torch.mul(x, scale, out=out)
    if floor != 0.0:
        out.clamp_(min=floor)


class IdentityOperator(Operator):
    """B = I: plain gradient steps.

    >>> IdentityOperator([torch.zeros(2)]).solve([torch.ones(2)], damping=1.0)
    [tensor([0.5000, 0.5000])]
    """

    is_diagonal = True

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """v."""
        self.check_vector(v)
        return list(v)

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        """v / (1 + λ)."""
        self.check_vector(v)
        check_damping(damping)
        return vectors.scale(v, 1.0 / (1.0 + damping))

    def diagonal(self) -> list[Tensor]:
        """Ones."""
        return [torch.ones_like(x, dtype=vectors.compute_dtype(x.dtype)) for x in self.like]

    def to_dense(self) -> Tensor:
        """The identity matrix."""
        self._check_size("to_dense")
        return torch.diag(vectors.flatten(self.diagonal()))
