"""A curvature operator on flat vectors, and the random vectors that are put to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.probes import generator
from curvature.protocols import CurvatureOperator


@dataclass(frozen=True)
class Estimated:
    """A random estimate with its standard error.

    Args:
        value: the estimate, 0-d.
        standard_error: the estimated standard deviation of ``value``, 0-d; NaN where one sample cannot tell.
        products: products with B that it took.
    """

    value: Tensor
    standard_error: Tensor
    products: int


class FlatOperator:
    """B on flat vectors, on the first parameter's device and in the widest dtype of the parameters.

    Args:
        operator: B.
        like: tensors shaped like the parameters, where the operator does not know them (``operator.like``).
    """

    def __init__(self, operator: CurvatureOperator, like: Sequence[Tensor] | None = None) -> None:
        found = getattr(operator, "like", None) if like is None else like
        if found is None:
            raise ValueError(
                f"{type(operator).__name__} does not tell its shapes: pass like=, the parameters"
            )
        self._operator = operator
        self._like: list[Tensor] = list(found)
        self.size = vectors.numel(self._like)
        self.device = self._like[0].device
        self.dtype = torch.float32
        for p in self._like:
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        self.products = 0

    def __call__(self, x: Tensor) -> Tensor:
        """B x, (P,).

        Raises:
            ArithmeticError: where it is not finite.
        """
        self.products += 1
        product = self.flatten(self._operator.matvec(self.unflatten(x)))
        if not bool(vectors.all_finite([product])):
            raise ArithmeticError("a product with this curvature is not finite: no spectrum")
        return product

    def columns(self, X: Tensor) -> Tensor:
        """B X, (P, k), a product a column."""
        return torch.stack([self(x) for x in X.unbind(1)], dim=1)

    def flatten(self, v: Sequence[Tensor]) -> Tensor:
        """One flat vector."""
        return vectors.flatten([x.to(self.device, self.dtype) for x in v])

    def unflatten(self, x: Tensor) -> list[Tensor]:
        """Tensors on the parameters' devices, shaped like them."""
        pieces = vectors.unflatten(x, self._like)
        return [
            piece.to(p.device, vectors.compute_dtype(p.dtype))
            for piece, p in zip(pieces, self._like, strict=True)
        ]

    def signs(self, count: int, seed: int) -> Tensor:
        """Rademacher vectors, (P, count)."""
        bits = torch.randint(
            0,
            2,
            (count, self.size),
            generator=generator(seed, 0, self.device),
            device=self.device,
            dtype=torch.int8,
        )
        return bits.to(self.dtype).mul_(2).sub_(1).T

    def normals(self, count: int, seed: int) -> Tensor:
        """Gaussian vectors, (P, count)."""
        return torch.randn(
            (count, self.size),
            generator=generator(seed, 0, self.device),
            device=self.device,
            dtype=self.dtype,
        ).T


def check_products(products: int, least: int) -> None:
    """Refuse a budget that a method cannot work with."""
    if isinstance(products, bool) or not isinstance(products, int):
        raise ValueError(f"products must be a whole number, got {products!r}")
    if products < least:
        raise ValueError(f"products must be >= {least}, got {products}")
