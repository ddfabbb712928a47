"""What every rank runs: several checks a spawn, since starting processes is what costs."""

from __future__ import annotations

import copy
import os
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from curvature import EmpiricalFisherDiagonal, HutchinsonDiagonal
from optimizers import SOAA, AdamW, SecondOrder, build
from trust_region import FixedRadius, L2Ball, RatioRadius, RmsBox, SteihaugCG, TrustRegion

BATCH = 12


def network(width: int = 5) -> nn.Module:
    """Odd sizes: over 2 or 4 ranks the shards are uneven, and those of the last bias are empty on some."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (BATCH,), generator=generator)


def part(step: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the batch."""
    x, y = batch(step)
    return x.chunk(dist.get_world_size())[dist.get_rank()], y.chunk(dist.get_world_size())[dist.get_rank()]


def soaa(params: Any) -> SecondOrder:
    return SOAA(params, lr=2e-2, total_steps=20)


def adamw(params: Any) -> SecondOrder:
    return AdamW(params, lr=2e-2)


def hutchinson(params: Any) -> SecondOrder:
    return SecondOrder(
        params,
        lr=1e-2,
        curvature=HutchinsonDiagonal(interval=2, beta=0.9),
        trust_region=TrustRegion(region=RmsBox(), radius=FixedRadius(1.0)),
        momentum=0.9,
    )


def ball(params: Any) -> SecondOrder:
    """A trial, a rollback where it fails: the radius starts far too large."""
    return SecondOrder(
        params,
        lr=1.0,
        curvature=EmpiricalFisherDiagonal(beta=0.9),  # far too flat: steps end on the boundary
        trust_region=TrustRegion(L2Ball(), SteihaugCG(), RatioRadius(initial_radius=400.0)),
    )


def train(model: nn.Module, optimizer: SecondOrder, data: Callable[[int], Any], steps: range) -> list[float]:
    """(radius of every step); closures, so that trials are judged."""
    radii = []
    for t in steps:
        x, y = data(t)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, y)
            optimizer.backward(loss, outputs)
            return loss

        optimizer.step(closure)
        radii.append(float(optimizer.step_info.radius))
    return radii


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-9) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=tolerance, atol=tolerance)


def alone(make: Callable[[Any], SecondOrder], steps: int) -> tuple[nn.Module, list[float], SecondOrder]:
    """The same run in one process: the whole batch, nothing averaged."""
    model = network()
    optimizer = make(model.parameters())
    optimizer.process_group = None
    return model, train(model, optimizer, batch, range(steps)), optimizer


def check_ddp_equals_one_process(folder: Path) -> None:
    makes = {"soaa": soaa, "adamw": adamw, "hutchinson": hutchinson, "ball": ball}
    for name, make in makes.items():
        expected, radii, _ = alone(make, 8)
        model = network()
        parallel = DistributedDataParallel(model)
        optimizer = make(parallel.parameters())
        found = train(parallel, optimizer, part, range(8))
        assert found == pytest.approx(radii, rel=1e-7), (name, found, radii)
        same(whole(expected), whole(model))


def check_ddp_of_matrix_free_and_kronecker(folder: Path) -> None:
    for name, options in (("trust-region-newton", {}), ("hessian-free", {}), ("kfac", {"fisher": "type-2"})):
        expected = network()
        reference = build(expected, name, process_group=None, **options)
        train(expected, reference, batch, range(3))
        model = network()
        optimizer = build(model, name, **options)
        parallel = DistributedDataParallel(model)
        train(parallel, optimizer, part, range(3))
        same(whole(expected), whole(model), 1e-6)


def check_fsdp_equals_one_process(folder: Path) -> None:
    for make in (soaa, adamw, ball):
        expected, radii, _ = alone(make, 8)
        model = sharded()
        optimizer = make(model.parameters())
        found = train(model, optimizer, part, range(8))
        assert found == pytest.approx(radii, rel=1e-7), (make.__name__, found, radii)
        same(whole(expected), whole(model))
    assert min(radii) < 100.0, "no trial was rejected"
    # One group, the root's, whose parameters stay gathered after a trial's forward pass unless they are put back.
    model = sharded(layers=False)
    found = train(model, ball(model.parameters()), part, range(8))
    assert found == pytest.approx(radii, rel=1e-7), (found, radii)
    same(whole(expected), whole(model))


