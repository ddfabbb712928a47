"""What loops do beside the plain one: accumulation without a sync, clipping, a scaler, hybrid shards, bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from optimizers import SecondOrder, build
from tests.distributed.problem import (
    BY_DIFFERENCES,
    DIFFERENCES,
    alone,
    ball,
    batch,
    network,
    part,
    same,
    sharded,
    soaa,
    train,
    whole,
)


def accumulation_without_a_sync(folder: Path) -> None:
    """Two micro-batches, of which only the second synchronises: curvature and loss are those of the whole."""
    for name in ("soaa", "adahessian", "kfac"):
        options: dict[str, Any] = {"damping": "fixed", "radius": 1.0} if name == "kfac" else {}
        expected, model = network(), network()
        reference = build(expected, name, process_group=None, **options)
        parallel = DistributedDataParallel(model)
        optimizer = build(model, name, **options)
        for t in range(4):
            reference.zero_grad()
            optimizer.zero_grad()
            for micro in range(2):
                x, y = batch(2 * t + micro)
                outputs = expected(x)
                reference.backward(nn.functional.cross_entropy(outputs, y) / 2, outputs)
                x, y = part(2 * t + micro)
                with parallel.no_sync() if micro == 0 else torch.enable_grad():
                    outputs = parallel(x)
                    optimizer.backward(nn.functional.cross_entropy(outputs, y) / 2, outputs)
            reference.step()
            optimizer.step()
            assert float(optimizer.step_info.loss) == pytest.approx(float(reference.step_info.loss), rel=1e-9)
        try:
            same(whole(expected), whole(model), 1e-6)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        assert not torch.equal(next(model.parameters()), next(network().parameters()))


def clipping(folder: Path) -> None:
    """``clip_grad_norm_`` where everyone calls it; of shards it takes the norm over all of them."""
    wraps: list[Callable[[], nn.Module]] = [lambda: DistributedDataParallel(network()), sharded]
    for wrap in wraps:
        expected, model = network(), wrap()
        reference = soaa(expected.parameters())
        reference.process_group = None
        optimizer = soaa(model.parameters())
        for t in range(4):
            for m, o, data in ((expected, reference, batch), (model, optimizer, part)):
                x, y = data(t)
                o.zero_grad()
                o.backward(nn.functional.cross_entropy(m(x), y))
                norm = torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01)
                assert float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) > 0.01
                o.step()
            assert float(optimizer.step_info.radius) == pytest.approx(
                float(reference.step_info.radius), rel=1e-7
            )
        same(whole(expected), whole(model))


def scaler_skips_on_all_ranks(folder: Path) -> None:
    """An overflow that only one rank has seen skips the step of all, and leaves no trace."""
    model = network()
    parallel = DistributedDataParallel(model)
    optimizer = soaa(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def step(t: int, spoiled: bool) -> None:
        x, y = part(t)
        optimizer.zero_grad()
        optimizer.backward(nn.functional.cross_entropy(parallel(x), y), scaler=scaler)
        if spoiled and dist.get_rank() == 0:
            next(model.parameters()).grad[0, 0] = float("inf")  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update(2.0**8)

    step(0, False)
    step(1, False)
    before, state = whole(model), copy.deepcopy(optimizer.state_dict()["state"])
    step(2, True)
    same(whole(model), before, 0.0)
    state[0]["skipped_steps"] += 1
    for i, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            torch.testing.assert_close(value, state[i][name], rtol=0, atol=0, equal_nan=True)
    expected = network()
    reference = soaa(expected.parameters())
    reference.process_group = None
    train(expected, reference, batch, range(2))
    train(expected, reference, batch, range(3, 5))
    step(3, False)
    step(4, False)
    same(whole(expected), whole(model))


def hybrid_shards(folder: Path) -> None:
    """Two replicas of two shards each: means go over all ranks, sums of elements over the shards."""
    if dist.get_world_size() != 4:
        return

    def hybrid() -> nn.Module:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        return fully_shard(network(), mesh=mesh)

    makes: list[tuple[Callable[[Any], SecondOrder], float]] = [(soaa, 1e-9), (ball, 1e-9)]
    makes += [(make, DIFFERENCES) for make in BY_DIFFERENCES]
    for make, tolerance in makes:
        expected, radii, _ = alone(make, 6)
        model = hybrid()
        optimizer = make(model.parameters())
        found = train(model, optimizer, part, range(6))
        assert found == pytest.approx(radii, rel=max(tolerance, 1e-7), nan_ok=True), (
            make.__name__,
            found,
            radii,
        )
        same(whole(expected), whole(model), tolerance)


def shards_in_bfloat16(folder: Path) -> None:
    """FSDP2's mixed precision: forward in bfloat16, parameters, gradients and state in float32."""
    model = network().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy)
    optimizer = soaa(model.parameters())
    losses: list[float] = []
    for _ in range(15):
        x, y = part(0)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.bfloat16()).float(), y)
        optimizer.backward(loss)
        optimizer.step()
        losses.append(float(optimizer.step_info.loss))
    assert losses[-1] < losses[0]
    held = [x for entries in optimizer.state.values() for x in entries.values() if isinstance(x, Tensor)]
    assert {x.dtype for x in held} == {torch.float32}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, losses)
    assert all(other == losses for other in every)


def ways_of_ddp(folder: Path) -> None:
    """Curvature that sends vectors back before the gradient is there leaves DDP's own reductions alone: a static graph
    asks for one in the first backward pass, which a measurement must not spend."""
    for options in (
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
    ):
        for name in ("adahessian", "kfac"):
            fixed: dict[str, Any] = {"damping": "fixed", "radius": 1.0} if name == "kfac" else {}
            expected, model = network(), network()
            reference = build(expected, name, process_group=None, **fixed)
            optimizer = build(model, name, **fixed)
            train(expected, reference, batch, range(3))
            train(DistributedDataParallel(model, **options), optimizer, part, range(3))
            try:
                same(whole(expected), whole(model), 1e-6)
            except AssertionError as error:
                raise AssertionError(f"{options}, {name}: {error}") from error
