"""Draw the ratio of actual to predicted reduction, measured in three ways, against the length of the step."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

INK = "#7d8590"  # reads on a light and on a dark page
SIZE, BATCHES = 64, 300
digits = load_digits()
x, y = torch.tensor(digits.data / 16.0), torch.tensor(digits.target)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
params = list(model.parameters())
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(params, lr=0.5)
for _ in range(200):
    batch = torch.randint(0, len(x), (SIZE,))
    optimizer.zero_grad()
    loss_fn(model(x[batch]), y[batch]).backward()
    optimizer.step()
theta = nn.utils.parameters_to_vector(params).detach()


def gradient(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(model(x), y), params)])


def losses(p: Tensor) -> Tensor:
    """Of every sample, at θ + p."""
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta + p, params)
        found = nn.functional.cross_entropy(model(x), y, reduction="none")
        nn.utils.vector_to_parameters(theta, params)
    return found


before, g = losses(torch.zeros_like(theta)), gradient(x, y)
each = torch.stack([gradient(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
noise = (each - g).square().sum(1).mean() / SIZE
signal = float(g.square().sum() / (g.square().sum() + noise))

rates = [1e-3, 1e-2, 1e-1, 0.5, 1.0, 2.0, 4.0]
spread: dict[str, list[Tensor]] = {"two batches": [], "the same batch": [], "the whole data": []}
for eta in rates:
    rows = []
    for _ in range(BATCHES):
        batch, other = torch.randint(0, len(x), (2, SIZE))
        p = -eta * gradient(x[batch], y[batch])
        after = losses(p)
        pairs = ((before[batch], after[other]), (before[batch], after[batch]), (before, after))
        rows.append(torch.stack([a.mean() - b.mean() for a, b in pairs]) / (p.square().sum() / eta))
    quantiles = torch.stack(rows).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=x.dtype), dim=0)
    for values, column in zip(spread.values(), quantiles.unbind(1), strict=True):
        values.append(column)

# What the page says about this run must stay true.
assert spread["two batches"][0][2] > 50
assert spread["two batches"][0][0] < -50
assert abs(spread["the same batch"][0][1] - 1) < 0.02
assert 0.5 * signal < spread["the whole data"][0][1] < 2 * signal < 1

figure, panels = plt.subplots(1, 3, figsize=(9.2, 3.4), layout="constrained")
figure.patch.set_alpha(0)
for axes, (name, values), colour in zip(
    panels, spread.items(), ("#f85149", "#2f81f7", "#2da44e"), strict=True
):
    low, middle, high = torch.stack(values, 1)
    axes.fill_between(rates, low, high, color=colour, alpha=0.2, lw=0)
    axes.plot(rates, middle, "o-", color=colour, ms=3, lw=1)
    axes.axhline(1.0, color=INK, lw=0.8, ls=":")
    if name == "two batches":
        axes.set_yscale("symlog", linthresh=1.0)
    else:
        axes.set_ylim(-0.5, 1.6)
    if name == "the whole data":
        axes.axhline(signal, color=INK, lw=0.9, ls="--")
    axes.set_title(name, fontsize=9, color=INK)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate of the step")
    axes.patch.set_alpha(0)
    axes.xaxis.label.set_color(INK)
    axes.tick_params(colors=INK, which="both", labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(INK)
panels[0].set_ylabel("ratio ρ", color=INK)