def check_shards_are_uneven_and_empty(folder: Path) -> None:
    sizes = [p.to_local().numel() for p in sharded().parameters()]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, sizes)
    if dist.get_world_size() == 4:
        assert any(0 in rank for rank in every), every
    assert any(len({rank[i] for rank in every}) > 1 for i in range(len(sizes))), every


def check_bad_gradient_on_one_rank_skips_all(folder: Path) -> None:
    for wrap in (DistributedDataParallel, lambda m: sharded()):
        parallel = wrap(network())
        optimizer = soaa(parallel.parameters())
        train(parallel, optimizer, part, range(2))
        before, state = whole(parallel), copy.deepcopy(float(optimizer.step_info.radius))
        x, y = part(2)
        optimizer.zero_grad()
        optimizer.backward(nn.functional.cross_entropy(parallel(x), y))
        if dist.get_rank() == 1:
            grad = next(parallel.parameters()).grad
            getattr(grad, "_local_tensor", grad).fill_(float("nan"))
        optimizer.step()
        same(whole(parallel), before, 0.0)
        assert float(optimizer.step_info.radius) == state
        assert float(optimizer.step_info.skipped_steps) == 1.0


def check_loss_must_be_given_on_every_rank(folder: Path) -> None:
    model = network()
    optimizer = soaa(DistributedDataParallel(model).parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    loss = 1.0 if dist.get_rank() == 0 else None
    try:
        optimizer.step(loss=loss)
        assert dist.get_rank() == 0, "a missing loss was not noticed"
    except RuntimeError as error:
        assert "every rank" in str(error)  # noqa: PT017
    dist.barrier()


def check_fsdp_refuses_double_backward_when_built(folder: Path) -> None:
    model = sharded()
    try:
        hutchinson(model.parameters())
    except ValueError as error:
        assert 'hvp="finite-difference"' in str(error)  # noqa: PT017
    else:
        raise AssertionError("Hessian products of sharded parameters were not refused")
    try:
        build(model, "muon")
    except ValueError as error:
        assert "shard" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a matrix method on shards was not refused")


def check_save_checkpoint(folder: Path) -> None:
    """Saved here, by 2 ranks; loaded by 1 and by 4."""
    import torch.distributed.checkpoint as dcp

    model = sharded()
    optimizer = soaa(model.parameters())
    train(model, optimizer, part, range(5))
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        dcp.save({"model": model.state_dict(), "optim": state}, checkpoint_id=folder / f"flat-{flat}")


def check_load_checkpoint(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    expected, radii, _ = alone(soaa, 8)
    for flat in (False, True):
        model = sharded()
        optimizer = soaa(model.parameters())
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = {
            "model": model.state_dict(),
            "optim": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.load(state, checkpoint_id=folder / f"flat-{flat}")
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optim"], options=options)
        found = train(model, optimizer, part, range(5, 8))
        assert found == pytest.approx(radii[5:], rel=1e-7), (flat, found, radii)
        same(whole(expected), whole(model))


def sharded(layers: bool = True) -> nn.Module:
    model = network()
    for layer in model if layers else ():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def run(rank: int, world: int, meeting: str, checks: list[str], folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    # A file, not a port: a port that was found free may be taken by another test before this one binds it.
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        for name in checks:
            try:
                globals()[name](Path(folder))
            except BaseException as error:
                raise AssertionError(f"{name} on rank {rank}: {traceback.format_exc()}") from error
        dist.barrier()  # nobody takes its connections away while another still uses them
    finally:
        dist.destroy_process_group()


def spawn(world: int, checks: list[str], folder: Path) -> None:
    meeting = folder / f"meeting-{uuid.uuid4().hex}"
    mp.spawn(run, args=(world, str(meeting), checks, str(folder)), nprocs=world, join=True)
