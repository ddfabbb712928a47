"""Draw the step as the radius grows, in regions of different shapes, over a loss with a curved valley."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Circle, Rectangle
from torch import Tensor

from curvature import Operator
from trust_region import Box, FixedRadius, L2Ball, SteihaugCG, TrustRegion, Unbounded

INK = "#7d8590"  # reads on a light and on a dark page
START = torch.tensor([-1.1, 0.9], dtype=torch.float64)


def loss(point: Tensor) -> Tensor:
    x, y = point[..., 0], point[..., 1]
    return (1 - x) ** 2 + 4 * (y - x**2) ** 2 + 0.5 * y**2


class Dense(Operator):
    """B given as a matrix, for one parameter tensor."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__([matrix[0]])
        self.matrix = matrix

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [self.matrix @ v[0]]

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        return [torch.linalg.solve(self.matrix + damping * torch.eye(len(v[0]), dtype=v[0].dtype), v[0])]

    def diagonal(self) -> list[Tensor]:
        return [self.matrix.diagonal()]

    def to_dense(self) -> Tensor:
        return self.matrix


gradient = torch.func.grad(loss)(START)
curvature = Dense(torch.func.hessian(loss)(START))


def step(trust_region: TrustRegion) -> Tensor:
    return trust_region.propose(trust_region.init([START]), [gradient], curvature).step[0]


radii = torch.logspace(-2, 0.7, 60).tolist()
panels = {
    "Unbounded, damping λ": [
        TrustRegion(region=Unbounded(), radius=FixedRadius(damping=10 / r**2)) for r in radii
    ],
    "L2Ball, Steihaug-CG": [
        TrustRegion(region=L2Ball(), subproblem=SteihaugCG(tolerance=1e-9), radius=FixedRadius(r))
        for r in radii
    ],
    "Box": [TrustRegion(region=Box(), radius=FixedRadius(r)) for r in radii],
}

grid_x, grid_y = np.meshgrid(np.linspace(-2, 1.6, 200), np.linspace(-1.2, 2.0, 200))
points = torch.from_numpy(np.stack([grid_x, grid_y], axis=-1))
offset = points - START
model = offset @ gradient + 0.5 * torch.einsum("...i,ij,...j->...", offset, curvature.matrix, offset)

figure, all_axes = plt.subplots(1, 3, figsize=(9.2, 3.3), sharey=True, layout="constrained")
figure.patch.set_alpha(0)
for axes, (title, trust_regions) in zip(all_axes, panels.items(), strict=True):
    axes.patch.set_alpha(0)
    axes.contour(grid_x, grid_y, loss(points).log1p(), levels=14, cmap="viridis", linewidths=0.8)
    axes.contour(grid_x, grid_y, model, levels=10, colors=INK, linewidths=0.5, linestyles="dashed", alpha=0.6)
    path = torch.stack([START + step(trust_region) for trust_region in trust_regions])
    axes.plot(path[:, 0], path[:, 1], color="#f85149", lw=2)
    axes.plot(*START, "o", color="#f85149", ms=5)
    for radius in (0.25, 0.6, 1.0):
        x, y = START.tolist()
        if title.startswith("L2Ball"):
            axes.add_patch(Circle((x, y), radius, fill=False, ec="#f85149", lw=0.8, ls=":"))
        elif title == "Box":
            axes.add_patch(
                Rectangle(
                    (x - radius, y - radius), 2 * radius, 2 * radius, fill=False, ec="#f85149", lw=0.8, ls=":"
                )
            )
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlim(-2, 1.6)
    axes.set_ylim(-1.2, 2.0)
    axes.set_aspect("equal")
    axes.tick_params(colors=INK, labelsize=7)
    for spine in axes.spines.values():
        spine.set_color(INK)
