"""The density of the spectrum by stochastic Lanczos quadrature.

Legend: λ_i the eigenvalues of B, φ(t) = (1/P) Σ δ(t - λ_i); θ_k, τ_k² the nodes and weights of one quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.lanczos import Lanczos
from curvature.protocols import CurvatureOperator
from curvature.spectrum.flat import FlatOperator


@dataclass(frozen=True)
class SpectralDensity:
    """A quadrature of φ, the distribution of the eigenvalues.

    Args:
        nodes: θ, one tensor a probe.
        weights: τ², one tensor a probe, each of sum 1.
        size: P.
        products: products with B that it took.
    """

    nodes: list[Tensor]
    weights: list[Tensor]
    size: int
    products: int

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest node: estimates, from within, of the extreme eigenvalues."""
        return min(float(t.min()) for t in self.nodes), max(float(t.max()) for t in self.nodes)

    def default_width(self) -> float:
        """A hundredth of the range of the nodes; where that is a point, a part in 10¹² of it, or 10⁻¹² for zero."""
        low, high = self.bounds
        width = max((high - low) / 100, 1e-12 * max(abs(low), abs(high)))
        return max(width, 1e-290) if width else 1e-12  # its reciprocal, the height of the density, is finite

    def grid(self, points: int = 1001, width: float | None = None) -> Tensor:
        """Evenly spaced points over the nodes and five widths beyond."""
        low, high = self.bounds
        margin = 5 * (self.default_width() if width is None else width)
        return torch.linspace(low - margin, high + margin, points, dtype=torch.float64)

    def density(self, grid: Tensor, width: float | None = None) -> Tensor:
        """φ smoothed by a Gaussian, on ``grid``; its integral is 1.

        Args:
            grid: points t, (n,), in units of the eigenvalues.
            width: standard deviation of the Gaussian, > 0; :meth:`default_width` without it.

        Returns:
            (n,), averaged over the probes.
        """
        return self.densities(grid, width).mean(0)

    def standard_error(self, grid: Tensor, width: float | None = None) -> Tensor:
        """The standard error of :meth:`density` over the probes, (n,); NaN for one probe."""
        each = self.densities(grid, width)
        if len(each) < 2:
            return torch.full_like(each[0], float("nan"))
        return each.std(0).div(len(each) ** 0.5)

    def densities(self, grid: Tensor, width: float | None = None) -> Tensor:
        """Every probe's smoothed density, (probes, n)."""
        width = self.default_width() if width is None else width
        if not width > 0:
            raise ValueError(f"width must be > 0, got {width}")
        rows = []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            z = (grid[:, None] - nodes.to(grid.device, grid.dtype)) / width
            bumps = torch.exp(-0.5 * z * z) / (width * math.sqrt(2 * math.pi))
            rows.append(bumps @ weights.to(grid.device, grid.dtype))
        return torch.stack(rows)

    def moment(self, order: int) -> Tensor:
        """(1/P) tr(B^order), the mean over the probes; each quadrature is exact up to order 2 m - 1."""
        return torch.stack(
            [(w * t**order).sum() for t, w in zip(self.nodes, self.weights, strict=True)]
        ).mean()


def spectral_density(
    operator: CurvatureOperator,
    steps: int = 80,
    probes: int = 4,
    *,
    seed: int = 0,
    like: Sequence[Tensor] | None = None,
) -> SpectralDensity:
    """The distribution of the eigenvalues of B, without forming it.

    Every probe's Lanczos process is a Gauss quadrature of the measure that the probe sees, whose mean over random
    probes is φ. Few outliers of a large matrix, each of weight 1/P, show at their place but with a weight that
    varies from probe to probe.

    Args:
        operator: B, symmetric.
        steps: m >= 1 Lanczos steps a probe; fewer are taken where the Krylov space is exhausted.
        probes: n >= 1.
        seed: of the probes.
        like: the parameters, where the operator does not know their shapes.

    Returns:
        nodes and weights, to be smoothed on a grid.

    >>> from curvature import DiagonalOperator
    >>> spectrum = spectral_density(DiagonalOperator([torch.tensor([1.0, 1.0, 3.0, 3.0])]), steps=4, probes=1)
    >>> spectrum.nodes[0].round(decimals=4), float(spectrum.weights[0].sum().round(decimals=4))
    (tensor([1., 3.]), 1.0)

    Cost: m n products, O(n m² P) beside them, m vectors of memory.
    References: Lin, Saad & Yang 2016; Ghorbani, Krishnan & Xiao 2019, arXiv 1901.10159.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if probes < 1:
        raise ValueError(f"probes must be >= 1, got {probes}")
    B = FlatOperator(operator, like)
    nodes, weights = [], []
    for k in range(probes):
        process = Lanczos(B, B.signs(1, seed * probes + k)[:, 0])
        while process.steps < steps and not process.closed:
            process.step()
        theta, s = process.result().eigh()
        nodes.append(theta)
        weights.append(s[0] ** 2)
    return SpectralDensity(nodes, weights, B.size, B.products)
