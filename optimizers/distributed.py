"""Many processes, one step: losses and statistics averaged over ranks, sums completed over shards.

Legend: a *rank* is one process of a ``torch.distributed`` group; data-parallel ranks see different batches, and the
loss that is minimised is the mean of theirs. Gradients are averaged by DDP or FSDP2; everything else that decides a
step is averaged here, **before** it decides, so that every rank takes the same step:

- the loss, and whether all gradients are finite (one small all-reduce a step);
- statistics, which are additive in the loss, on the steps that measure; products of curvature that has only products;
- with sharded parameters (FSDP2), the sums over elements in every dot product, norm and count.

Eigendecompositions of factors that every rank holds alike are divided among the ranks (``curvature.shared_work``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, distributed

from curvature import probes, symmetric_half, vectors
from curvature.matrix_free.estimator import MatrixFreeEstimator
from curvature.matrix_free.operator import MatrixFreeOperator
from curvature.protocols import CurvatureEstimator, CurvatureOperator, Needs, Statistics
from curvature.shared_work import divided_among
from optimizers.checks import signal_names
from optimizers.sharding import local, spread_of, stored_like
from trust_region import SteihaugCG

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

    from trust_region import TrustRegion


@dataclass(frozen=True)
class Ranks:
    """The processes that share a step.

    Args:
        groups: those over which a mean goes, one after another (one group; with hybrid sharding one a mesh dimension).
        shards: those over which every parameter is spread, or ``None``.
        spread: the parameters that are, which know how each of them is cut.
    """

    groups: tuple[ProcessGroup, ...] = ()
    shards: ProcessGroup | None = None
    spread: tuple[Tensor, ...] = ()

    @property
    def size(self) -> int:
        """The number of data-parallel ranks."""
        size = 1
        for group in self.groups:
            size *= group.size()
        return size

    def sum_(self, x: Tensor) -> Tensor:
        """Σ over ranks, in place."""
        for group in self.groups:
            distributed.all_reduce(x, group=group)
        return x

    def mean_(self, x: Tensor) -> Tensor:
        """The mean over ranks, in place."""
        return self.sum_(x).div_(self.size) if self.groups else x

    def agree(self, loss: Tensor | None, finite: Tensor) -> tuple[Tensor | None, Tensor]:
        """The mean loss, and whether every rank's gradient is finite: the same on all ranks.

        Raises:
            RuntimeError: on a rank that was given no loss while others were.
        """
        if not self.groups:
            return loss, finite
        # The same dtype whatever the loss's is, and whether there is one: ranks must agree on what they reduce.
        dtype = torch.float32 if finite.device.type == "mps" else torch.float64
        # Σ loss, ranks that have one, ranks whose gradient is not finite
        given = torch.zeros(3, dtype=dtype, device=finite.device)
        if loss is not None:
            given[0], given[1] = loss, 1.0
        given[2] = ~finite
        total, count, failed = self.sum_(given).unbind()
        if loss is not None:
            return (total / count).to(vectors.compute_dtype(loss.dtype)), failed == 0
        if bool(count > 0):
            raise RuntimeError("some ranks gave the step a loss and this one none: give it on every rank")
        return None, failed == 0

    def all(self, flag: Tensor) -> bool:
        """Whether the flag, 0-d bool, is set on every rank: the same answer on all."""
        if not self.groups:
            return bool(flag)
        return bool(self.sum_((~flag).to(torch.float32)) == 0)

    def mean_statistics_(self, statistics: Statistics, symmetric: Sequence[str] = ()) -> None:
        """Average statistics over ranks, in place, one all-reduce a dtype and device.

        Args:
            statistics: of this rank.
            symmetric: names of those whose matrices, (groups, n, n), are symmetric: half of them is sent.
        """
        if not self.groups:
            return
        tensors: list[Tensor] = []
        halves: list[Tensor] = []
        for key, value in statistics.items():
            for x in value if isinstance(value, list) else [value]:
                (halves if key in symmetric and x.dim() == 3 else tensors).append(x)
        packed = [symmetric_half.packed(x) for x in halves if x.numel()]
        self.mean_all_([*tensors, *packed])
        for x, half in zip([x for x in halves if x.numel()], packed, strict=True):
            symmetric_half.unpack_(half, x)

    def mean_all_(self, tensors: Sequence[Tensor]) -> None:
        """Average every tensor over ranks, in place."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for x in tensors:
            if x.numel():
                kinds.setdefault((x.dtype, x.device), []).append(x)
        for members in kinds.values():
            joined = self.mean_(torch.cat([x.reshape(-1) for x in members]))
            for x, piece in zip(members, joined.split([x.numel() for x in members]), strict=True):
                x.copy_(piece.view_as(x))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, sums over elements go over all shards, and work that all ranks could do is divided among them.

        A random probe of shards is drawn whole, so that it is the one that a single process draws.
        """
        if self.shards is None:
            with self.dividing():
                yield
            return
        with vectors.sharded(self._combine), probes.drawn_whole(self._cut):
            yield

    def _cut(self, i: int, shard: Tensor, draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
        p = self.spread[i]
        if local(p).shape != shard.shape:
            raise ValueError(
                f"a probe of shards must follow the parameters: tensor {i} has shape {tuple(shard.shape)}, the shard "
                f"of the parameter {tuple(local(p).shape)}"
            )
        return cast(Tensor, local(stored_like(p, draw(p.shape))))

    @contextmanager
    def dividing(self) -> Iterator[None]:
        """Inside, decompositions of factors that all ranks hold are divided among them."""
        whole_tensors = self.shards is None and len(self.groups) == 1
        with divided_among(GroupTeam(self.groups[0]) if whole_tensors else None):
            yield

    def _combine(self, x: Tensor, how: Literal["sum", "max"]) -> Tensor:
        op = distributed.ReduceOp.SUM if how == "sum" else distributed.ReduceOp.MAX
        distributed.all_reduce(x, op=op, group=self.shards)
        return x


@dataclass(frozen=True)
class GroupTeam:
    """A process group as :mod:`curvature.shared_work` sees it."""

    group: ProcessGroup

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return distributed.get_rank(self.group)

    @property
    def size(self) -> int:
        """The processes of the group."""
        return self.group.size()

    def broadcast_(self, x: Tensor, source: int) -> None:
        """Overwrite ``x`` by that of process ``source`` of the group."""
        distributed.broadcast(x, group=self.group, group_src=source)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any process of the group sets the flag."""
        flags = torch.tensor(float(flag), device=device)
        distributed.all_reduce(flags, group=self.group)
        return bool(flags > 0)

    def sum_(self, x: Tensor) -> Tensor:
        """Σ over the group, in place."""
        distributed.all_reduce(x, group=self.group)
        return x


