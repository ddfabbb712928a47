"""Steps and time to AdamW's final training loss on the deep autoencoder: K-FAC against AdamW.

Three parts, each of which adds to one JSON file: ``adamw`` trains AdamW at one rate over the workload's 1,200 steps;
``race`` lets the K-FAC preset train until it is below AdamW's best final loss, taking turns with AdamW in the same
process, so that both see the same machine; ``page`` writes the tables. The time of AdamW's whole run is the mean of its
steps in the race times 1,200; evaluations are not counted.

    python -m tests.benchmarks.time_to_target --json FILE adamw --lr 1e-3
    python -m tests.benchmarks.time_to_target --json FILE race --seed 0 radius=0.1
    python -m tests.benchmarks.time_to_target --json FILE page
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import optimizers
from optimizers.ablation.schedule import factor
from optimizers.ablation.workloads.mnist_autoencoder import WORKLOAD

#: How K-FAC is called unless the command says otherwise.
PRESET: dict[str, Any] = {"damping": "fixed", "initial_damping": 0.01, "radius": 0.1, "inverse_interval": 4}
WARMUP = 0.05


class Run:
    """One optimizer on its own copy of the workload.

    Args:
        name: ``"adamw"``, ``"kfac"`` or ``"ekfac"``.
        seed: of the initial weights and the order of the data.
        options: of the optimizer.
    """

    def __init__(self, name: str, seed: int, **options: Any) -> None:
        self.data = WORKLOAD.data()
        torch.manual_seed(seed)
        self.model = WORKLOAD.model()
        self.batches = self.data.batches(WORKLOAD.batch_size, torch.Generator().manual_seed(seed))
        self.done = 0
        self.times: list[float] = []
        self.processor_times: list[float] = []  # what other work on the machine leaves alone
        self.lr = float(options.get("lr", 1.0))
        self.optimizer: Any
        if name == "adamw":
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=self.lr, weight_decay=0.0, fused=True
            )
        else:
            self.optimizer = optimizers.build(self.model, optimizer=name, **options)
        self.step: Callable[[Any, Any], None] = self._adamw if name == "adamw" else self._kronecker

    def _adamw(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.optimizer.param_groups[0]["lr"] = self.lr * factor("constant", self.done, WORKLOAD.steps, WARMUP)
        self.optimizer.zero_grad()
        WORKLOAD.loss(self.model(x), y).backward()
        self.optimizer.step()

    def _kronecker(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        outputs = self.model(x)
        self.optimizer.backward(WORKLOAD.loss(outputs, y), outputs)
        self.optimizer.step()

    def advance(self, steps: int) -> None:
        """Take some steps; their time is kept."""
        for _ in range(steps):
            x, y = next(self.batches)
            began, began_working = time.perf_counter(), time.process_time()
            self.step(x, y)
            self.times.append(time.perf_counter() - began)
            self.processor_times.append(time.process_time() - began_working)
            self.done += 1

    @torch.no_grad()
    def loss(self) -> float:
        """The training loss on the workload's fixed sample of the training set."""
        total = count = 0.0
        for x, y in self.data.evaluation("train", WORKLOAD.evaluation_samples):
            total += float(WORKLOAD.loss(self.model(x), y)) * len(x)
            count += len(x)
        return total / count


def adamw(lr: float, seed: int) -> dict[str, Any]:
    """The training loss along AdamW's run at one rate."""
    run, curve = Run("adamw", seed, lr=lr), []
    while run.done < WORKLOAD.steps:
        run.advance(50)
        curve.append([run.done, run.loss()])
    return {"lr": lr, "seed": seed, "schedule": "constant", "warmup": WARMUP, "curve": curve}


