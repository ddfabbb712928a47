"""Tables of the pages, from the files that measurements wrote and from the cost model.

``python -m tests.docs.tables`` writes them; a test fails where one of them is no longer what its source says.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimizers.cost_model import PRESETS, SIZES, cost

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = DOCS / "results"
GIB = 2**30
RANKS = 64
Rows = list[list[str]]


def measured(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name / "cpu.json").read_text(encoding="utf-8"))
    return content


def short(value: float) -> str:
    """Three digits."""
    if value == 0:
        return "0"
    if value < 0.005:
        return "<0.01"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def state_by_size() -> Rows:
    """Bytes of state a float32 parameter."""
    rows = [["preset", *SIZES]]
    for name in sorted(PRESETS):
        found = [cost(name, layers) for layers in SIZES.values()]
        rows.append([f"``{name}``", *(short(x.state / x.parameters) for x in found)])
    return rows


def ranks_at(size: str) -> Rows:
    """GiB a rank of 64: kept, moved, sent."""
    head = ["preset", "all kept", "of it state", "traffic a step", "sent a step", "passes a step"]
    rows = [head]
    for name in sorted(PRESETS):
        modes = (False, True) if PRESETS[name].shardable else (False,)
        for sharded in modes:
            x = cost(name, SIZES[size], ranks=RANKS, sharded=sharded)
            label = f"``{name}``" + (", FSDP2" if sharded else "")
            numbers = (x.memory / GIB, x.state / GIB, x.traffic / GIB, x.sent / GIB)
            rows.append([label, *map(short, numbers), short(x.passes)])
    return rows


def curvature_cost() -> Rows:
    """Time of measuring curvature, and of whole steps, in units that each line names."""
    found = measured("curvature_cost")
    rows = [["what", "unit", "GPT", "MLP"]]
    for name, entry in found["gpt"].items():
        if "ratio" not in entry or name == "gradient" or ": " in name:
            continue
        cells = [found[model].get(name) for model in ("gpt", "mlp")]
        unit = "AdamW's step" if name.startswith("step, ") else "a gradient"
        rows.append([name, unit, *(interval(cell) for cell in cells)])
    return rows


def interval(entry: dict[str, float] | None) -> str:
    if entry is None:
        return ""
    spread = f" ({entry['lower']:.2f} to {entry['upper']:.2f})" if "lower" in entry else ""
    return f"{entry['ratio']:.2f}{spread}"


def curvature_cost_with_peers() -> Rows:
    """Time of measuring curvature, its limit, and what a peer took in the same run."""
    found = measured("curvature_cost")
    rows = [["what", "model", "gradients", "at most", "peer"]]
    for name in found["mlp"]:
        if name == "gradient" or name.startswith("step, ") or ": " in name:
            continue
        for model in ("mlp", "gpt"):
            own = found[model]
            entry = own.get(name)
            if entry is None:
                continue
            limit = entry.get("limit")
            told = "" if limit is None else f"{limit:g}" + (", missed" if entry["ratio"] > limit else "")
            peers = [x for x in own if x.partition(": ")[2] == name]
            beside = ", ".join(f"{x.partition(': ')[0]} {interval(own[x])}" for x in peers)
            rows.append([name, model.upper(), interval(entry), told, beside])
    return rows


def step_cost() -> Rows:
    """Time of a step alone, in units of PyTorch's fused AdamW."""
    models = {name: measured("step_cost")["models"][name] for name in STEP_MODELS}
    names = list(dict.fromkeys(n for model in models.values() for n in model["contenders"]))
    head = ["step", *(f"{name}, {model['parameters'] / 1e6:.1f} M" for name, model in models.items())]
    rows = [head]
    for name in names:
        cells = [model["contenders"].get(name) for model in models.values()]
        rows.append([name, *("" if x is None else f"{x['ratio']:.2f}" for x in cells)])
    return rows


def results_file(path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / path).read_text(encoding="utf-8"))
    return content