ALONE = Ranks()
"""One process."""


def find_ranks(params: Sequence[Tensor], process_group: ProcessGroup | Literal["auto"] | None) -> Ranks:
    """The ranks that share a step of ``params``.

    Args:
        params: the optimizer's parameters; distributed ones tell their mesh.
        process_group: data-parallel ranks of parameters that are not distributed; ``"auto"`` is the default group
            where ``torch.distributed`` is initialised, ``None`` averages over nobody.

    Raises:
        ValueError: for parameters that are sharded in more than one way.
    """
    spread = spread_of(params)
    if spread:
        return _mesh_ranks(spread, len(params))
    if process_group is None or not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    group = distributed.group.WORLD if process_group == "auto" else process_group
    if group is None or group.size() == 1:
        return ALONE
    return Ranks((group,))


def _mesh_ranks(spread: Sequence[Any], total: int) -> Ranks:
    first: DTensor = spread[0]
    mesh = first.device_mesh
    if len(spread) != total:
        raise ValueError(
            f"{total - len(spread)} of {total} parameters are not distributed while the others are: apply fully_shard "
            "to the whole model, or give each kind an optimizer of its own"
        )
    dims: set[int] = set()
    for p in spread:
        if p.device_mesh != mesh:
            raise ValueError(
                "parameters must lie on one device mesh; give every mesh an optimizer of its own"
            )
        cut = [i for i, placement in enumerate(p.placements) if placement.is_shard()]
        if len(cut) > 1 or any(placement.is_partial() for placement in p.placements):
            raise ValueError(
                f"a parameter is placed as {p.placements}: sharding over one mesh dimension (fully_shard) is "
                "supported, tensor parallelism is not"
            )
        dims.update(cut)
    if len(dims) != 1 or any(not any(x.is_shard() for x in p.placements) for p in spread):
        raise ValueError("all parameters must be sharded over the same mesh dimension, as fully_shard does")
    groups = tuple(mesh.get_group(i) for i in range(mesh.ndim))
    return Ranks(groups, mesh.get_group(dims.pop()), tuple(spread))


def check_shardable(ranks: Ranks, curvature: CurvatureEstimator, trust_region: TrustRegion) -> None:
    """Refuse, when the optimizer is built, parts that cannot work on shards.

    A part says that it can by ``shardable = True``: it works element by element, and forms its sums by
    :mod:`curvature.vectors`.
    """
    if ranks.shards is None:
        return
    name = type(curvature).__name__
    if Needs.HVP in curvature.needs:
        raise ValueError(
            f"{name} needs {signal_names(curvature.needs.graph)}, and fully_shard has no double backward: use "
            'hvp="finite-difference" (Hessian products from two gradients, in the closure loop), or DDP'
        )
    if curvature.needs.graph:
        raise ValueError(
            f"{name} needs {signal_names(curvature.needs.graph)}, which parameters sharded by fully_shard cannot give: "
            'use DDP, curvature that needs only gradients, or the Hessian with hvp="finite-difference" (products from '
            "two gradients, in the closure loop)"
        )
    solver = trust_region.subproblem if trust_region.subproblem is not None else trust_region.region
    if isinstance(curvature, MatrixFreeEstimator) and not isinstance(solver, SteihaugCG):
        raise ValueError(
            f"{type(solver).__name__} asks more of {name} than products, which is all that shards of it have: use "
            'SteihaugCG, or HutchinsonDiagonal(hvp="finite-difference")'
        )
    if getattr(curvature, "spatial_average", False) and any(
        placement.is_shard() and placement.dim > 1
        for p in cast("tuple[Any, ...]", ranks.spread)
        for placement in p.placements
    ):
        raise ValueError(
            f"{name} averages over convolution kernels, and a parameter is cut through them: use "
            "spatial_average=False, or shard along the first dimension"
        )
    parts = (curvature, solver, trust_region.radius)  # beside a solver the region only names the shape
    for part in parts:
        if not getattr(part, "shardable", False):
            raise ValueError(
                f"{type(part).__name__} works on whole tensors, and the parameters are sharded by fully_shard: use "
                "DDP, or a part that says shardable = True"
            )


def over_ranks(operator: CurvatureOperator, like: Sequence[Tensor], ranks: Ranks) -> CurvatureOperator:
    """The mean over ranks of an operator that each rank knows only by products with its own batch's graph."""
    if not ranks.groups:
        return operator

    def product(v: Sequence[Tensor]) -> list[Tensor]:
        own = [x.clone() for x in operator.matvec(v)]
        ranks.mean_all_(own)
        return own

    return MatrixFreeOperator(product, like)
