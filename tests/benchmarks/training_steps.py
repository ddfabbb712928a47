"""Whole training steps, forward and backward included, of this framework's presets and of their peers.

What a peer cannot train is left to a fused AdamW beside it. Each peer has its own defaults, but for the learning rate
and the interval of its refreshes, which are those of the preset that it is compared with.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import optimizers

Setting = tuple[nn.Module, Callable[[Any, Any], Tensor], Tensor, Tensor]
Backward = Callable[[Tensor, Any], None]


@dataclass(frozen=True)
class Work:
    """What one training step calls.

    Args:
        backward: from the loss and the outputs to gradients.
        steps: of the optimizers, one after another.
        clear: forgets the gradients.
    """

    backward: Backward
    steps: list[Callable[[], Any]]
    clear: Callable[[], Any]


def of_optimizer(optimizer: Any, create_graph: Callable[[], bool] = lambda: False) -> Work:
    """The work of one optimizer; ``create_graph`` says whether the coming step differentiates the gradient."""

    def backward(loss: Tensor, outputs: Any) -> None:
        if isinstance(optimizer, optimizers.SecondOrder):
            optimizer.backward(loss, outputs)
        else:
            loss.backward(create_graph=create_graph())

    return Work(backward, [optimizer.step], optimizer.zero_grad)


STEPS: dict[str, tuple[int, Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "adamw": (1, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True)),
    "sophia-h": (10, lambda m: optimizers.SophiaH(m.parameters(), lr=1e-5)),
    "sophia-h, compiled": (10, lambda m: optimizers.SophiaH(m.parameters(), lr=1e-5, compile=True)),
    "adahessian": (1, lambda m: optimizers.AdaHessian(m.parameters(), lr=1e-3)),
    "adahessian, compiled": (1, lambda m: optimizers.AdaHessian(m.parameters(), lr=1e-3, compile=True)),
    "adahessian, interval 2": (2, lambda m: optimizers.AdaHessian(m.parameters(), lr=1e-3, interval=2)),
    "soap": (10, lambda m: optimizers.SOAP(m.parameters(), lr=1e-4)),
    "kfac": (20, lambda m: optimizers.KFAC(m, lr=0.1, damping="fixed")),
    "kfac, factors every 10": (20, lambda m: optimizers.KFAC(m, lr=0.1, damping="fixed", factor_interval=10)),
}
"""Steps of one refresh interval, and how the optimizer is made; defaults but for the learning rate."""


def pytorch_optimizer(name: str, every: int = 0, **options: Any) -> Callable[[Setting], Work]:
    """An optimizer of that library; ``every`` so many steps it differentiates the gradient."""

    def make(setting: Setting) -> Work:
        kind = getattr(importlib.import_module("pytorch_optimizer"), name)
        taken = -1

        def create_graph() -> bool:
            nonlocal taken
            taken += 1
            return every > 0 and taken % every == 0

        return of_optimizer(kind(setting[0].parameters(), **options), create_graph)

    return make


def singd(setting: Setting) -> Work:
    """SINGD for linear layers; a model's other parameters go to AdamW."""
    from singd.optim.optimizer import SINGD

    model, _, x, _ = setting
    linear = [p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()]
    own = {id(p) for p in linear}
    rest = [p for p in model.parameters() if id(p) not in own]
    average = "batch" if x.is_floating_point() else "batch+sequence"
    both: list[Any] = [SINGD(model, linear, lr=1e-4, loss_average=average)]
    if rest:
        both.append(torch.optim.AdamW(rest, lr=1e-4, fused=True))

    def clear() -> None:
        for optimizer in both:
            optimizer.zero_grad()

    return Work(lambda loss, outputs: loss.backward(), [o.step for o in both], clear)


