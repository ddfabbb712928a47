"""Cost of matrix-free products in gradients of the same model, in the same run: time and peak memory.

Run: pytest -m benchmark -s tests/benchmarks/test_products.py. Times are medians of interleaved repetitions, so that a
change of the machine's load meets all of them alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import Fisher, GaussNewton, Hessian, estimate
from curvature.problem import Problem
from optimizers.ablation import workload as workloads

pytestmark = pytest.mark.benchmark

Setting = tuple[nn.Module, Callable[[Any, Any], Tensor], Tensor, Tensor]


def mlp() -> Setting:
    """1.34 M parameters, batch 128: the Fashion-MNIST network, with random inputs."""
    g = torch.Generator().manual_seed(0)
    model = workloads.get("fashion-mnist").model()
    return (
        model,
        nn.CrossEntropyLoss(),
        torch.randn(128, 784, generator=g),
        torch.randint(0, 10, (128,), generator=g),
    )


def gpt() -> Setting:
    """0.8 M parameters, 12 sequences of 64 characters."""
    g = torch.Generator().manual_seed(0)
    model = workloads.get("character-gpt").model().eval()
    vocabulary = next(m for m in model.modules() if isinstance(m, nn.Embedding)).num_embeddings
    tokens = torch.randint(0, vocabulary, (12, 65), generator=g)
    return model, workloads.cross_entropy, tokens[:, :-1], tokens[:, 1:]


def ways(setting: Setting) -> dict[str, Callable[[], object]]:
    """What is timed: one gradient, products of every kind, the first one and those that follow."""
    model, loss_fn, x, y = setting
    params = list(model.parameters())
    v = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in params]

    def gradient() -> object:
        return torch.autograd.grad(loss_fn(model(x), y), params)

    found: dict[str, Callable[[], object]] = {"gradient": gradient}
    fresh = estimate(Hessian(reuse_graph=False), model, loss_fn, [(x, y)])
    found["hessian, reverse, graph anew"] = lambda: fresh.matvec(v)
    for mode in ("reverse", "forward", "finite-difference"):
        operator = estimate(Hessian(hvp=mode), model, loss_fn, [(x, y)])  # type: ignore[arg-type]
        found[f"hessian, {mode}"] = lambda operator=operator: operator.matvec(v)
        operator = estimate(GaussNewton(jvp=mode), model, loss_fn, [(x, y)])  # type: ignore[arg-type]
        found[f"gauss-newton, {mode}"] = lambda operator=operator: operator.matvec(v)
    sampled = estimate(Fisher("categorical", samples=4), model, loss_fn, [(x, y)])
    found["fisher, 4 samples"] = lambda: sampled.matvec(v)
    return found


def medians(work: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if repetition:  # the first is for caches
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


@pytest.mark.parametrize(("make", "limit"), [(mlp, 2.5), (gpt, 4.0)])
def test_time_of_a_product(make: Callable[[], Setting], limit: float) -> None:
    found = medians(ways(make()), 15)
    print(f"\n{make.__name__}: one gradient {1e3 * found['gradient']:.1f} ms")
    for name, seconds in found.items():
        print(f"  {name:32} {seconds / found['gradient']:.2f} gradients")
    assert found["hessian, reverse"] <= limit * found["gradient"]
    assert (
        found["hessian, reverse, graph anew"] <= 1.2 * limit * found["gradient"]
    )  # it trades time for memory


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors allocated inside ``run`` held at once, by the profiler's allocation events."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    held, most = 0, 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("make", [mlp, gpt])
def test_peak_memory_of_a_product(make: Callable[[], Setting]) -> None:
    setting = make()
    model, loss_fn, x, y = setting
    params = list(model.parameters())
    v = [torch.randn_like(p) for p in params]
    least = sum(p.numel() * p.element_size() for p in params)
    gradient = peak_bytes(lambda: torch.autograd.grad(loss_fn(model(x), y), params))
    assert gradient > least  # the measurement sees at least the gradient itself
    print(f"\n{make.__name__}: one gradient {gradient / 2**20:.1f} MiB")
    for estimator in (
        Hessian(reuse_graph=False),
        Hessian(),
        Hessian(hvp="forward"),
        Hessian(hvp="finite-difference"),
    ):
        operator = estimator.estimate(Problem(model, loss_fn, [(x, y)]))
        peak = peak_bytes(lambda operator=operator: operator.matvec(v))
        kept = " (graph kept)" if estimator.hvp == "reverse" and estimator.reuse_graph else ""
        print(f"  hessian, {estimator.hvp + kept:24} {peak / gradient:.2f} gradients")
        if not estimator.reuse_graph:
            assert peak <= 2.5 * gradient
