"""Draw what SOAA's radius, ratio and Fisher branch do while a small network learns digits."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from optimizers import SOAA

INK = "#7d8590"  # reads on a light and on a dark page
STEPS, GAMMA = 300, 0.1

digits = load_digits()
inputs = torch.tensor(digits.data / 16.0, dtype=torch.float32)
labels = torch.tensor(digits.target)
loss_fn = torch.nn.CrossEntropyLoss()


def train(scale: float) -> dict[str, list[float]]:
    """Telemetry of one run on `scale` times the mean loss."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = SOAA(model.parameters(), lr=3e-3, total_steps=STEPS, gamma=GAMMA)
    trace: dict[str, list[float]] = {"radius": [], "ratio": [], "fisher_active_fraction": []}
    for _ in range(STEPS):
        batch = torch.randint(0, len(labels), (128,), generator=generator)
        optimizer.zero_grad()
        optimizer.backward(scale * loss_fn(model(inputs[batch]), labels[batch]))
        optimizer.step()
        for name, values in trace.items():
            values.append(float(optimizer.step_info[name]))
    return trace


traces = {scale: train(scale) for scale in (1, 100, 1000)}
trace = traces[1]

step = torch.arange(STEPS)
lower, upper = (1 - GAMMA) ** (step / STEPS), 1 + GAMMA ** (step / STEPS)

# What the page says about this run must stay true.
at_a_bound = [
    min(abs(d - low), abs(d - high)) < 1e-5
    for d, low, high in zip(trace["radius"], lower.tolist(), upper.tolist(), strict=True)
]
assert sum(at_a_bound) > 0.95 * STEPS
assert max(trace["fisher_active_fraction"]) == 0.0
assert min(traces[1000]["fisher_active_fraction"]) > 0.5

figure, (radius, ratio, fraction) = plt.subplots(3, 1, figsize=(9.2, 5.2), sharex=True, layout="constrained")
figure.patch.set_alpha(0)
radius.fill_between(step, lower, upper, color="#2f81f7", alpha=0.15, lw=0)
radius.plot(step, trace["radius"], color="#2f81f7", lw=0.9)
radius.set_ylabel("radius d")
ratio.plot(step, trace["ratio"], ".", color="#bf5af2", ms=3)
ratio.axhline(1.0, color=INK, lw=0.8, ls="--")
ratio.set_yscale("symlog", linthresh=1.0)
ratio.set_ylabel("ratio ρ")
for colour, (scale, scaled) in zip(("#2da44e", "#d29922", "#f85149"), traces.items(), strict=True):
    percent = [100 * value for value in scaled["fisher_active_fraction"]]
    fraction.plot(step, percent, color=colour, lw=0.9, label=f"loss × {scale}")
fraction.legend(fontsize=8, labelcolor=INK, frameon=False)
fraction.set_ylabel("Fisher branch, %")
fraction.set_xlabel("step")
for axes in (radius, ratio, fraction):
    axes.patch.set_alpha(0)
    axes.yaxis.label.set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(INK)
