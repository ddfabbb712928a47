"""Algebra on vectors that are lists of tensors, one a parameter: what every estimator and policy computes with.

Scalars are 0-d tensors on the device of the first tensor, float32 or wider, so that nothing here waits for
the host. Parameters may lie on several devices and have several dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Vector = Sequence[Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which state and sums of a parameter of ``dtype`` are kept: float32 or wider.

    >>> compute_dtype(torch.bfloat16), compute_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def scalar_like(params: Vector, value: float = 0.0) -> Tensor:
    """A 0-d tensor for a scalar of the whole optimizer: first parameter's device, float32 or wider."""
    first = params[0]
    return torch.full((), value, dtype=compute_dtype(first.dtype), device=first.device)


def zeros_like(params: Vector) -> list[Tensor]:
    """Zeros shaped like ``params``, float32 or wider."""
    return [torch.zeros_like(p, dtype=compute_dtype(p.dtype), requires_grad=False) for p in params]


def numel(v: Vector) -> int:
    """The number of elements over all tensors."""
    return sum(x.numel() for x in v)


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of 0-d tensors, on the device and at least in the precision of the first."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if all(x.device == first.device and x.dtype == first.dtype for x in parts):
        return torch.stack(list(parts)).sum()
    dtype = first.dtype
    for x in parts:
        dtype = torch.promote_types(dtype, x.dtype)
    return torch.stack([x.to(first.device, dtype) for x in parts]).sum()


def dots(a: Vector, b: Vector) -> list[Tensor]:
    """⟨a_i, b_i⟩ for every tensor, each a 0-d tensor."""
    return [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]


def dot(a: Vector, b: Vector) -> Tensor:
    """⟨a, b⟩ over all tensors.

    >>> dot([torch.ones(2), torch.ones(1)], [torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    tensor(6.)
    """
    return total(dots(a, b))


def norm(v: Vector) -> Tensor:
    """The Euclidean norm over all tensors, formed without overflow of the squares.

    >>> norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    """
    parts: list[Tensor] = [torch.linalg.vector_norm(x) for x in v]
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    joined: Tensor = torch.linalg.vector_norm(torch.stack([x.to(first.device, first.dtype) for x in parts]))
    return joined


def on(device: torch.device, *scalars: Tensor) -> list[Tensor]:
    """0-d tensors on ``device``; free where they already are."""
    return [s.to(device) for s in scalars]


def scale(v: Vector, factor: float | Tensor) -> list[Tensor]:
    """factor · v."""
    if isinstance(factor, Tensor):
        return [x * factor.to(x.device, x.dtype) for x in v]
    return [x * factor for x in v]


def add(a: Vector, b: Vector, factor: float | Tensor = 1.0) -> list[Tensor]:
    """a + factor · b."""
    if isinstance(factor, Tensor):
        return [x + y * factor.to(x.device, x.dtype) for x, y in zip(a, b, strict=True)]
    return [torch.add(x, y, alpha=factor) for x, y in zip(a, b, strict=True)]


def negative(v: Vector) -> list[Tensor]:
    """-v."""
    return [-x for x in v]


def copy(v: Vector) -> list[Tensor]:
    """A copy of every tensor, detached."""
    return [x.detach().clone() for x in v]


def flatten(v: Vector) -> Tensor:
    """One flat vector, in order and C order within each tensor.

    >>> flatten([torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])])
    tensor([1., 2., 3.])
    """
    return torch.cat([x.reshape(-1) for x in v])


def unflatten(flat: Tensor, like: Vector) -> list[Tensor]:
    """The inverse of :func:`flatten`: pieces of ``flat`` shaped like ``like``.

    >>> unflatten(torch.arange(3.0), [torch.zeros(1, 2), torch.zeros(1)])
    [tensor([[0., 1.]]), tensor([2.])]
    """
    if flat.numel() != numel(like):
        raise ValueError(f"flat must have {numel(like)} elements, as many as the tensors, got {flat.numel()}")
    pieces = torch.split(flat, [x.numel() for x in like])
    return [piece.reshape(x.shape) for piece, x in zip(pieces, like, strict=True)]


def all_finite(v: Vector) -> Tensor:
    """Whether every element is finite, as a 0-d bool tensor; one pass, no temporaries of full size.

    A sum of absolute values is finite only if every element is, and a sum that overflows although no element
    does is looked at again elementwise by the caller's choice: here it counts as not finite only if an element
    is, so the maximum norm is used, which cannot overflow.
    """
    parts = [torch.isfinite(torch.linalg.vector_norm(x, float("inf"))) for x in v if x.numel()]
    if not parts:
        return torch.ones((), dtype=torch.bool)
    first = parts[0]
    return torch.stack([x.to(first.device) for x in parts]).all()
