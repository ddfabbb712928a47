"""Draw the error of stochastic diagonals and traces against their cost, beside the formula."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from torch import nn

from curvature import Hessian, MatrixFreeOperator, estimate
from curvature.spectrum import hutch_plus_plus, hutchinson_trace, xtrace

INK = "#7d8590"  # reads on a light and on a dark page
SEEDS = 40
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
data = [(torch.randn(50, 6).double(), torch.randint(3, (50,)))]
B = estimate(Hessian(), model, nn.CrossEntropyLoss(), data)
H = B.to_dense()
exact, trace = H.diagonal(), H.trace()
dense = MatrixFreeOperator(lambda v: [H @ v[0]], [exact])
beside = H.square().sum() - exact.square().sum()

figure, (diagonal, traces) = plt.subplots(1, 2, figsize=(9.2, 3.8), layout="constrained")
figure.patch.set_alpha(0)
counts = torch.tensor([1, 3, 10, 30, 100, 300])
for name, colour, fourth in (("signs", "#2f81f7", 1.0), ("Gaussian", "#d29922", 3.0)):
    errors = []
    for count in counts.tolist():
        generator = torch.Generator().manual_seed(count)
        z = torch.randn(SEEDS, len(H), count, generator=generator).double()
        z = z.sign() if fourth == 1.0 else z
        found = (z * (H @ z)).mean(-1)
        errors.append(float((found - exact).square().mean().sqrt()))
    formula = ((fourth - 1) * exact.square().sum() + beside).div(len(H) * counts).sqrt()
    diagonal.plot(counts, errors, "o", color=colour, ms=4, label=name)
    diagonal.plot(counts, formula, color=colour, lw=1)
    # the picture is drawn of what the page's formula says
    assert all(abs(e / f - 1) < 0.2 for e, f in zip(errors, formula.tolist(), strict=True))
diagonal.set_xlabel("probes")
diagonal.set_ylabel("error of the diagonal")

budgets = (12, 24, 48, 72)
reached = {}
for method, colour in ((hutchinson_trace, "#2f81f7"), (hutch_plus_plus, "#2da44e"), (xtrace, "#f85149")):
    errors = [
        (sum(float(method(dense, n, seed=s).value - trace) ** 2 for s in range(SEEDS)) / SEEDS) ** 0.5
        for n in budgets
    ]
    reached[method.__name__] = errors[-1]
    traces.plot(budgets, errors, "o-", color=colour, ms=4, lw=1, label=method.__name__)
assert reached["xtrace"] < reached["hutchinson_trace"] / 3
traces.set_xlabel("products")
traces.set_ylabel("error of the trace")
for axes in (diagonal, traces):
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.patch.set_alpha(0)
    axes.legend(fontsize=8, labelcolor=INK, frameon=False)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.tick_params(colors=INK, which="both", labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(INK)
