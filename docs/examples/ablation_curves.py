"""Draw the loss of three curvatures with one trust region, by steps and by time."""

from __future__ import annotations

import statistics
import tempfile

import matplotlib.pyplot as plt

from optimizers.ablation import Ablation, ablate

INK = "#7d8590"  # reads on a light and on a dark page
curvatures = ["empirical-fisher-diagonal", "hutchinson-diagonal", "kfac"]
ablation = Ablation(
    curvature=curvatures,
    trust_region=["levenberg-marquardt"],
    learning_rates=[1.0],
    seeds=2,
    steps=60,
    evaluations=15,
)
with tempfile.TemporaryDirectory() as folder:
    outcome = ablate(ablation, folder)

# What the page says about this run must stay true.
final = {row.cell.label.split("+")[0]: row.mean("train_loss") for row in outcome.rows}
assert min(final, key=lambda name: final[name]) == "kfac", final

figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.6), sharey=True, layout="constrained")
figure.patch.set_alpha(0)
for axes, x, label in zip(panels, ("step", "seconds"), ("step", "training time, s"), strict=True):
    for row, colour in zip(outcome.rows, ("#2f81f7", "#d29922", "#f85149"), strict=True):
        series = [record["curve"] for record in row.records]
        points = range(len(series[0]["train_loss"]))
        xs = [statistics.median(curve[x][i] for curve in series) for i in points]
        losses = [[curve["train_loss"][i] for curve in series] for i in points]
        axes.plot(
            xs, [statistics.median(v) for v in losses], color=colour, label=row.cell.label.split("+")[0]
        )
        axes.fill_between(
            xs, [min(v) for v in losses], [max(v) for v in losses], color=colour, alpha=0.2, lw=0
        )
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.patch.set_alpha(0)
    axes.grid(visible=True, which="both", color=INK, alpha=0.2)
    axes.xaxis.label.set_color(INK)
    axes.tick_params(colors=INK, which="both", labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(INK)
panels[0].set_ylabel("training loss", color=INK)
panels[0].legend(fontsize=8, labelcolor=INK, frameon=False)
