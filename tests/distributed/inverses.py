"""Decompositions divided among ranks: who does how many, in how much memory, and that the step is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from curvature.kronecker import moments
from optimizers import SecondOrder, Shampoo, build
from optimizers.distributed import Ranks
from tests.distributed.problem import BATCH, same, train, whole

WIDTH = 8
#: Four layers of two 8 x 8 factors each: 2 or 4 ranks can share them without a rest.
FACTORS = 8


def deep() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()]
    return nn.Sequential(*layers).double()


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, WIDTH, (BATCH,), generator=generator)


def dealt(step: int) -> tuple[Tensor, Tensor]:
    x, y = data(step)
    return x[dist.get_rank() :: dist.get_world_size()], y[dist.get_rank() :: dist.get_world_size()]


class Work:
    """The 8 x 8 matrices that this process decomposed, and the bytes of what came of them."""

    def __init__(self) -> None:
        self.matrices = 0
        self.bytes = 0

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(matrix: Tensor, *args: Any, **options: Any) -> Any:
            found = function(matrix, *args, **options)
            if matrix.shape[-2:] == (WIDTH, WIDTH):
                self.matrices += matrix.numel() // WIDTH**2
                self.bytes += sum(x.numel() * x.element_size() for x in found)
            return found

        return run


@contextmanager
def counted() -> Iterator[Work]:
    # Cholesky factors are what K-FAC's factored damping, its preset's default, inverts by
    work, kept = Work(), (torch.linalg.eigh, torch.linalg.qr, torch.linalg.cholesky_ex)
    torch.linalg.eigh, torch.linalg.qr, torch.linalg.cholesky_ex = (work.watched(f) for f in kept)
    try:
        yield work
    finally:
        torch.linalg.eigh, torch.linalg.qr, torch.linalg.cholesky_ex = kept


def makes() -> dict[str, Callable[[nn.Module, Any], SecondOrder]]:
    def kronecker(kind: str) -> Callable[[nn.Module, Any], SecondOrder]:
        return lambda model, group: build(
            model,
            "kfac",
            inverse_interval=1,
            damping="fixed",
            damping_kind=kind,
            radius=1.0,
            process_group=group,
        )

    return {
        "kfac, exact damping": kronecker("exact"),
        "kfac, factored damping": kronecker("factored"),
        "shampoo": lambda model, group: Shampoo(
            model.parameters(), interval=1, eps=1e-6, process_group=group
        ),
        "soap": lambda model, group: build(model, "soap", interval=1, process_group=group),
    }


def work_falls_with_ranks(folder: Path) -> None:
    """Each rank decomposes 1/R of the factors, into 1/R of the memory, and takes the step of one process."""
    steps = 3
    for name, make in makes().items():
        expected = deep()
        with counted() as one:
            train(expected, make(expected, None), data, range(steps))
        model = deep()
        parallel = DistributedDataParallel(model)
        optimizer = make(model, "auto")
        with counted() as shared:
            train(parallel, optimizer, dealt, range(steps))
        assert one.matrices >= 2 * FACTORS, (name, one.matrices)
        assert shared.matrices * dist.get_world_size() == one.matrices, (name, shared.matrices, one.matrices)
        assert shared.bytes * dist.get_world_size() == one.bytes, (name, shared.bytes, one.bytes)
        assert not torch.equal(next(model.parameters()), next(deep().parameters()))
        try:
            same(whole(expected), whole(model), 1e-6)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def bases_stay_with_their_owners(folder: Path) -> None:
    """``inverses="owner"``: 1/R of the decompositions and of the kept bases on each of R ranks, the same steps; and
    what rank 0 saved of all goes on bit for bit. EK-FAC's moments stay with the bases that they were measured in."""
    for preset in ("kfac", "ekfac"):
        bases_stay(folder, preset)


def one_rank_that_cannot_hold_its_rows(folder: Path) -> None:
    """EK-FAC's bases are lent to all for a second look where one rank could not hold what its layers saw."""
    models = deep(), deep()
    options = {"damping": "fixed", "radius": 1.0, "inverse_interval": 2}
    reference = build(models[0], "ekfac", process_group=None, **options)
    optimizer = build(models[1], "ekfac", inverses="owner", **options)
    train(models[0], reference, data, range(5))
    parallel, kept = DistributedDataParallel(models[1]), moments.HELD
    train(parallel, optimizer, dealt, range(1))
    moments.HELD = 10 if dist.get_rank() == 0 else kept
    try:
        train(parallel, optimizer, dealt, range(1, 5))
    finally:
        moments.HELD = kept
    same(whole(models[0]), whole(models[1]), 1e-6)


def bases_are_iterated_alike(folder: Path) -> None:
    """EK-FAC's ``refresh="qr"`` divided among ranks, or left to the owners of blocks, is that of one process."""
    options = {"damping": "fixed", "radius": 1.0, "inverse_interval": 2, "refresh": "qr"}
    alone = deep()
    train(alone, build(alone, "ekfac", process_group=None, **options), data, range(5))
    for place in ("everywhere", "owner"):
        model = deep()
        optimizer = build(model, "ekfac", inverses=place, **options)
        train(DistributedDataParallel(model), optimizer, dealt, range(5))
        same(whole(alone), whole(model), 1e-6)


