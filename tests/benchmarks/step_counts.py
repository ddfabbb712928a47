"""What a whole training step does, counted: multiplications of matrix products, bytes, operations; the mean over an
interval.

Run: ``python -m tests.benchmarks.step_counts --json docs/results/step_cost/counts.json``. Counts do not depend on the
machine or its load, so they tell what a measured ratio is made of: the ratio of multiplications is a floor for a model
whose gradient is all products, the bytes are what is left of it on a machine whose products are fast.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import optimizers
from tests.benchmarks.curvature_cost import MODELS
from tests.benchmarks.training_steps import STEPS

PRESETS = tuple(name for name in STEPS if not name.endswith(", compiled"))
"""Native passes are no operations of PyTorch, so that they cannot be counted here."""


class Bytes(TorchDispatchMode):
    """Operations that touch memory, and the bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.bytes = 0, 0
        self.decompositions = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function is not torch.ops.aten.detach.default:
            touched = torch.utils._pytree.tree_leaves((args, kwargs, result))
            sizes = {(x.data_ptr(), x.nbytes) for x in touched if isinstance(x, Tensor)}
            self.operations += 1
            self.bytes += sum(size for _, size in sizes)
            self.decompositions += any(
                name in str(function) for name in ("linalg_qr", "linalg_eigh", "cholesky")
            )
        return result


def counted(model: str, preset: str) -> dict[str, float]:
    """The mean step of an interval, after the first one."""
    network, loss_fn, x, y = MODELS[model]()
    interval, make = STEPS[preset]
    optimizer: Any = make(network.train())

    def step() -> None:
        optimizer.zero_grad()
        outputs = network(x)
        loss = loss_fn(outputs, y)
        if isinstance(optimizer, optimizers.SecondOrder):
            optimizer.backward(loss, outputs)
        else:
            loss.backward()
        optimizer.step()

    for _ in range(interval + 1):
        step()
    with FlopCounterMode(display=False) as products:
        for _ in range(interval):
            step()
    with Bytes() as memory:
        for _ in range(interval):
            step()
    return {
        "multiplications": products.get_total_flops() / 2 / interval,
        "bytes": memory.bytes / interval,
        "operations": memory.operations / interval,
        "decompositions": memory.decompositions / interval,
    }


def main() -> None:
    """Count, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    found = {model: {preset: counted(model, preset) for preset in PRESETS} for model in MODELS}
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps({"torch": torch.__version__, "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