def curvlinops_kfac(setting: Setting) -> Work:
    """K-FAC by curvlinops: factors of every batch, by its own passes, inverses kept for 20 steps; no running mean."""
    library = importlib.import_module("curvlinops")
    model, loss_fn, x, y = setting
    params = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        factors = library.KFACLinearOperator(
            model,
            loss_fn,
            params,
            [(x, y)],
            check_deterministic=False,
            fisher_type="mc",
            separate_weight_and_bias=False,
            num_data=len(x),
            num_per_example_loss_terms=1,
        )
    number, inverse = 0, None

    def step() -> None:
        nonlocal number, inverse
        gradient = [p.grad.clone() for p in params if p.grad is not None]
        factors._reset_matrix_properties()
        factors.compute_kronecker_factors()
        if number % 20 == 0:
            inverse = library.KFACInverseLinearOperator(factors, damping=0.03, use_heuristic_damping=True)
        number += 1
        assert inverse is not None
        with torch.no_grad():
            for p, change in zip(params, inverse @ gradient, strict=True):
                p.sub_(change, alpha=1e-4)

    def clear() -> None:
        for p in params:
            p.grad = None

    return Work(lambda loss, outputs: loss.backward(), [step], clear)


PEERS: dict[str, tuple[str, int, Callable[[Setting], Work]]] = {
    "pytorch-optimizer: sophia-h": (
        "pytorch_optimizer",
        10,
        pytorch_optimizer("SophiaH", 10, lr=1e-5, update_period=10),
    ),
    "pytorch-optimizer: adahessian": ("pytorch_optimizer", 1, pytorch_optimizer("AdaHessian", 1, lr=1e-3)),
    "pytorch-optimizer: soap": ("pytorch_optimizer", 10, pytorch_optimizer("SOAP", lr=1e-4)),
    "singd": ("singd", 10, singd),
    "curvlinops: kfac": ("curvlinops", 20, curvlinops_kfac),
}
"""The library that a peer needs, steps of one refresh interval, and how its work is made."""


def works(preset: str) -> tuple[int, Callable[[Setting], Work]] | None:
    """The interval of a contender, and what makes its work; ``None`` where its library is missing."""
    if preset in PEERS:
        library, interval, made = PEERS[preset]
        return (interval, made) if importlib.util.find_spec(library) is not None else None
    interval, make = STEPS[preset]
    return interval, lambda setting: of_optimizer(make(setting[0]))


def stepper(setting: Setting, work: Work) -> Callable[[], float]:
    """One training step, and the seconds that it took."""
    model, loss_fn, x, y = setting

    def step() -> float:
        start = time.perf_counter()
        work.clear()
        outputs = model(x)
        loss = loss_fn(outputs, y)
        work.backward(loss, outputs)
        for one in work.steps:
            one()
        return time.perf_counter() - start

    return step


def training_steps(
    setting: Callable[[], Setting], intervals: int, presets: list[str]
) -> dict[str, dict[str, float]]:
    """Whole steps, the mean over whole intervals, AdamW's timed anew before and after each contender."""

    def made(preset: str) -> tuple[int, Callable[[], float]] | None:
        known = works(preset)
        if known is None:
            return None
        fresh = setting()
        fresh[0].train()
        if preset == "curvlinops: kfac" and not isinstance(fresh[1], nn.CrossEntropyLoss):
            return None  # it knows neither attention nor a loss of one's own
        return known[0], stepper(fresh, known[1](fresh))

    adamw = made("adamw")
    assert adamw is not None
    found: dict[str, dict[str, float]] = {}
    for name in presets:
        contender = made(name)
        if contender is None:
            continue
        interval, step = contender
        # the first interval is for caches, and holds the refresh of every layer at once
        for _ in range(interval + 1):
            step()
        length = max(interval, 4) * intervals
        beside = [adamw[1]() for _ in range(10)][2:]
        own = [step() for _ in range(length)]
        beside += [adamw[1]() for _ in range(10)][2:]
        reference, mean = statistics.median(beside), statistics.fmean(own)
        found[f"step, {name}"] = {
            "ratio": round(mean / reference, 3),
            "worst step / mean": round(max(own) / mean, 3),
            "least interval": round(least_interval(own, interval) / min(beside), 3),
            "adamw seconds": round(reference, 6),
        }
    return found


def least_interval(seconds: list[float], interval: int) -> float:
    """The mean step of an interval, each place of it at its least over the intervals that were timed.

    Other work on the machine only ever adds to a time.
    """
    places = range(interval)
    return statistics.fmean(min(seconds[place::interval]) for place in places)
