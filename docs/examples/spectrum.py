"""Draw the spectrum of a network's Hessian before and after training, from products, beside the exact one."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from curvature import Hessian, estimate
from curvature.spectrum import spectral_density
from optimizers import AdamW

INK = "#7d8590"  # reads on a light and on a dark page
digits = load_digits()
inputs = torch.tensor(digits.data[:500] / 16.0, dtype=torch.float32)
labels = torch.tensor(digits.target[:500])
loss_fn = torch.nn.CrossEntropyLoss()

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10))
figure, panels = plt.subplots(2, 1, figsize=(9.2, 5.2), layout="constrained")
figure.patch.set_alpha(0)
negative = []
for axes, title in zip(panels, ("at the start", "after 300 steps"), strict=True):
    H = estimate(Hessian(), model, loss_fn, [(inputs, labels)])
    found = spectral_density(H, steps=60, probes=4, seed=0)
    width = found.default_width()
    grid = found.grid(801, width)
    density, error = found.density(grid, width), found.standard_error(grid, width)
    exact = torch.linalg.eigvalsh(H.to_dense().double())
    negative.append(float(exact[0] / exact[-1]))
    floor = 1 / (len(exact) * width * 2.507)  # the height of one eigenvalue
    axes.fill_between(
        grid, (density - error).clamp(min=floor / 30), density + error, color="#2f81f7", alpha=0.25, lw=0
    )
    axes.plot(grid, density, color="#2f81f7", lw=1.2, label="from 240 products")
    axes.plot(
        exact, torch.full_like(exact, floor / 12), "|", color="#f85149", ms=7, label="exact eigenvalues"
    )
    axes.set_yscale("log")
    axes.set_ylim(floor / 30, 4 * float(density.max()))
    axes.set_ylabel(f"density, {title}", fontsize=9)
    axes.patch.set_alpha(0)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.tick_params(colors=INK, which="both", labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(INK)
    if axes is panels[0]:
        axes.legend(fontsize=8, labelcolor=INK, frameon=False)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            loss_fn(model(inputs), labels).backward()
            optimizer.step()
panels[1].set_xlabel("eigenvalue of the Hessian")

# What the page says about this network must stay true.
assert -0.6 < negative[0] < negative[1] < 0
