"""Writes docs/results/more_garbow_hillstrom.{csv,md}: function and gradient counts beside SciPy's.

    python -m tests.benchmarks.more_garbow_hillstrom

Every method starts from the standard start and stops at ‖g‖ < 1e-8 or after 1000 trials. Evaluations are counted as
SciPy does: nothing is evaluated twice at one point, and a gradient is taken where a step was accepted (CAT: at every
trial). Hessians are dense, by double backward, for both.
"""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import scipy.optimize
import torch

from tests.trust_region.more_garbow_hillstrom import PROBLEMS, Problem
from tests.trust_region.rosenbrock import gradient, hessian, minimise
from trust_region.registry import trust_regions

TARGET = Path(__file__).parents[2] / "docs" / "results"
OURS = {"trust-region Newton": "ratio", "ARC": "cubic", "CAT": "cat", "exact": "exact"}
SCIPY = ["trust-ncg", "trust-krylov", "trust-exact"]
STEPS = 1000

Row = tuple[bool, int, int, float, float]


def ours(name: str, problem: Problem) -> Row:
    run = minimise(trust_regions[name](), problem, problem.x0, gtol=1e-8, max_steps=STEPS)
    return run.gradient_norm < 1e-8, run.functions, run.gradients, run.gradient_norm, float(problem(run.x))


def scipys(method: str, problem: Problem) -> Row:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = scipy.optimize.minimize(
            lambda x: float(problem(torch.from_numpy(x))),
            problem.x0.numpy(),
            jac=lambda x: gradient(problem, torch.from_numpy(x)).numpy(),
            hess=lambda x: hessian(problem, torch.from_numpy(x)).numpy(),
            method=method,
            options={"gtol": 1e-8, "maxiter": STEPS},
        )
    norm = float(np.linalg.norm(result.jac))
    return norm < 1e-8, result.nfev, result.njev, norm, float(result.fun)


def main() -> None:
    methods = [*OURS, *(f"SciPy {m}" for m in SCIPY)]
    table: dict[str, dict[str, Row]] = {}
    for problem in PROBLEMS:
        rows = {label: ours(name, problem) for label, name in OURS.items()}
        rows |= {f"SciPy {m}": scipys(m, problem) for m in SCIPY}
        table[f"{problem.number}. {problem.name}"] = rows
    TARGET.mkdir(parents=True, exist_ok=True)
    with (TARGET / "more_garbow_hillstrom.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["problem", "method", "solved", "functions", "gradients", "gradient_norm", "f"])
        for name, rows in table.items():
            for method, (solved, functions, gradients, norm, f) in rows.items():
                writer.writerow([name, method, int(solved), functions, gradients, f"{norm:.1e}", f"{f:.6g}"])
    lines = [
        "---",
        "orphan: true",
        "---",
        "",
        "# The Moré-Garbow-Hillstrom problems",
        "",
        "Function / gradient evaluations until ‖g‖ < 1e-8, from the standard starts, in float64; “–” is not reached",
        "in 1000 trials, or given up. Nothing is evaluated twice at one point; a gradient is taken where a step was",
        "accepted (CAT: at every trial). Where SciPy gives up on 6 and 16, what is promised is below the rounding of",
        "the loss, and ρ counts as 1 here. Written by `python -m tests.benchmarks.more_garbow_hillstrom`; the numbers",
        "are also in `more_garbow_hillstrom.csv`.",
        "",
        "| problem | " + " | ".join(methods) + " |",
        "|---|" + "---|" * len(methods),
    ]
    for name, rows in table.items():
        cells = [f"{r[1]} / {r[2]}" if r[0] else "–" for r in (rows[m] for m in methods)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    solved = [sum(rows[m][0] for rows in table.values()) for m in methods]
    lines.append(f"| **solved of {len(table)}** | " + " | ".join(f"**{n}**" for n in solved) + " |")
    lines.append("")
    (TARGET / "more_garbow_hillstrom.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
