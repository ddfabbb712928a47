"""Every registered curvature with every registered trust region: does the cell train, or say why not?

``python -m tests.laws.grid`` runs all cells and writes ``docs/reference/grid.csv`` and ``grid_refusals.csv``; with
names of curvatures (``python -m tests.laws.grid hessian lsr1``) only their rows are run anew.
"""

from __future__ import annotations

import csv
import functools
import inspect
import math
import pathlib
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvature.registry import estimators
from optimizers import SecondOrder, build
from trust_region.registry import trust_regions

TABLE = pathlib.Path(__file__).parents[2] / "docs" / "reference" / "grid.csv"
REFUSALS = TABLE.with_name("grid_refusals.csv")

#: What an entry cannot run without, or what keeps it cheap in this grid.
CURVATURE_OPTIONS: dict[str, dict[str, Any]] = {
    "fisher": {"likelihood": "categorical"},
    "fisher-diagonal": {"likelihood": "categorical"},
    "empirical-fisher": {"likelihood": "categorical"},
    "low-rank": {"rank": 10},
}
#: A damping for regions that have one and would else solve with a singular B.
DAMPING = 0.03
STEPS = 100


@dataclass(frozen=True)
class Outcome:
    """What became of one cell.

    Args:
        curvature: the estimator's name.
        trust_region: the trust region's name.
        verdict: ``"trains"``, ``"refused when built"``, ``"fails"`` or ``"does not train"``.
        reason: the message of a refusal or of an error in a step, or how far the loss came.
        steps: after which the loss had halved.
        lr: with which it did.
    """

    curvature: str
    trust_region: str
    verdict: str
    reason: str = ""
    steps: int | None = None
    lr: float | None = None


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    """200 digits of scikit-learn, their 8 x 8 pixels averaged to 4 x 4."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:200], dtype=torch.float32) / 16.0
    x = nn.functional.avg_pool2d(images.unsqueeze(1), 2).reshape(200, 16)
    return 4.0 * (x - x.mean(dim=0)), torch.tensor(digits.target[:200])


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.0))
    return model


def options_of(curvature: str, trust_region: str) -> dict[str, Any]:
    """Options of both parts."""
    region = (
        {"damping": DAMPING} if "damping" in inspect.signature(trust_regions[trust_region]).parameters else {}
    )
    return {"curvature_options": CURVATURE_OPTIONS.get(curvature, {}), "trust_region_options": region}


def run(optimizer: SecondOrder, model: nn.Module) -> tuple[int | None, float]:
    """The step after which the loss had halved, or ``None``; and the last loss."""
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        optimizer.backward(loss, outputs)
        return loss

    start = value = math.inf
    for t in range(STEPS + 1):
        value = float(optimizer.step(closure).detach())
        start = value if t == 0 else start
        if value <= 0.5 * start:
            return t, value
        if not math.isfinite(value) or value > 20 * start:
            break
    return None, value


def outcome(curvature: str, trust_region: str) -> Outcome:
    """Build the cell and train it, with a learning rate of 1, and of 0.1 and 0.01 where no trial is judged."""
    reason = ""
    for lr in (1.0, 0.1, 0.01):
        model = network()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                optimizer = build(
                    model,
                    curvature=curvature,
                    trust_region=trust_region,
                    lr=lr,
                    **options_of(curvature, trust_region),
                )
            except ValueError as error:
                return Outcome(curvature, trust_region, "refused when built", str(error))
            try:
                steps, value = run(optimizer, model)
            except (ValueError, RuntimeError, ArithmeticError, NotImplementedError) as error:
                return Outcome(curvature, trust_region, "fails", f"{type(error).__name__}: {error}")
        if steps is not None:
            return Outcome(curvature, trust_region, "trains", "", steps, lr)
        reason = f"the loss came to {value:.3g} at lr = {lr:g}"
        if optimizer.needs.trial:
            break
    return Outcome(curvature, trust_region, "does not train", reason)


def main(chosen: list[str] | None = None) -> None:
    """Run the rows of the chosen curvatures, or all, and write both tables; rows that are not run stay."""
    regions, curvatures = trust_regions.names(), estimators.names()
    chosen = chosen or curvatures
    unknown = sorted(set(chosen) - set(curvatures))
    if unknown:
        raise SystemExit(f"unknown curvature {', '.join(unknown)}: choose from {', '.join(curvatures)}")
    rows: dict[str, list[Outcome]] = {}
    for curvature in chosen:
        rows[curvature] = []
        for trust_region in regions:
            started = time.perf_counter()
            rows[curvature].append(outcome(curvature, trust_region))
            print(f"{time.perf_counter() - started:6.2f} s", rows[curvature][-1], flush=True)
    write(rows, regions, curvatures)


def write(rows: dict[str, list[Outcome]], regions: list[str], curvatures: list[str]) -> None:
    """Both tables: new rows where there are some, and else what the tables held."""
    old = {row["curvature"]: row for row in read(TABLE)}
    refusals = [row for row in read(REFUSALS) if row["curvature"] not in rows]
    refusals += [
        {"curvature": r.curvature, "trust region": r.trust_region, "when": r.verdict, "reason": r.reason}
        for found in rows.values()
        for r in found
        if r.verdict != "trains"
    ]
    for curvature, found in rows.items():
        old[curvature] = {"curvature": curvature, **{r.trust_region: cell(r) for r in found}}
    refusals.sort(key=lambda r: (curvatures.index(r["curvature"]), regions.index(r["trust region"])))
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, ["curvature", *regions], restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(old[curvature] for curvature in curvatures if curvature in old)
    with REFUSALS.open("w", newline="") as file:
        listed = csv.DictWriter(file, ["curvature", "trust region", "when", "reason"], lineterminator="\n")
        listed.writeheader()
        listed.writerows(refusals)


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a table that is there already."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cell(outcome: Outcome) -> str:
    """The table's text for one outcome."""
    if outcome.verdict == "trains":
        return f"{outcome.steps}"
    return "refused" if outcome.verdict == "refused when built" else "no"


if __name__ == "__main__":
    main(sys.argv[1:])
