"""Bytes that a step holds beside parameters, gradients and state, for every preset and every way that it has.

Run: ``python -m tests.benchmarks.step_memory --json docs/results/step_cost/memory.json``. Counted by the profiler's
allocation events, not timed: the counts do not depend on the machine's load. Each figure is the peak inside ``step()``
of the first to fifth step, some of which refresh, over the parameters' bytes. Where a trial is judged the step runs
the closure, and its activations and gradients count too. What ``optimizer.backward`` measured before is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import optimizers
from optimizers import SecondOrder, blocked
from tests.optimizers.test_memory import peak_bytes

WIDTHS = (128, *(256 for _ in range(20)), 10)
"""Layers of a perceptron: 1.3 M parameters in 42 tensors, the largest 5 % of them."""

SHORTER = 16
"""A step in blocks holds blocks of one size whatever the model's: they are shortened by this, for a model of 19 M."""

Make = Callable[[nn.Module, Any], SecondOrder]


def of(name: str, **options: Any) -> Make:
    """A preset; ``compile`` is what the way asks for."""

    def make(model: nn.Module, compiles: Any) -> SecondOrder:
        given = model if name in ("KFAC", "EKFAC") else model.parameters()
        found: SecondOrder = getattr(optimizers, name)(given, compile=compiles, **options)
        return found

    return make


PRESETS: dict[str, Make] = {
    "soaa": of("SOAA"),
    "adamw": of("AdamW"),
    "tadam": of("Tadam"),
    "sophia-h": of("SophiaH", interval=2),
    "sophia-g": of("SophiaG", interval=2),
    "adahessian": of("AdaHessian"),
    "lamb": of("LAMB"),
    "lars": of("LARS"),
    "muon": of("Muon"),
    "shampoo": of("Shampoo", interval=2),
    "soap": of("SOAP", interval=2),
    "kfac": of("KFAC", damping="fixed"),
    "ekfac": of("EKFAC"),
    "lbfgs-trust-region": of("LBFGSTrustRegion"),
    "trust-region-newton": of("TrustRegionNewton"),
    "hessian-free": of("HessianFree"),
    "natural-gradient": of("NaturalGradient", likelihood="categorical"),
}
"""How each is made; defaults but for intervals that let few steps see a refresh."""


def model() -> nn.Sequential:
    """The perceptron."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def held(make: Make, compiles: Any) -> float:
    """The most that a step holds, in the parameters' bytes."""
    network = model()
    size = sum(p.nbytes for p in network.parameters())
    optimizer = make(network, compiles)
    x, y = torch.randn(16, WIDTHS[0]), torch.randint(0, WIDTHS[-1], (16,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = network(x)
        loss: Tensor = nn.functional.cross_entropy(z, y)
        optimizer.backward(loss, z)
        return loss

    first = 2 if compiles is True else 0  # compilers run in the first two steps
    peaks = []
    for step in range(5):
        if optimizer.needs.trial:
            run: Callable[[], Any] = lambda: optimizer.step(closure)  # noqa: E731
        else:
            closure()
            run = optimizer.step
        peaks += [peak_bytes(run) / size] if step >= first else [run() or 0.0]
    return round(max(peaks), 3)


WAYS = {"default": "auto", "compiled": True}


def counted(name: str, way: str) -> float | None:
    """One preset's steps; ``None`` where it has none of that way."""
    try:
        PRESETS[name](nn.Sequential(nn.Linear(2, 2)), WAYS[way])
    except ValueError:
        return None
    return held(PRESETS[name], WAYS[way])


def main() -> None:
    """Count, print, and write into the file beside what it holds already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    asked = parser.parse_args()
    torch.set_num_threads(2)
    blocked.BLOCK //= SHORTER
    blocked.SMALL //= SHORTER
    exists = asked.json is not None and asked.json.exists()
    results: dict[str, dict[str, float | None]] = json.loads(asked.json.read_text()) if exists else {}
    for name in asked.presets:
        for way in asked.ways:
            results.setdefault(name, {})[way] = counted(name, way)
        print(name, results[name], flush=True)
    if asked.json is not None:
        asked.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
