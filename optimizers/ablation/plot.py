"""Pictures of curves, with matplotlib and no window."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence

from optimizers.ablation.results import Row, number
from optimizers.ablation.workload import Workload


def curves(rows: Sequence[Row], problem: Workload) -> bytes:
    """Draw training and validation loss against steps and training loss against time; return a PNG.

    Args:
        rows: one row a cell; the line is the median over seeds, the band reaches from the least to the largest.
        problem: the workload, for the title.

    Returns:
        The bytes of a PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    panels = (
        (left, "step", "train_loss", "training loss"),
        (middle, "step", "validation_loss", "validation loss"),
        (right, "seconds", "train_loss", "training loss"),
    )
    for axes, x, y, label in panels:
        for position, row in enumerate(rows):
            series = [record["curve"] for record in row.records if record["curve"].get("step")]
            if not series:
                continue
            length = min(len(curve[y]) for curve in series)
            columns = [[number(curve[y][i]) for curve in series] for i in range(length)]
            xs = [statistics.median(curve[x][i] for curve in series) for i in range(length)]
            style = {"color": f"C{position % 10}", "linestyle": ("-", "--", ":")[position // 10 % 3]}
            axes.plot(
                xs, [statistics.median(c) for c in columns], label=row.cell.label, linewidth=1.5, **style
            )
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(xs, low, high, alpha=0.15, color=style["color"], linewidth=0)
        axes.set_yscale("log")
        axes.set_xlabel("training step" if x == "step" else "training time [s], evaluation excluded")
        axes.set_ylabel(label)
        axes.grid(visible=True, which="both", alpha=0.2)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    figure.suptitle(problem.summary, fontsize="medium")
    stream = io.BytesIO()
    # without a date and a version, equal runs give equal pictures
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()