def race(
    name: str, seed: int, lr: float, target: float, limit: float, options: dict[str, Any]
) -> dict[str, Any]:
    """K-FAC until it is below the target, AdamW taking turns; at most ``limit`` seconds."""
    second, first = Run(name, seed, **options), Run("adamw", seed, lr=lr)
    began, curve = time.perf_counter(), [[0, second.loss()]]
    while time.perf_counter() - began < limit and curve[-1][1] > target and math.isfinite(curve[-1][1]):
        second.advance(5)
        first.advance(10)
        curve.append([second.done, second.loss()])
    reached = curve[-1][1] <= target
    return {
        "optimizer": name,
        "options": options,
        "seed": seed,
        "target": target,
        "reached_in": second.done if reached else None,
        "seconds": sum(second.times) if reached else None,
        "processor_seconds": sum(second.processor_times) if reached else None,
        "curve": curve,
        "step_milliseconds": {
            key: {
                "mean": statistics.mean(t) * 1e3,
                "median": statistics.median(t) * 1e3,
                "worst": max(t) * 1e3,
            }
            for key, t in ((name, second.times), ("adamw", first.times[1:]))
        },
        "adamw": {
            "lr": lr,
            "seconds": statistics.mean(first.times[1:]) * WORKLOAD.steps,
            "processor_seconds": statistics.mean(first.processor_times[1:]) * WORKLOAD.steps,
        },
        "threads": torch.get_num_threads(),
    }


def page(held: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| AdamW's learning rate | schedule | seed | training loss after 600 steps | after 1,200 |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for row in sorted(held["adamw"], key=lambda row: (row["seed"], row["lr"])):
        at = dict(row["curve"])
        lines.append(
            f"| {row['lr']:g} | {row['schedule']} | {row['seed']} | {at[600]:.1f} | {row['curve'][-1][1]:.1f} |"
        )
    lines += [
        "",
        "| preset | options | seed | target | steps | ratio | s | AdamW's | ratio | CPU ratio | ms/step | AdamW's |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in held.get("races", []):
        told = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        if row["reached_in"] is None:
            reached = f"not in {row['curve'][-1][0]} ({row['curve'][-1][1]:.1f}) | | | | | "
        else:
            theirs = row["adamw"]["seconds"]
            reached = (
                f"{row['reached_in']} | {row['reached_in'] / WORKLOAD.steps:.3f} | {row['seconds']:.1f} | "
                f"{theirs:.1f} | {row['seconds'] / theirs:.2f} | "
                f"{row['processor_seconds'] / row['adamw']['processor_seconds']:.2f}"
            )
        ms = row["step_milliseconds"]
        lines.append(
            f"| {row['optimizer']} | {told} | {row['seed']} | {row['target']:.1f} | {reached} | "
            f"{ms[row['optimizer']]['mean']:.0f} | {ms['adamw']['mean']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file to add the results to")
    parser.add_argument("--threads", type=int, default=1)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("adamw")
    two = parts.add_parser("race")
    for part in (one, two):
        part.add_argument("--seed", type=int, default=0)
    one.add_argument("--lr", type=float, required=True)
    two.add_argument("--optimizer", default="kfac", choices=["kfac", "ekfac"])
    two.add_argument("--limit", type=float, default=130.0, help="seconds")
    two.add_argument("--target", type=float, help="another loss than AdamW's best, such as one below it")
    two.add_argument("options", nargs="*", help="of the preset, name=value")
    parts.add_parser("page")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    held: dict[str, Any] = json.loads(given.json.read_text()) if given.json.exists() else {"adamw": []}
    if given.part == "adamw":
        found = adamw(given.lr, given.seed)
        held = json.loads(given.json.read_text()) if given.json.exists() else held  # runs may go side by side
        held["adamw"].append(found)
    elif given.part == "race":
        best = min(held["adamw"], key=lambda row: row["curve"][-1][1])
        told = dict(pair.split("=", 1) for pair in given.options)
        options = PRESET | {k: ast.literal_eval(v) for k, v in told.items()}
        target = best["curve"][-1][1] if given.target is None else given.target
        found = race(given.optimizer, given.seed, best["lr"], target, given.limit, options)
        held.setdefault("races", []).append(found)
        print({k: v for k, v in found.items() if k != "curve"})
    else:
        (given.json.parent / "table.md").write_text(page(held))
        return
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
