"""What the scale of the step before (``fisher_scale="lagged"``) costs in convergence: paired runs, JSON.

Run: ``python -m tests.benchmarks.fisher_scale --json docs/results/fisher_scale/lagged.json``. Every seed draws one
initialisation and one order of batches for both; what is compared is the mean training loss of the last tenth of the
steps and the validation metric at the end. Where no element's step ends inside the box (``active`` is 0) the scale
decides nothing and both runs are one; so every workload is also trained on 100 times its loss, as a sum is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from optimizers import SOAA

RUNS: dict[str, dict[str, Any]] = {
    "digits": {"steps": 300, "batch": 64, "rates": [1e-3, 1e-2]},
    "fashion_mnist": {"steps": 300, "batch": 128, "rates": [1e-3]},
    "character_gpt": {"steps": 200, "batch": 12, "rates": [1e-3]},
}


def train(
    workload: Any, seed: int, scale: Any, lr: float, factor: float, run: dict[str, Any]
) -> dict[str, float]:
    """One run."""
    steps, batch = run["steps"], run["batch"]
    torch.manual_seed(seed)
    model = workload.model()
    data = workload.data()
    batches = data.batches(batch, torch.Generator().manual_seed(seed))
    optimizer = SOAA(model.parameters(), lr=lr, total_steps=steps, fisher_scale=scale, compile=True)
    losses, active = [], []
    for _ in range(steps):
        inputs, targets = next(batches)
        optimizer.zero_grad()
        loss = factor * workload.loss(model(inputs), targets)
        optimizer.backward(loss)
        optimizer.step()
        losses.append(loss.detach() / factor)
        active.append(optimizer.step_info.fisher_active_fraction)
    tail = torch.stack(losses[-steps // 10 :])
    model.eval()
    with torch.no_grad():
        found = [(workload.metric(model(x), y), len(y)) for x, y in data.evaluation("validation")]
    metric = sum(float(value) * size for value, size in found) / sum(size for _, size in found)
    return {"loss": float(tail.mean()), "metric": metric, "active": float(torch.stack(active).mean())}


def compare(name: str, seeds: int) -> list[dict[str, Any]]:
    """Both scales at every rate."""
    workload = importlib.import_module(f"optimizers.ablation.workloads.{name}").WORKLOAD
    run, rows = RUNS[name], []
    for lr, factor in [(lr, factor) for factor in (1.0, 100.0) for lr in run["rates"]]:
        pairs = [
            [train(workload, seed, scale, lr, factor, run) for scale in ("exact", "lagged")]
            for seed in range(seeds)
        ]
        row: dict[str, Any] = {
            "workload": name,
            "lr": lr,
            "factor": factor,
            "steps": run["steps"],
            "seeds": seeds,
        }
        for key in ("loss", "metric", "active"):
            exact, lagged = ([pair[i][key] for pair in pairs] for i in (0, 1))
            difference = [b - a for a, b in zip(exact, lagged, strict=True)]
            row[key] = {
                "exact": statistics.mean(exact),
                "lagged": statistics.mean(lagged),
                "difference": statistics.mean(difference),
                "standard_error": statistics.stdev(difference) / len(difference) ** 0.5,
            }
        rows.append(row)
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [row for name in given.workloads for row in compare(name, given.seeds)]
    for row in rows:
        print(json.dumps(row))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        held = json.loads(given.json.read_text())["rows"] if given.json.exists() else []
        kept = [row for row in held if row["workload"] not in given.workloads]
        given.json.write_text(json.dumps({"rows": kept + rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
