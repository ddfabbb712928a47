"""Checks that each of several ranks runs, for :mod:`tests.integrations.test_trainers`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from optimizers import build
from optimizers.integrations import AccelerateHook
from tests.distributed.problem import batch, network, part, same, whole


def accelerate_equals_one_process(folder: Path) -> None:
    """Accelerate's own DDP and accumulation over two micro-batches; curvature that needs the graph, and outputs."""
    import accelerate

    rank, world = dist.get_rank(), dist.get_world_size()
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in found.items()})
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == world
    for name in ("soaa", "adahessian", "kfac"):
        options = {"damping": "fixed", "radius": 1.0, "fisher": "type-2"} if name == "kfac" else {}
        expected = network()
        reference = build(expected, name, process_group=None, **options)
        own = network()
        model, optimizer = accelerator.prepare(own, build(own, name, **options))
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        hook = AccelerateHook(accelerator, optimizer, model)
        for t in range(6):
            if t % 2 == 0:
                reference.zero_grad()
            x, y = batch(t)
            outputs = expected(x)
            reference.backward(nn.functional.cross_entropy(outputs, y) / 2, outputs)
            if t % 2 == 1:
                reference.step()
            x, y = part(t)
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        hook.remove()
        info = optimizer.optimizer.step_info
        assert float(info.loss) == pytest.approx(float(reference.step_info.loss), rel=1e-9), name
        assert not any(p.equal(q) for p, q in zip(own.parameters(), network().parameters(), strict=True))
        same(whole(expected), whole(own), 1e-6)
