"""The figures of a report: one `Figure` each, drawn so that a page in light or dark colours can hold it.

Every cell has one colour and dash in all figures of a workload. Figures carry no legend: the page has one for all.
"""

from __future__ import annotations

import io
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from optimizers.ablation.comparison import Comparison
from optimizers.ablation.measures import spends
from optimizers.ablation.profiles import Profile
from optimizers.ablation.results import Record, Row, number

# Okabe & Ito's colours that stand out from white and from black alike, and a brown; with red-green blindness too
# no two of them are alike. So few that more cells differ by their dashes.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d31")
DASHES = ((), (5, 2), (1, 1.5), (6, 2, 1, 2), (10, 3))
VERDICTS = {"better": COLORS[0], "worse": COLORS[1], "not separated": "#808080"}
INK = "#22282e"  # in the SVG it becomes the page's own text colour
Style = dict[str, Any]


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """Return colour and dash of every cell, and its label, by which a legend knows its line."""
    return {
        label: {
            "color": COLORS[i % len(COLORS)],
            "dashes": DASHES[i // len(COLORS) % len(DASHES)],
            "label": label,
        }
        for i, label in enumerate(labels)
    }


def svg(figure: Figure, title: str) -> str:
    """Return a figure as an ``<svg>`` element that refers to nothing outside of itself."""
    import matplotlib as mpl

    stream = io.StringIO()
    # text stays text; equal figures give equal files, and no two on one page share an id
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text)
    assert size is not None
    text = text.replace(size[0], 'role="img" preserveAspectRatio="xMidYMid"', 1)
    text = text.replace(INK, "currentColor")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 sans-serif", text)
    text = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{_name(title)}-{m[1]}"', text)
    text = re.sub(r'(href="#|url\(#)', lambda m: f"{m[1]}{_name(title)}-", text)
    escaped = title.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"(<svg[^>]*>)", lambda m: f"{m[1]}<title>{escaped}</title>", text, count=1)