def bases_stay(folder: Path, preset: str) -> None:
    def make(model: nn.Module, group: Any, place: str, interval: int = 1) -> SecondOrder:
        return build(
            model,
            preset,
            inverse_interval=interval,
            damping_kind="exact",  # bases, which `state_bytes` counts; factored damping keeps inverses beside the state
            radius=1.0,
            process_group=group,
            inverses=place,
        )

    world = dist.get_world_size()
    for interval in (1, 3):
        expected = deep()
        reference = make(expected, None, "everywhere", interval)
        with counted() as one:
            radii = train(expected, reference, data, range(5))
        model = deep()
        parallel = DistributedDataParallel(model)
        optimizer = make(model, "auto", "owner", interval)
        with counted() as own:
            found = train(parallel, optimizer, dealt, range(5))
        assert found == pytest.approx(radii, rel=1e-6, nan_ok=True), (found, radii)
        same(whole(expected), whole(model), 1e-6)
        vectors = [x for k in optimizer.curvature.gathered_keys for x in reference._curvature_state[k]]  # type: ignore[attr-defined]
        everywhere = sum(x.numel() * x.element_size() for x in vectors)
        factors = reference.state_bytes() - everywhere
        assert (optimizer.state_bytes() - factors) * world == everywhere, (optimizer.state_bytes(), factors)
        if interval == 1:  # else the blocks of one step need not be as many for every rank
            assert own.matrices * world == one.matrices, (own.matrices, one.matrices)
            assert own.bytes * world == one.bytes
        wanted = reference.curvature.operator(reference._curvature_state)
        v = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double()
            for p in model.parameters()
        ]
        with Ranks((dist.group.WORLD,)).whole():
            operator = optimizer.curvature.operator(optimizer._curvature_state)
            for a, b in ((operator.matvec(v), wanted.matvec(v)), (operator.diagonal(), wanted.diagonal())):
                for x, y in zip(a, b, strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)
        try:
            operator.matvec(v)
        except RuntimeError as error:
            assert f"divided among {world} ranks" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a product that only one rank takes must be refused")
    whole_state = optimizer.gathered_state_dict()
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": whole_state}, folder / "owned.pt")
    dist.barrier()
    saved = torch.load(folder / "owned.pt", weights_only=True)
    before = next(model.parameters()).detach().clone()
    resumed: dict[str, nn.Module] = {}
    for place in ("owner", "everywhere"):
        other = deep()
        other.load_state_dict(saved["model"])
        again = make(other, "auto", place, 3)
        again.load_state_dict(saved["optimizer"])
        if place == "owner":
            assert again.state_bytes() == optimizer.state_bytes()  # each rank kept its own bases alone
        wrapped = DistributedDataParallel(other)
        # DDP sums its first gradients in the order of the parameters and later ones in that of their arrival; of more
        # than two ranks gloo's sums differ by rounding where elements lie elsewhere. A pass for nothing is the first.
        nn.functional.cross_entropy(wrapped(dealt(0)[0]), dealt(0)[1]).backward()
        train(wrapped, again, dealt, range(5, 9))
        resumed[place] = other
    train(parallel, optimizer, dealt, range(5, 9))
    assert not torch.equal(next(model.parameters()), before)
    for p, q in zip(model.parameters(), resumed["owner"].parameters(), strict=True):
        assert torch.equal(p, q), f"a resumed run went on otherwise, by {float((p - q).abs().max())}"
    same(whole(model), whole(resumed["everywhere"]), 1e-9)
    fresh = make(deep(), "auto", "owner", 3)
    with pytest.raises(ValueError, match="gathered_state_dict"):
        fresh.load_state_dict(optimizer.state_dict())


def first_gradients_of_ddp_are_summed_in_another_order(folder: Path) -> None:
    """Why a resumed run of four ranks may differ in the last bit: the first reduction goes over the parameters in their
    order, later ones in the order in which gradients arrived, and a sum of gloo depends on where an element lies."""
    model = deep()
    x, y = dealt(0)

    def gradients(module: nn.Module) -> list[Tensor]:
        module.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        return [p.grad.clone() for p in module.parameters()]  # type: ignore[union-attr]

    own = gradients(model)
    parallel = DistributedDataParallel(model)
    first, later, last = (gradients(parallel) for _ in range(3))

    def summed(tensors: list[Tensor]) -> list[Tensor]:
        joined = torch.cat([g.reshape(-1) for g in tensors]).div_(dist.get_world_size())
        dist.all_reduce(joined)
        return [x.view(WIDTH, WIDTH) for x in joined.split(WIDTH**2)]

    for found, expected in ((first, summed(own)), (later, summed(own[::-1])[::-1]), (last, later)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def failure_on_one_rank_is_heard_by_all(folder: Path) -> None:
    """A decomposition that fails on its owner raises everywhere; nobody waits for what will not come."""
    model = deep()
    optimizer = makes()["kfac, exact damping"](model, "auto")
    parallel = DistributedDataParallel(model)
    kept = torch.linalg.eigh

    def broken(matrix: Tensor) -> Any:
        raise MemoryError("no room")

    if dist.get_rank() == 1:
        torch.linalg.eigh = broken
    try:
        train(parallel, optimizer, dealt, range(1))
    except MemoryError:
        assert dist.get_rank() == 1
    except RuntimeError as error:
        assert "another rank failed" in str(error)  # noqa: PT017
        assert dist.get_rank() != 1
    else:
        raise AssertionError("a failed decomposition was not noticed")
    finally:
        torch.linalg.eigh = kept
    dist.barrier()
