"""Draw how data flows through one step of a composed optimizer."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK = "#7d8590"  # reads on a light and on a dark page
COLOURS = {"yours": "#7d8590", "curvature": "#2f81f7", "trust_region": "#bf5af2", "optimizers": "#2da44e"}


def box(axes: Axes, x: float, y: float, owner: str, title: str, text: str, height: float = 0.95) -> None:
    colour = COLOURS[owner]
    axes.add_patch(
        FancyBboxPatch(
            (x - 1.45, y - height / 2),
            2.9,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.1",
            lw=1.4,
            ec=colour,
            fc="none",
        )
    )
    axes.text(x, y + 0.17, title, ha="center", va="center", color=colour, weight="bold", fontsize=10)
    axes.text(x, y - 0.19, text, ha="center", va="center", color=INK, fontsize=8.5)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "", bend: float = 0.0
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            lw=1.1,
            color=INK,
            connectionstyle=f"arc3,rad={bend}",
        )
    )
    if label:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x, y + 0.09, label, ha="center", va="bottom", color=INK, fontsize=8, style="italic")


figure = plt.figure(figsize=(9.2, 3.2))
axes = figure.add_axes((0, 0, 1, 1))
figure.patch.set_alpha(0)
axes.set_xlim(-0.6, 13.6)
axes.set_ylim(-0.35, 4.35)
axes.axis("off")

box(axes, 1.1, 3.6, "yours", "model, loss", "your training loop")
box(axes, 4.7, 3.6, "optimizers", "backward(loss)", "gradients, losses add up")
box(axes, 8.3, 3.6, "curvature", "measure", "while the graph lives")
box(axes, 11.9, 3.6, "curvature", "update, operator", "B at this moment")
box(axes, 11.9, 1.9, "trust_region", "propose", "step p in the region")
box(axes, 8.3, 1.9, "optimizers", "θ + p", "momentum, weight decay")
box(axes, 4.7, 1.9, "trust_region", "judge or review", "ratio ρ; accept, adapt Δ")
box(axes, 1.1, 1.9, "optimizers", "step_info", "tensors, read at will")
box(axes, 6.5, 0.3, "yours", "closure()", "only where a trial is judged")

arrow(axes, (2.6, 3.6), (3.2, 3.6), "loss")
arrow(axes, (6.2, 3.6), (6.8, 3.6), "graph")
arrow(axes, (9.8, 3.6), (10.4, 3.6))
arrow(axes, (11.9, 3.1), (11.9, 2.4))
arrow(axes, (10.4, 1.9), (9.8, 1.9))
arrow(axes, (6.8, 1.9), (6.2, 1.9))
arrow(axes, (3.2, 1.9), (2.6, 1.9))
arrow(axes, (8.3, 1.4), (7.95, 0.4), bend=-0.25)
arrow(axes, (5.05, 0.4), (4.7, 1.4), bend=-0.25)
for offset, (owner, colour) in enumerate(list(COLOURS.items())[1:]):
    axes.text(-0.35, 0.72 - 0.3 * offset, f"■ {owner}", color=colour, fontsize=8.5)