def png(figure: Figure, look: Mapping[str, Style] | None = None) -> bytes:
    """Return a figure as a PNG file on white.

    Args:
        figure: what is drawn; it grows by its legend.
        look: of the cells, for a legend below of those that are drawn; a picture alone has no page that says which
            line is whose.
    """
    from matplotlib.lines import Line2D

    drawn = {line.get_label() for axes in figure.axes for line in axes.lines}
    look = {label: style for label, style in (look or {}).items() if label in drawn}
    if look:
        width, height = figure.get_size_inches()
        columns = 2
        names = [textwrap.fill(label, 30) for label in look]
        rows = math.ceil(len(look) / columns)
        tall = max(
            sum(1 + name.count("\n") for name in names[i : i + rows]) for i in range(0, len(names), rows)
        )
        figure.set_size_inches(width, height + 0.2 * tall)
        lines = [Line2D([], [], linewidth=1.6, **style) for style in look.values()]
        figure.legend(
            lines,
            names,
            loc="outside lower center",
            ncols=columns,
            fontsize="x-small",
            frameon=False,
            handlelength=3,  # so that dashes are told apart
            columnspacing=0.8,
        )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def _name(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


# inches: so narrow that text can still be read where a phone draws the figure 300 pixels wide
WIDTH = 4.4


def _axes(x: str, y: str, height: float = 2.9) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(which="both", color=INK, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_edgecolor(INK)
        spine.set_alpha(0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#888888", alpha=0.2)
    return figure, axes


class _Plain(LogFormatter):
    """Labels the ticks that its parent does, as plain numbers: 0.6, not 6 times 10 to the power of -1."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _logarithmic(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_Plain())
    axes.yaxis.set_minor_formatter(_Plain(minor_thresholds=(1, 0.4)))


def _band(axes: Any, xs: Sequence[float], columns: Sequence[Sequence[float]], style: Style) -> None:
    """The median over seeds as a line, and from the least to the largest a band."""
    axes.plot(xs, [statistics.median(column) for column in columns], linewidth=1.6, **style)
    if max(map(len, columns), default=0) > 1:
        low = [min(column) for column in columns]
        high = [max(column) for column in columns]
        axes.fill_between(xs, low, high, alpha=0.13, color=style["color"], linewidth=0)


def _columns(series: Sequence[Sequence[Any]], missing: float = math.inf) -> list[list[float]]:
    length = min(map(len, series))
    found = [[number(values[i]) for values in series] for i in range(length)]
    return [[value if math.isfinite(value) else missing for value in column] for column in found]


def losses(rows: Sequence[Row], look: Mapping[str, Style], measure: str, axis: str) -> Figure:
    """Draw a loss against ``"step"``, ``"seconds"`` or ``"gradients"``; one line a cell."""
    names = {
        "step": "training step",
        "seconds": "training time [s], evaluation excluded",
        "gradients": "cost [gradients of one batch]",
    }
    figure, axes = _axes(names[axis], measure.replace("_", " ").replace("train ", "training "))
    values: list[float] = []
    for row in rows:
        ran = [record for record in row.records if record["curve"].get("step")]
        if not ran:
            continue
        columns = _columns([record["curve"][measure] for record in ran], math.nan)
        places = _columns([spends(r) if axis == "gradients" else r["curve"][axis] for r in ran])
        if not places:  # what a step costs was not counted
            continue
        xs = [statistics.median(column) for column in places]
        _band(axes, xs, columns, look[row.cell.label])
        values += [value for column in columns for value in column if math.isfinite(value)]
        axes.set_ylim(*_limits(values, columns[0][0]))
    if values and min(values) > 0:
        _logarithmic(axes)
        axes.grid(visible=True, which="minor", color="#888888", alpha=0.1)
    if axis != "step" and axes.lines:  # the slowest must not squeeze the others
        ends = sorted(float(line.get_xdata()[-1]) for line in axes.lines)
        axes.set_xlim(0, min(ends[-1], 4 * statistics.median(ends)) or None)
    return figure


def _limits(values: Sequence[float], start: float) -> tuple[float, float]:
    """A diverged run may leave the picture: it ends a little above where training began."""
    least, top = min(values), start if math.isfinite(start) else max(values)
    margin = 0.03 * (top - least) or 1.0
    return (least / 1.05 if least > 0 else least - margin), top + 3 * margin


def trace(rows: Sequence[Row], look: Mapping[str, Style], name: str, label: str) -> Figure | None:
    """Draw what the optimizer recorded at its steps; None where no cell recorded it."""
    figure, axes = _axes("training step", textwrap.fill(label, 28))
    values: list[float] = []
    for row in rows:
        series, places = _traces(row.records, name)
        if not series:
            continue
        columns = _columns(series, math.nan)
        _band(axes, [float(places[i]) for i in range(len(columns))], columns, look[row.cell.label])
        values += [value for column in columns for value in column if math.isfinite(value)]
    if not values or (name == "damping" and not any(values)):  # a method without damping records 0
        return None
    ordered = sorted(values)
    low, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.01, 0.99))
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    if name in ("radius", "damping") and low > 0 and high > 20 * low:
        _logarithmic(axes)
        axes.set_ylim(low / 1.3, high * 1.3)
    else:
        axes.set_ylim(low - margin, high + margin)
    return figure


def _traces(records: Sequence[Record], name: str) -> tuple[list[list[float]], list[int]]:
    series, places = [], list[int]()
    for record in records:
        values = record["trace"].get(name) or []
        if not values or all(value is None for value in values):
            continue
        every = 1 if name == "radius" else int(record.get("trace_every", 1))
        if name == "radius" and len(values) > 400:  # it is recorded at every step, to be replayed
            every = len(values) // 400
            values = values[::every]
        series.append(values)
        places = [i * every for i in range(len(values))]
    return series, places


def sensitivities(curves: Mapping[str, Mapping[float, float]], look: Mapping[str, Style]) -> Figure | None:
    """Draw validation loss against the learning rate; None where no cell has two rates."""
    figure, axes = _axes("learning rate", "validation loss")
    finite = [loss for points in curves.values() for loss in points.values() if math.isfinite(loss)]
    if not finite or max(map(len, curves.values())) < 2:
        return None
    for label, points in curves.items():
        rates = sorted(points)
        ys = [points[rate] if math.isfinite(points[rate]) else math.nan for rate in rates]
        axes.plot(rates, ys, marker="o", markersize=3.5, linewidth=1.4, **look[label])
        if any(math.isfinite(y) for y in ys):
            best = min((y, rate) for y, rate in zip(ys, rates, strict=True) if math.isfinite(y))
            axes.plot(
                [best[1]], [best[0]], marker="o", markersize=7, fillstyle="none", color=look[label]["color"]
            )
    axes.set_xscale("log")
    low = min(finite)
    if low > 0:
        _logarithmic(axes)
        axes.set_ylim(low / 1.1, min(max(finite) * 1.1, 20 * low))
    return figure


def heat_map(
    values: Mapping[tuple[str, str], float], rows: Sequence[str], columns: Sequence[str], label: str
) -> Figure:
    """Draw the grid of curvature and trust region; a cell that diverged or failed is crossed out."""
    figure = Figure(figsize=(1.9 + 0.95 * len(columns), 1.6 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    finite = [value for value in values.values() if math.isfinite(value)]
    positive = bool(finite) and min(finite) > 0
    scaled = [
        [_scale(values.get((row, column), math.inf), log=positive) for column in columns] for row in rows
    ]
    shown = [value for line in scaled for value in line if math.isfinite(value)]
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    image = axes.imshow(
        [[value if math.isfinite(value) else math.nan for value in line] for line in scaled],
        cmap="viridis_r", aspect="auto", vmin=low, vmax=high,
    )  # fmt: skip
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            value = values.get((row, column), math.inf)
            if not math.isfinite(value):
                axes.text(j, i, "×", ha="center", va="center", color=INK)
                continue
            # light text on the dark end, the large values
            dark = (scaled[i][j] - low) > 0.5 * (high - low)
            axes.text(
                j,
                i,
                f"{value:.3g}",
                ha="center",
                va="center",
                color="#ffffff" if dark else "#000000",
                fontsize=9,
            )
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", color=INK)
    axes.set_yticks(range(len(rows)), rows, color=INK)
    axes.tick_params(color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(
        image, ax=axes, label=label if not positive else f"{label} (log)", format=_unscaled(positive)
    )
    bar.ax.tick_params(color=INK, labelcolor=INK)
    bar.ax.yaxis.label.set_color(INK)
    bar.outline.set_visible(False)
    return figure


def _scale(value: float, *, log: bool) -> float:
    return math.log10(value) if log and math.isfinite(value) else value


def _unscaled(log: bool) -> Callable[[float, int], str]:
    return lambda value, _: f"{10**value if log else value:.3g}"


def profiles(found: Mapping[str, Profile], look: Mapping[str, Style], cost: str) -> Figure:
    """Draw performance profiles: the fraction of problems within a factor of the least cost."""
    figure, axes = _axes(f"{cost} over the least of any cell", "fraction of problems")
    for label, profile in found.items():
        xs, ys = profile.steps()
        axes.step(xs, ys, where="post", linewidth=1.6, **look[label])
    axes.set_xlim(1, next(iter(found.values())).largest_ratio)
    axes.set_ylim(-0.02, 1.05)
    return figure


def forest(found: Sequence[Comparison], name: str, label: str, null: float) -> Figure:
    """Draw an interval a cell against a line of equality; what it does not separate is grey and hollow."""
    # long names of cells leave little room
    figure, axes = _axes(textwrap.fill(label, 24), "", 0.9 + 0.34 * len(found))
    ends = [
        value
        for comparison in found
        for value in (getattr(comparison, name).low, getattr(comparison, name).high)
        if math.isfinite(value)
    ]
    ratio = null == 1.0
    low, high = min([*ends, null]), max([*ends, null])
    margin = 0.06 * (high - low) or 0.1
    right = min(high + margin, 4.0) if ratio else high + margin
    for place, comparison in enumerate(reversed(found)):
        interval, verdict = getattr(comparison, name), comparison.verdicts[name]
        color = VERDICTS[verdict]
        start = interval.low if math.isfinite(interval.low) else right
        axes.plot([min(start, right), min(interval.high, right)], [place, place], color=color, linewidth=2)
        inside = math.isfinite(interval.estimate) and interval.estimate <= right
        axes.plot(
            [interval.estimate if inside else right],
            [place],
            marker="o" if inside else ">",
            color=color,
            fillstyle="none" if verdict == "not separated" else "full",
            markersize=5,
        )
    axes.axvline(null, color=INK, linewidth=1, dashes=(3, 2))
    axes.set_yticks(range(len(found)), [comparison.cell for comparison in reversed(found)])
    axes.set_xlim((0.0 if ratio else low - margin), right + 0.02 * abs(right))
    axes.set_ylim(-0.6, len(found) - 0.4)
    return figure
