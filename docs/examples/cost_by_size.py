"""Draw what each preset keeps a parameter, and what a rank of 64 sends, from 1 M to 70 B parameters."""

from __future__ import annotations

import matplotlib.pyplot as plt

from optimizers.cost_model import PRESETS, SIZES, cost

INK = "#7d8590"  # reads on a light and on a dark page
SHOWN = {
    "soaa": ("#2f81f7", "-"),
    "tadam": ("#1f9d8b", "-"),
    "muon": ("#2da44e", "-"),
    "kfac": ("#f85149", "-"),
    "ekfac": ("#f85149", "--"),
    "shampoo": ("#d29922", "-"),
    "soap": ("#d29922", "--"),
    "lbfgs-trust-region": ("#bf5af2", "-"),
    "trust-region-newton": ("#bf5af2", ":"),
}
assert set(SHOWN) <= set(PRESETS)
parameters = [sum(layer.parameters for layer in layers) for layers in SIZES.values()]

figure, (kept, sent) = plt.subplots(1, 2, figsize=(9.2, 4.2), layout="constrained")
figure.patch.set_alpha(0)
for name, (colour, style) in SHOWN.items():
    found = [cost(name, layers, ranks=64) for layers in SIZES.values()]
    kept.plot(
        parameters, [x.state / x.parameters for x in found], style, color=colour, marker=".", label=name
    )
    sent.plot(parameters, [x.sent / x.parameters for x in found], style, color=colour, marker=".")
kept.set_yscale("symlog", linthresh=1.0)
kept.set_ylim(bottom=0)
kept.set_ylabel("bytes of state a parameter")
sent.set_yscale("log")
sent.set_ylabel("bytes sent a step, a parameter")
for axes in (kept, sent):
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.patch.set_alpha(0)
    axes.grid(visible=True, color=INK, alpha=0.2)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.tick_params(colors=INK, which="both", labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(INK)
figure.legend(loc="outside lower center", ncols=5, fontsize=8, labelcolor=INK, frameon=False)
