"""What a rank keeps and does of K-FAC's inverses, of 1, 2 and 4: ``python -m tests.benchmarks.inverses [OUT.json]``.

Counts and bytes do not depend on the machine; seconds are those of the decompositions on the busiest rank, one thread
each, and mean something only where every rank has a core of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from optimizers import build
from tests.distributed.processes import spawn

WIDTHS = (784, 512, 512, 512, 512, 256, 10)
BATCH = 256
STEPS = 4
PLACES = ("everywhere", "owner")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Watched:
    """``torch.linalg.eigh`` with a count, the cubes of the sizes, and a clock."""

    def __init__(self) -> None:
        self.matrices, self.cubes, self.seconds, self.kept = 0, 0.0, 0.0, torch.linalg.eigh

    def __call__(self, matrix: Tensor, *args: Any) -> Any:
        begin = time.perf_counter()
        found = self.kept(matrix, *args)
        self.seconds += time.perf_counter() - begin
        n = matrix.shape[-1]
        self.matrices += matrix.numel() // n**2
        self.cubes += matrix.numel() * float(n)
        return found


def measure(place: str) -> dict[str, float]:
    """One rank's part of a few steps in which all bases are refreshed."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = network()
    parallel = DistributedDataParallel(model) if world > 1 else model
    optimizer = build(
        model,
        "kfac",
        inverse_interval=1,
        damping="fixed",
        fisher="empirical",
        likelihood="categorical",
        inverses=place,
    )
    watch = Watched()
    torch.linalg.eigh = watch
    try:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(BATCH, WIDTHS[0], generator=generator)[rank::world]
            y = torch.randint(0, WIDTHS[-1], (BATCH,), generator=generator)[rank::world]
            optimizer.zero_grad()
            outputs = parallel(x)
            loss = nn.functional.cross_entropy(outputs, y)
            optimizer.backward(loss, outputs)
            optimizer.step()
    finally:
        torch.linalg.eigh = watch.kept
    factors = sum(
        x.numel() * x.element_size()
        for entries in optimizer.state.values()
        for name, x in entries.items()
        if name in ("curvature/A", "curvature/G")
    )
    bases = sum(
        x.numel() * x.element_size()
        for entries in optimizer.state.values()
        for name, x in entries.items()
        if name.endswith("_vectors")
    )
    cache: Any = optimizer._curvature_state.get("cache")
    bases += sum(x.numel() * x.element_size() for x in ([] if cache is None else cache.tensors()))
    return {
        "decompositions_a_step": watch.matrices / STEPS,
        "work_a_step": watch.cubes / STEPS,
        "seconds_a_step": watch.seconds / STEPS,
        "bases_bytes": bases,
        "factors_bytes": factors,
        "state_bytes": optimizer.state_bytes(),
    }


def ranks(folder: Path) -> None:
    """What every rank measures, written by rank 0."""
    found = {}
    for place in PLACES:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, measure(place))
        found[place] = gathered
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


def main() -> None:
    result: dict[str, Any] = {
        "network": list(WIDTHS),
        "dtype": "float32",
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a rank",
        "ranks": {},
    }
    for world in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            spawn(world, ["tests.benchmarks.inverses.ranks"], Path(folder))
            found = json.loads((Path(folder) / "found.json").read_text())
        result["ranks"][world] = found
        for place, each in found.items():
            heaviest = {key: max(rank[key] for rank in each) for key in each[0]}
            print(world, place, {k: round(v, 4) for k, v in heaviest.items()}, flush=True)
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
