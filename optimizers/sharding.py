"""Shards of distributed tensors: what the step computes with, and what a checkpoint is given.

Legend: a *shard* is this process's part of a parameter that ``fully_shard`` spread over ranks, possibly empty. The
step works on shards, which are ordinary tensors; the optimizer's state holds distributed tensors over the same memory,
so that ``torch.distributed.checkpoint`` can save on one number of ranks and load on another.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor


def is_distributed(x: Any) -> bool:
    """Whether ``x`` is a ``DTensor``; the package that defines it is not imported for the question."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(x, package.DTensor)


def local(x: Any) -> Any:
    """This process's shard of a distributed tensor, by reference; anything else is itself."""
    # to_local() would record in autograd; the shard itself is what in-place updates must write to.
    return x._local_tensor if is_distributed(x) else x


def shards_of(params: Sequence[Any]) -> list[Any]:
    """The same of each; asked at every step, so that the question is asked once for all."""
    package = sys.modules.get("torch.distributed.tensor")
    if package is None:
        return list(params)
    kind = package.DTensor
    return [p._local_tensor if isinstance(p, kind) else p for p in params]


def spread_of(params: Sequence[Any]) -> list[Any]:
    """Those that are distributed."""
    package = sys.modules.get("torch.distributed.tensor")
    return [] if package is None else [p for p in params if isinstance(p, package.DTensor)]


def stored(p: Tensor, x: Tensor) -> Tensor:
    """``x`` as the state of ``p`` is kept: distributed like ``p`` where it has the shape of p's shard."""
    if not is_distributed(p) or x.dim() == 0 or x.shape != local(p).shape:
        return x
    from torch.distributed.tensor import DTensor

    like = cast(DTensor, p)
    return DTensor.from_local(
        x, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def stored_like(value: Tensor, loaded: Tensor) -> Tensor:
    """``loaded``, distributed as ``value`` is; a whole tensor is cut, shards are joined."""
    if not is_distributed(value):
        return cast(Any, loaded).full_tensor() if is_distributed(loaded) else loaded
    from torch.distributed.tensor import DTensor, distribute_tensor

    like = cast(DTensor, value)
    if not is_distributed(loaded):
        return distribute_tensor(loaded, like.device_mesh, like.placements, src_data_rank=None)
    return cast(DTensor, loaded).redistribute(like.device_mesh, like.placements)
