"""What K-FAC and EK-FAC reach on several problems without being tuned to any: the measure of a preset's defaults.

Each run trains one of the study's workloads for a few steps from one seed and adds its losses to a file of one JSON
object a line; the losses are those of the workload's fixed sample of the training set. ``torch-adamw`` is PyTorch's
AdamW at its own default rate, for comparison.

    python -m tests.benchmarks.kronecker_defaults --jsonl FILE --optimizer kfac --workloads digits --seeds 0 1
    python -m tests.benchmarks.kronecker_defaults --jsonl FILE --label slow --options inverse_interval=100
    python -m tests.benchmarks.kronecker_defaults --jsonl FILE --page
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import optimizers
from optimizers.ablation import workload as workloads
from optimizers.ablation.workload import Workload

#: Steps of a run, and at which of them the loss is read.
STEPS = {
    "mnist-autoencoder": (15, 30, 60),
    "fashion-mnist": (20, 40, 60),
    "fashion-mnist-2c2d": (20, 40, 80),
    "digits": (30, 100, 200),
    "character-gpt": (30, 80, 160),
}


def evaluated(work: Workload, model: torch.nn.Module) -> float:
    """The mean loss on the workload's sample of the training set."""
    total = count = 0.0
    with torch.no_grad():
        for x, y in work.data().evaluation("train", min(work.evaluation_samples, 1000)):
            total += float(work.loss(model(x), y)) * len(x)
            count += len(x)
    return total / count


def train(name: str, optimizer_name: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """One run; it ends early where the loss is no longer finite."""
    work = workloads.get(name)
    torch.manual_seed(seed)
    model = work.model()
    batches = work.data().batches(work.batch_size, torch.Generator().manual_seed(seed))
    optimizer: Any
    if optimizer_name == "torch-adamw":
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    else:
        optimizer = optimizers.build(model, optimizer=optimizer_name, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        outputs = model(x)
        loss = work.loss(outputs, y)
        if optimizer_name == "torch-adamw":
            loss.backward()
        else:
            optimizer.backward(loss, outputs)
        return loss

    curve, highest, seconds = [[0, evaluated(work, model)]], -math.inf, 0.0
    damping = []
    for step in range(1, STEPS[name][-1] + 1):
        x, y = next(batches)
        began = time.process_time()
        loss = float(optimizer.step(closure).detach())
        seconds += time.process_time() - began
        highest = max(highest, loss)
        if hasattr(optimizer, "step_info"):
            damping.append(float(optimizer.step_info.damping))
        if step in STEPS[name] or not math.isfinite(loss):
            curve.append([step, evaluated(work, model)])
        if not math.isfinite(loss):
            break
    return {
        "workload": name,
        "optimizer": optimizer_name,
        "options": options,
        "seed": seed,
        "curve": curve,
        "highest_batch_loss": highest,
        "processor_seconds_a_step": seconds / step,
        "damping_at_the_end": damping[-1] if damping else None,
        "threads": torch.get_num_threads(),
    }


def rows(runs: list[dict[str, Any]]) -> Iterator[str]:
    """A line for every label, with the mean over seeds of each workload's losses."""
    names = [n for n in STEPS if any(r["workload"] == n for r in runs)]
    yield "| what | " + " | ".join(f"{n}, after {', '.join(map(str, STEPS[n]))} steps" for n in names) + " |"
    yield "| --- |" + " --- |" * len(names)
    for label in dict.fromkeys(r["label"] for r in runs):
        cells = []
        for name in names:
            mine = [r for r in runs if r["label"] == label and r["workload"] == name]
            found = [dict(map(tuple, r["curve"])) for r in mine]
            means = [
                statistics.mean(c.get(s, math.nan) for c in found) if found else math.nan for s in STEPS[name]
            ]
            digits = 1 if name == "mnist-autoencoder" else 3
            cells.append(", ".join(f"{m:.{digits}f}" for m in means) + f" ({len(mine)})" if mine else "")
        yield f"| {label} | " + " | ".join(cells) + " |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jsonl", type=Path, required=True, help="file to add runs to")
    parser.add_argument("--page", action="store_true", help="print the table of what the file holds")
    parser.add_argument("--optimizer", default="kfac", choices=["kfac", "ekfac", "torch-adamw"])
    parser.add_argument("--workloads", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--label", help="what the table calls these runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--options", nargs="*", default=[], help="of the preset, name=value")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.page:
        print("\n".join(rows([json.loads(line) for line in given.jsonl.read_text().splitlines()])))
        return
    options = {k: ast.literal_eval(v) for k, v in (pair.split("=", 1) for pair in given.options)}
    label = given.label or " ".join([given.optimizer, *given.options])
    given.jsonl.parent.mkdir(parents=True, exist_ok=True)
    for name in given.workloads:
        for seed in given.seeds:
            found = {"label": label, **train(name, given.optimizer, seed, options)}
            with given.jsonl.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
