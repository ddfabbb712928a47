"""The cost of curvature: products, diagonals and factors in gradients, whole training steps in AdamW's steps.

Run: ``python -m tests.benchmarks.curvature_cost --json docs/results/curvature_cost/cpu.json`` (``--only products``,
``diagonals``, ``factors`` or ``steps`` for a part, which is written into the file beside the others). Every figure is a
ratio to one gradient, or one whole AdamW step (forward, backward, fused update), of the same model in the same run;
repetitions are interleaved, so that a change of the machine's load meets all alike. Medians and quartiles. Where
curvlinops and backpack are installed, they are measured beside.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from curvature import KFAC, EmpiricalFisherDiagonal, Hessian, LossGraph, estimate
from curvature.problem import Problem
from tests.benchmarks.test_products import Setting, gpt, mlp, peak_bytes
from tests.benchmarks.training_steps import PEERS, STEPS, training_steps

MODELS: dict[str, Callable[[], Setting]] = {"mlp": mlp, "gpt": gpt}

LIMITS: dict[str, dict[str, float]] = {
    "mlp": {
        "hessian product, time": 2.5,
        "hessian product, peak memory": 2.5,
        "per-sample empirical Fisher": 1.5,
        "K-FAC factors, mc": 1.5,
        "K-FAC factors, empirical": 1.5,
        "K-FAC factors, forward-only": 1.5,
        "step, kfac": 1.5,
        "step, soap": 2.0,
        "step, adahessian": 2.5,
        "step, sophia-h": 1.2,
    },
    "gpt": {
        "hessian product, time": 4.0,
        "hessian product, peak memory": 2.5,
        "per-sample empirical Fisher": 1.5,
        "K-FAC factors, mc": 1.5,
        "K-FAC factors, empirical": 1.5,
        "K-FAC factors, forward-only": 1.5,
        "step, kfac": 1.3,
        "step, soap": 1.4,
        "step, adahessian": 3.0,
        "step, sophia-h": 1.2,
    },
}
"""What is to hold; figures without a limit are there to compare with."""


def quartiles(ratios: list[float]) -> dict[str, float]:
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(middle, 3), "lower": round(low, 3), "upper": round(high, 3)}


def compared(work: dict[str, Callable[[], object]], base: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of every piece in ``base``'s of the same round."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name in list(work) if number % 2 else reversed(list(work)):
            start = time.perf_counter()
            work[name]()
            if number:  # the first is for caches
                times[name].append(time.perf_counter() - start)
    reference = statistics.median(times[base])
    found = {name: quartiles([t / reference for t in own]) for name, own in times.items()}
    found[base]["seconds"] = round(reference, 6)
    return found


def gradient_of(setting: Setting) -> Callable[[], object]:
    """One gradient by ``torch.autograd.grad``."""
    model, loss_fn, x, y = setting
    params = list(model.parameters())
    return lambda: torch.autograd.grad(loss_fn(model(x), y), params)


def products(setting: Setting, rounds: int) -> dict[str, dict[str, float]]:
    """A Hessian-vector product by the default, in time and peak memory."""
    model, loss_fn, x, y = setting
    v = [torch.randn_like(p) for p in model.parameters()]
    operator = estimate(Hessian(), model, loss_fn, [(x, y)])
    gradient = gradient_of(setting)
    work: dict[str, Callable[[], object]] = {
        "gradient": gradient,
        "hessian product, time": lambda: operator.matvec(v),
    }
    if (peer := found_peer("curvlinops")) is not None:
        theirs = peer.HessianLinearOperator(
            model, Flat(), list(model.parameters()), [(x, y)], check_deterministic=False, num_data=len(x)
        )
        work["curvlinops: hessian product, time"] = lambda: theirs @ v
    found = compared(work, "gradient", rounds)
    fresh = Hessian().estimate(Problem(model, loss_fn, [(x, y)]))
    peak = max(peak_bytes(lambda: fresh.matvec(v)) for _ in range(2)) / peak_bytes(gradient)
    return {**found, "hessian product, peak memory": {"ratio": round(peak, 3)}}


def diagonals(setting: Setting, rounds: int) -> dict[str, dict[str, float]]:
    """The per-sample empirical Fisher, its own forward pass included."""
    model, loss_fn, x, y = setting
    estimator = EmpiricalFisherDiagonal(samples="per_sample")
    work: dict[str, Callable[[], object]] = {
        "gradient": gradient_of(setting),
        "per-sample empirical Fisher": lambda: estimate(estimator, model, loss_fn, [(x, y)]),
    }
    peer = found_peer("backpack")
    if peer is not None and isinstance(
        loss_fn, torch.nn.CrossEntropyLoss
    ):  # it has no rule for a transformer
        extensions = importlib.import_module("backpack.extensions")
        extended, extended_loss = peer.extend(copy.deepcopy(model)), peer.extend(torch.nn.CrossEntropyLoss())

        def squares() -> None:
            with peer.backpack(extensions.SumGradSquared()):
                extended_loss(extended(x), y).backward()
            for p in extended.parameters():
                p.grad = None

        work["backpack: per-sample empirical Fisher"] = squares
    return compared(work, "gradient", rounds)


def factors(setting: Setting, rounds: int) -> dict[str, dict[str, float]]:
    """K-FAC's factors, on top of the gradient with which they share a forward pass."""
    model, loss_fn, x, y = setting
    params = list(model.parameters())
    found: dict[str, dict[str, float]] = {}
    for fisher in ("mc", "empirical", "forward-only"):
        kfac = KFAC(model, fisher=fisher)  # type: ignore[arg-type]
        state = kfac.init(params)

        def both(kfac: KFAC = kfac, state: Any = state) -> None:
            z = model(x)
            graph = LossGraph(loss_fn(z, y), params, z)
            kfac.measure(state, graph)
            graph.gradient()
            graph.release()

        both()
        work: dict[str, Callable[[], object]] = {"gradient": gradient_of(setting), "both": both}
        peer = found_peer("curvlinops")
        if peer is not None and isinstance(loss_fn, torch.nn.CrossEntropyLoss):

            def theirs(peer: Any = peer, fisher: str = fisher) -> None:
                peer.KFACLinearOperator(
                    model,
                    loss_fn,
                    params,
                    [(x, y)],
                    check_deterministic=False,
                    fisher_type=fisher,
                    separate_weight_and_bias=False,
                    num_data=len(x),
                    num_per_example_loss_terms=1,
                ).compute_kronecker_factors()

            work["theirs"] = theirs
        ratios = compared(work, "gradient", rounds)
        for name, key in (("", "both"), ("curvlinops: ", "theirs")):
            if key in ratios:
                on_top = {k: round(value - 1, 3) for k, value in ratios[key].items()}
                found[f"{name}K-FAC factors, {fisher}"] = on_top
    return found


