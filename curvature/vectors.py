"""Algebra on vectors that are lists of tensors, one a parameter: what every estimator and policy computes with.

Scalars are 0-d tensors on the device of the first tensor, float32 or wider, so that nothing here waits for
the host. Parameters may lie on several devices and have several dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Vector = Sequence[Tensor]

Reduction = Callable[[Tensor, Literal["sum", "max"]], Tensor]
"""(values, how) ↦ the values combined over all processes that hold a part of every tensor."""

_over_shards: Reduction | None = None


@contextmanager
def sharded(reduction: Reduction) -> Iterator[None]:
    """Inside, every tensor is this process's shard of a larger one, and sums over elements go over all shards.

    So a dot product, a norm or a count is the same number on every process, and code that forms its sums by
    ``dots``, ``norm``, ``completed`` and ``numel`` need not know of shards at all.

    Args:
        reduction: combines a tensor of partial results over the processes.

    >>> with sharded(lambda x, how: 2 * x):  # as if another process held the same shard
    ...     dot([torch.ones(2)], [torch.ones(2)])
    tensor(4.)
    """
    global _over_shards
    before, _over_shards = _over_shards, reduction
    try:
        yield
    finally:
        _over_shards = before


def completed(parts: Sequence[Tensor]) -> list[Tensor]:
    """Sums over the elements that are here, each 0-d, turned into sums over all elements.

    On a process that holds whole tensors this returns what it was given.
    """
    if _over_shards is None or not parts:
        return list(parts)
    first, dtype = parts[0], parts[0].dtype
    for x in parts:
        dtype = torch.promote_types(dtype, x.dtype)
    joined = _over_shards(torch.stack([x.to(first.device, dtype) for x in parts]), "sum")
    return [y.to(x.device, x.dtype) for x, y in zip(parts, joined.unbind(), strict=True)]


def any_of(flags: Sequence[Tensor]) -> Tensor:
    """Whether any of the 0-d flags is set, here or on another shard; on the first one's device."""
    first = flags[0]
    here = torch.stack([x.to(first.device) for x in flags]).any()
    return here if _over_shards is None else _over_shards(here.to(torch.float32), "max") > 0


def fraction(count: Tensor, v: Vector) -> Tensor:
    """count / (the number of elements), both over all tensors and shards, as a 0-d tensor."""
    dtype = compute_dtype(v[0].dtype)
    size = sum(x.numel() for x in v)
    if _over_shards is None:
        return count.to(dtype) / max(size, 1)
    whole, total_size = completed(
        [count.to(torch.float64), torch.full_like(count, size, dtype=torch.float64)]
    )
    return (whole / total_size.clamp(min=1.0)).to(dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which state and sums of a parameter of ``dtype`` are kept: float32 or wider.

    >>> compute_dtype(torch.bfloat16), compute_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    wide = (
        dtype == torch.float32 or dtype == torch.float64
    )  # asked for every tensor of a step: no operation for these
    return dtype if wide else torch.promote_types(dtype, torch.float32)


def epsilon(v: Vector) -> float:
    """The largest unit roundoff of the tensors' dtypes.

    >>> epsilon([torch.zeros(1), torch.zeros(1, dtype=torch.float64)]) == torch.finfo(torch.float32).eps
    True
    """
    return max(torch.finfo(x.dtype).eps for x in v)


def scalar_like(params: Vector, value: float = 0.0) -> Tensor:
    """A 0-d tensor for a scalar of the whole optimizer: first parameter's device, float32 or wider."""
    first = params[0]
    return torch.full((), value, dtype=compute_dtype(first.dtype), device=first.device)


def zeros_like(params: Vector) -> list[Tensor]:
    """Zeros shaped like ``params``, float32 or wider."""
    return [torch.zeros_like(p, dtype=compute_dtype(p.dtype), requires_grad=False) for p in params]


def numel(v: Vector) -> int:
    """The number of elements over all tensors, and all shards."""
    here = sum(x.numel() for x in v)
    if _over_shards is None or not v:
        return here
    return int(_over_shards(torch.tensor(here, device=v[0].device), "sum"))


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
    return completed([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)])


def dot(a: Vector, b: Vector) -> Tensor:
    """⟨a, b⟩ over all tensors.

    >>> dot([torch.ones(2), torch.ones(1)], [torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    tensor(6.)
    """
    return total(dots(a, b))


def norm(v: Vector) -> Tensor:
    """The Euclidean norm over all tensors.

    On a CPU no square over- or underflows: where it might, the tensors are scaled and looked at again. On an
    accelerator, where that would wait for the host, float32 holds norms from 1e-19 to 1e19.

    >>> norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    >>> norm([torch.tensor([3e-30, 4e-30])])
    tensor(5.0000e-30)
    """
    joined = _norm_of_norms(v)
    if readable(joined) and not _squares_are_safe(joined):
        joined = _scaled_norm(v, joined)
    if _over_shards is None:
        return joined
    largest = _over_shards(joined.clone(), "max")
    scaled = joined / torch.where(largest > 0, largest, 1.0)
    return largest * _over_shards(scaled.square(), "sum").sqrt()


def _norm_of_norms(v: Vector) -> Tensor:
    parts: list[Tensor] = [torch.linalg.vector_norm(x) for x in v]
    first = parts[0]
    if len(parts) == 1:
        return first
    joined: Tensor = torch.linalg.vector_norm(torch.stack([x.to(first.device, first.dtype) for x in parts]))
    return joined


def _squares_are_safe(length: Tensor) -> bool:
    """Whether squares of elements that matter to a norm of this size are neither infinite nor without digits."""
    limits = torch.finfo(length.dtype)
    return bool((limits.tiny / limits.eps) ** 0.5 < float(length.detach()) < float("inf"))


def _scaled_norm(v: Vector, plain: Tensor) -> Tensor:
    """The norm by way of the largest element; ``plain`` where that is 0, infinite or NaN."""
    largest = max(
        (float(torch.linalg.vector_norm(x.detach(), float("inf"))) for x in v if x.numel()), default=0.0
    )
    if not 0.0 < largest < float("inf"):
        return plain
    return _norm_of_norms([x / largest for x in v]) * largest


_unread = False


@contextmanager
def unread() -> Iterator[None]:
    """Inside, nothing is :func:`readable`: a step that may be captured takes the same operations on every device."""
    global _unread
    before, _unread = _unread, True
    try:
        yield
    finally:
        _unread = before


def readable(x: Tensor) -> bool:
    """Whether the host can read ``x`` now: on an accelerator it would wait, and in a graph there is no value yet."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not _unread


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

    The largest absolute value is looked at, since a sum may overflow although no element does.
    """
    if v and all(readable(x) for x in v):
        # The sum of squares is ten times as fast there, and finite only if every element is.
        if bool(torch.isfinite(total(torch._foreach_norm(list(v))))):
            return torch.ones((), dtype=torch.bool)
    parts = [torch.isfinite(torch.linalg.vector_norm(x, float("inf"))) for x in v if x.numel()]
    if not parts:
        return torch.ones((), dtype=torch.bool)
    first = parts[0]
    return torch.stack([x.to(first.device) for x in parts]).all()
