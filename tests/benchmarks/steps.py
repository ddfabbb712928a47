"""Cost of an optimizer's step alone, each figure a ratio to PyTorch's fused AdamW in the same run.

Run: ``python -m tests.benchmarks.steps --json docs/results/step_cost/cpu.json``. Repetitions of all contenders are
interleaved, so that a change of the machine's load meets all alike; medians, with the quartiles of the ratio, and
the ratio of the least times, which other work on the machine disturbs less.
On an accelerator times are its own events, and the time of copying 28 bytes a parameter stands beside them; on CUDA
steps that a graph replays are contenders too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from optimizers import SOAA, AdamW
from tests.benchmarks.handwritten import HandwrittenSOAA

Step = Callable[[], Any]


class Contender(NamedTuple):
    """What is compared.

    Args:
        step: what is timed.
        before: done before each step, outside of the time; ``None`` where there is nothing to do.
    """

    step: Step
    before: Step | None = None


def gpt_shapes(layers: int, width: int, vocabulary: int, context: int) -> list[tuple[int, ...]]:
    """The tensors of a GPT-2 of that size, in its order."""
    d = width
    block = [
        (d,),
        (d,),
        (3 * d, d),
        (3 * d,),
        (d, d),
        (d,),
        (d,),
        (d,),
        (4 * d, d),
        (4 * d,),
        (d, 4 * d),
        (d,),
    ]
    return [(vocabulary, d), (context, d), *(shape for _ in range(layers) for shape in block), (d,), (d,)]


MODELS: dict[str, list[tuple[int, ...]]] = {
    "mlp-1.3M": [(1000, 784), (1000,), (500, 1000), (500,), (100, 500), (100,), (10, 100), (10,)],
    "gpt-0.8M": gpt_shapes(4, 128, 96, 64),
    "gpt2-12.7M": gpt_shapes(6, 384, 5000, 256),
    "gpt2-124M": gpt_shapes(12, 768, 50257, 1024),
    "flat-50M": [(50_000_000,)],
    **{f"flat-{n}M": [(n * 1_000_000,)] for n in (1, 3, 10, 30, 100)},
}
"""Shapes of the tensors of each model."""

GROWTH = ("flat-1M", "flat-3M", "flat-10M", "flat-30M", "flat-100M")
"""Models that only the growth curve is measured on."""

WARM_UP = 3
"""Steps after the first that are not timed: some compilers meet a new kind of argument in the second or third."""


def parameters(shapes: list[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
    """Parameters with gradients, alike in every call."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for shape in shapes:
        p = nn.Parameter(torch.empty(shape, device=device).normal_(0.0, 0.02, generator=generator))
        p.grad = torch.empty_like(p).normal_(0.0, 1e-3, generator=generator)
        made.append(p)
    return made