def step_memory() -> Rows:
    """The most that a step holds, in the parameters' bytes; only what was counted."""
    counted = results_file("step_cost/memory.json")
    rows = [["preset", "default, CPU", "compile=True, CPU"]]
    for name, found in sorted(counted.items(), key=lambda entry: entry[1]["default"]):
        told = (found["default"], found["compiled"])
        rows.append([f"``{name}``", *("not counted" if x is None else f"{x:.2f}" for x in told)])
    return rows


def whole_steps() -> Rows:
    """Whole training steps as timed, what is asked of them, and what they are made of."""
    timed, counted = (
        results_file("step_cost/whole_steps.json"),
        results_file("step_cost/counts.json")["models"],
    )
    rows = [
        ["model", "preset", "time", "worst step / mean", "at most", "multiplications", "bytes", "operations"]
    ]
    for model in ("mlp", "gpt"):
        for name, entry in timed[model].items():
            preset = name.removeprefix("step, ")
            limit = entry.get("limit")
            told = "" if limit is None else f"{limit:g}" + (", missed" if entry["ratio"] > limit else "")
            rows.append(
                [
                    model.upper(),
                    preset,
                    f"{entry['ratio']:.2f}",
                    f"{entry['worst step / mean']:.2f}",
                    told,
                    *counts_of(counted[model], preset),
                ]
            )
    return rows


def counts_of(counted: dict[str, Any], preset: str) -> list[str]:
    """Multiplications, bytes and operations in AdamW's; blank for what was not counted."""
    kinds = ("multiplications", "bytes", "operations")
    if preset not in counted:
        return ["" for _ in kinds]
    return [f"{counted[preset][kind] / counted['adamw'][kind]:.2f}" for kind in kinds]


TABLES: dict[str, Callable[[], Rows]] = {
    "explanation/costs_state.csv": state_by_size,
    "explanation/costs_7B.csv": lambda: ranks_at("7B"),
    "explanation/costs_70B.csv": lambda: ranks_at("70B"),
    "explanation/step_cost.csv": step_cost,
    "explanation/step_memory.csv": step_memory,
    "how_to/curvature_cost.csv": curvature_cost,
    "results/step_cost/whole_steps.csv": whole_steps,
    "results/curvature_cost/table.csv": curvature_cost_with_peers,
}


STEP_MODELS = ("mlp-1.3M", "gpt-0.8M", "gpt2-12.7M", "gpt2-124M", "flat-50M")
README = DOCS.parent / "README.md"
README_MODELS = ("mlp-1.3M", "gpt2-12.7M", "flat-50M")
README_STEPS = (
    "torch AdamW fused",
    "torch AdamW foreach",
    "AdamW composed, compiled",
    "SOAA compiled",
    "SOAA eager",
)
README_MARKS = ("<!-- step cost -->\n", "<!-- step cost end -->")


def readme_figures() -> str:
    """The README's table, in Markdown."""
    found = measured("step_cost")
    models = {name: found["models"][name] for name in README_MODELS}
    head = [
        f"{x['parameters'] / 1e6:.1f} M in {x['tensors']} tensor{'s' if x['tensors'] > 1 else ''}"
        for x in models.values()
    ]
    lines = [["step", *head], ["---"] * (1 + len(head))]
    for step in README_STEPS:
        cells = [f"{x['contenders'][step]['ratio']:.2f}" for x in models.values()]
        lines.append([step, *cells])
    machine = found["machine"]
    note = f"torch {machine['torch']}, {machine['threads']} threads, {machine['device']}; medians.\n"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + note


def readme_with_figures(text: str) -> str:
    """The README with its table as it should be."""
    before, rest = text.split(README_MARKS[0])
    _, after = rest.split(README_MARKS[1])
    return before + README_MARKS[0] + readme_figures() + README_MARKS[1] + after


def written(rows: Rows) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def main() -> None:
    for path, make in TABLES.items():
        (DOCS / path).write_text(written(make()), encoding="utf-8")
    README.write_text(readme_with_figures(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
