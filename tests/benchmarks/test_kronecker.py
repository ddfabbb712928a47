"""The cost of a K-FAC factor update, as a ratio to one gradient of the same model in the same run."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from curvature import KFAC, LossGraph


def interleaved(
    first: Callable[[], object], second: Callable[[], object], rounds: int = 15
) -> tuple[float, float]:
    """Median seconds of two functions, taken in turns: A B B A."""
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(rounds):
        for which in (0, 1) if k % 2 else (1, 0):
            start = time.perf_counter()
            (first, second)[which]()
            times[which].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("fisher", "limit"), [("mc", 1.5), ("empirical", 1.5), ("forward-only", 1.5), ("type-2", None)]
)
def test_factor_update_beside_the_gradient(fisher: str, limit: float | None) -> None:
    torch.manual_seed(0)
    sizes = (784, 1000, 500, 100, 10)
    layers = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())][:-1]
    model = nn.Sequential(*layers)
    x, y = torch.randn(128, 784), torch.randint(0, 10, (128,))
    params, kfac = list(model.parameters()), KFAC(model, fisher=fisher)
    state = kfac.init(params)
    loss_fn = nn.CrossEntropyLoss()

    def gradient() -> None:
        torch.autograd.grad(loss_fn(model(x), y), params)

    def both() -> None:
        z = model(x)
        graph = LossGraph(loss_fn(z, y), params, z)
        kfac.measure(state, graph)
        graph.gradient()
        graph.release()

    both()
    alone, together = interleaved(gradient, both)
    ratio = together / alone - 1
    print(f"K-FAC {fisher}: {ratio:.2f} gradients on top of {alone * 1e3:.1f} ms")
    assert limit is None or ratio <= limit