class Flat(torch.nn.CrossEntropyLoss):
    """Cross-entropy over (…, C) outputs, as a loss that the peers know."""

    def forward(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean over all positions."""
        return super().forward(outputs.flatten(0, -2), target.flatten())


def found_peer(name: str) -> Any:
    """A peer library, or ``None`` where it is not installed."""
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--table", type=Path, help="write the table of --json's file there, measuring nothing"
    )
    parser.add_argument("--only", choices=["products", "diagonals", "factors", "steps"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    presets = [name for name in (*STEPS, *PEERS) if name != "adamw"]
    parser.add_argument("--presets", nargs="+", choices=presets, default=presets, help="whose whole steps")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--intervals", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    results: dict[str, Any] = {}
    if asked.json is not None and asked.json.exists():
        results = json.loads(asked.json.read_text())
    results["machine"] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
    }
    for name in asked.models:
        own = results.setdefault(name, {})
        for part in (products, diagonals, factors):
            if asked.only in (None, part.__name__):
                own.update(part(MODELS[name](), asked.rounds))
        if asked.only in (None, "steps"):
            own.update(training_steps(MODELS[name], asked.intervals, asked.presets))
        for what, figure in own.items():
            limit = LIMITS[name].get(what)
            if limit is not None:
                figure["limit"] = limit
            told = ", ".join(f"{key} {value}" for key, value in figure.items())
            print(f"{name}: {what:32} {told}", flush=True)
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
