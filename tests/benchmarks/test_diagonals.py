"""Cost of diagonals in gradients of the same model, in the same run.

Run: pytest -m benchmark -s tests/benchmarks/test_diagonals.py. Times are medians of interleaved repetitions.
"""

from __future__ import annotations

import pytest
import torch

from curvature import EmpiricalFisherDiagonal, FisherDiagonal, HutchinsonDiagonal, estimate
from tests.benchmarks.test_products import Setting, gpt, medians, mlp

pytestmark = pytest.mark.benchmark


def ratios(setting: Setting, repetitions: int) -> dict[str, float]:
    model, loss_fn, x, y = setting
    params = list(model.parameters())
    work = {"gradient": lambda: torch.autograd.grad(loss_fn(model(x), y), params)}
    for name, estimator in {
        "per-sample empirical Fisher": EmpiricalFisherDiagonal(samples="per_sample"),
        "Fisher, one draw": FisherDiagonal("categorical"),
        "Hutchinson, one probe": HutchinsonDiagonal(),
    }.items():
        work[name] = lambda e=estimator: estimate(e, model, loss_fn, [(x, y)])  # type: ignore[misc]
    times = medians(work, repetitions)
    found = {name: t / times["gradient"] for name, t in times.items()}
    print(
        f"\n{sum(p.numel() for p in params):,} parameters, a gradient takes {1e3 * times['gradient']:.1f} ms"
    )
    for name, ratio in found.items():
        print(f"  {name:30s} {ratio:6.2f}")
    return found


def test_per_sample_empirical_fisher_of_an_mlp_costs_little_more_than_a_gradient() -> None:
    assert ratios(mlp(), 15)["per-sample empirical Fisher"] <= 1.5


def test_diagonals_of_a_transformer() -> None:
    assert ratios(gpt(), 5)["per-sample empirical Fisher"] > 1