def keeping_gradients(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Contender:
    """An optimizer that drops, or writes to, the gradients of a step: they are put back before the next one."""
    gradients = [cast(Tensor, p.grad).clone() for p in params]

    def before() -> None:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()

    return Contender(optimizer.step, before)


def replayed(step: Step) -> Contender:
    """A step as a CUDA graph replays it, after the steps that a capture asks for on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return Contender(graph.replay)


def contenders(
    shapes: list[tuple[int, ...]], device: torch.device, names: list[str]
) -> Iterator[tuple[str, Contender]]:
    """Steps of what is compared, each on parameters of its own."""
    loss = torch.tensor(1.0, device=device)

    def own() -> list[nn.Parameter]:
        return parameters(shapes, device)

    def with_loss(optimizer: Any) -> Contender:
        return Contender(lambda: optimizer.step(loss=loss))

    def adamw(**options: Any) -> Contender:
        return Contender(torch.optim.AdamW(own(), lr=1e-4, **options).step)

    made: dict[str, Callable[[], Contender]] = {
        "torch AdamW fused": lambda: adamw(fused=True),
        "torch AdamW foreach": lambda: adamw(foreach=True),
        # A rate that is a number: foreach on a CPU takes no other. A schedule would compile it anew.
        "torch AdamW compiled": lambda: Contender(
            torch.compile(adamw(foreach=True, capturable=device.type != "cpu").step)
        ),
        "SOAA compiled": lambda: with_loss(SOAA(own(), lr=1e-4, total_steps=1000, compile=True)),
        "SOAA compiled, lagged scale": lambda: with_loss(
            SOAA(own(), lr=1e-4, total_steps=1000, fisher_scale="lagged", compile=True)
        ),
        "SOAA compiled, bfloat16 state": lambda: with_loss(
            SOAA(own(), lr=1e-4, total_steps=1000, state_dtype=torch.bfloat16, compile=True)
        ),
        "SOAA eager": lambda: with_loss(SOAA(own(), lr=1e-4, total_steps=1000, compile=False)),
        "SOAA handwritten": lambda: with_loss(HandwrittenSOAA(own(), lr=1e-4, total_steps=1000)),
        "AdamW composed, compiled": lambda: with_loss(AdamW(own(), lr=1e-4, compile=True)),
        "AdamW composed, eager": lambda: with_loss(AdamW(own(), lr=1e-4, compile=False)),
    }
    if device.type == "cuda":

        def captured(optimizer: Any) -> Contender:
            return replayed(lambda: optimizer.step(loss=loss))

        made |= {
            "torch AdamW fused, replayed": lambda: replayed(
                torch.optim.AdamW(own(), lr=1e-4, fused=True, capturable=True).step
            ),
            "SOAA, replayed": lambda: captured(SOAA(own(), lr=1e-4, total_steps=1000, capturable=True)),
            "AdamW composed, replayed": lambda: captured(AdamW(own(), lr=1e-4, capturable=True)),
        }
    if importlib.util.find_spec("heavyball") is not None:
        heavyball = importlib.import_module("heavyball")

        def theirs() -> Contender:
            params = own()
            return keeping_gradients(params, heavyball.AdamW(params, lr=1e-4))

        made["heavyball AdamW"] = theirs
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        pytorch_optimizer = importlib.import_module("pytorch_optimizer")

        made["pytorch-optimizer AdaBelief"] = lambda: Contender(
            pytorch_optimizer.AdaBelief(own(), lr=1e-4).step
        )
    for name, make in made.items():
        if not names or name in names:
            yield name, make()


def seconds(contender: Contender, device: torch.device) -> float:
    """Time of one step: the device's own where it has a clock."""
    step, before = contender
    if before is not None:
        before()
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    began = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def measure(model: str, device: torch.device, names: list[str], limit: float) -> dict[str, Any]:
    """Cold first steps, and the median step of every contender.

    Args:
        model: of :data:`MODELS`.
        device: where.
        names: of the contenders; all where empty. The first is what the others are divided by.
        limit: seconds for the repetitions of all.
    """
    torch.compiler.reset()  # what was compiled for another model counts towards Dynamo's limit of recompilations
    steps, cold = {}, {}
    for name, contender in contenders(MODELS[model], device, names):
        cold[name] = seconds(contender, device)
        for _ in range(WARM_UP):
            seconds(contender, device)
        steps[name] = contender
    times: dict[str, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    while time.perf_counter() - began < limit or len(next(iter(times.values()))) < 5:
        for name, contender in steps.items():
            times[name].append(seconds(contender, device))
    first = next(iter(times))
    size = sum(torch.Size(s).numel() for s in MODELS[model])
    rows = {}
    for name, taken in times.items():
        ratios = sorted(t / base for t, base in zip(taken, times[first], strict=True))
        quarter = len(ratios) // 4
        rows[name] = {
            "milliseconds": statistics.median(taken) * 1e3,
            "ratio": statistics.median(taken) / statistics.median(times[first]),
            "ratio_quartiles": [ratios[quarter], ratios[-quarter - 1]],
            "least_milliseconds": min(taken) * 1e3,
            "ratio_of_least": min(taken) / min(times[first]),
            "first_step_seconds": cold[name],
            "repetitions": len(taken),
        }
    return {
        "parameters": size,
        "tensors": len(MODELS[model]),
        "contenders": rows,
        "copy": copy_time(size, device),
    }


def copy_time(size: int, device: torch.device) -> float:
    """Milliseconds of moving 28 bytes a parameter: what a fused AdamW reads and writes."""
    source = torch.empty(size * 14 // 4, device=device).normal_()
    target = torch.empty_like(source)
    copy = Contender(lambda: target.copy_(source))
    return statistics.median(seconds(copy, device) for _ in range(5)) * 1e3


def growth(models: dict[str, Any], name: str) -> float:
    """The exponent b of milliseconds ~ parameters^b, by least squares of the logarithms; NaN for one size."""
    found = [x for x in models.values() if name in x["contenders"]]
    points = [(math.log(x["parameters"]), math.log(x["contenders"][name]["milliseconds"])) for x in found]
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


FIRST_STEP = """
import time, torch
from optimizers import SOAA
from tests.benchmarks.steps import MODELS, parameters
torch.set_num_threads({threads})
optimizer = SOAA(parameters(MODELS[{model!r}], torch.device("cpu")), compile=True)
began = time.perf_counter()
optimizer.step(loss=torch.tensor(1.0))
print(time.perf_counter() - began)
"""


def compile_times(model: str) -> dict[str, Any]:
    """Seconds of a first step in a process of its own, with no cache and with the one that this left."""
    command = [sys.executable, "-c", FIRST_STEP.format(model=model, threads=torch.get_num_threads())]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"SOAA_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
        cold, warm = (
            float(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)
            for _ in range(2)
        )
    return {"tensors": len(MODELS[model]), "cold_seconds": cold, "warm_seconds": warm}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | optimizer | ms | ratio | quartiles | of the least | first step, s |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for model, found in results.items():
        for name, row in found["contenders"].items():
            low, high = row["ratio_quartiles"]
            lines.append(
                f"| {model} | {name} | {row['milliseconds']:.2f} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} | "
                f"{row['ratio_of_least']:.2f} | "
                f"{row['first_step_seconds']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["mlp-1.3M", "gpt-0.8M", "gpt2-12.7M"])
    parser.add_argument("--only", nargs="+", default=[], help="contenders; the first is the unit")
    parser.add_argument("--seconds", type=float, default=5.0, help="of repetitions a model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile-times", choices=MODELS, help="also time a first step, cold and warm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to add the results to")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    results = {model: measure(model, device, given.only, given.seconds) for model in given.models}
    print(table(results))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        held = json.loads(given.json.read_text()) if given.json.exists() else {}
        sizes = held.setdefault("growth", {}).setdefault("models", {})
        for model, found in results.items():
            (sizes if model in GROWTH else held.setdefault("models", {}))[model] = found
        held["growth"]["exponents"] = {
            name: growth(sizes, name) for name in ("torch AdamW fused", "SOAA compiled")
        }
        if given.compile_times:
            held.setdefault("compile", {})[given.compile_times] = compile_times(given.compile_times)
        held["machine"] = {
            "torch": torch.__version__,
            "threads": given.threads,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        }
        given.json.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
