"""Stochastic Lanczos quadrature: exact moments, known distributions."""

from __future__ import annotations

import math

import pytest
import torch

from curvature import MatrixFreeOperator
from curvature.spectrum import spectral_density
from curvature.spectrum.flat import FlatOperator
from tests.curvature.spectrum import matrices


def test_each_quadrature_is_exact_up_to_twice_its_steps() -> None:
    B = matrices.indefinite(40)
    spectrum = spectral_density(matrices.operator(B), steps=6, probes=1, seed=2)
    z = FlatOperator(matrices.operator(B)).signs(1, 2)[:, 0] / 40**0.5
    for order in range(12):  # Gauss quadrature with m nodes: degree 2 m - 1
        exact = z @ torch.linalg.matrix_power(B, order) @ z
        assert abs(spectrum.moment(order) - exact) < 1e-12 * 3.0**order
    order = 12
    assert abs(spectrum.moment(order) - z @ torch.linalg.matrix_power(B, order) @ z) > 1e-9


def test_all_steps_give_the_spectrum_itself() -> None:
    B = matrices.indefinite(20)
    spectrum = spectral_density(matrices.operator(B), steps=50, probes=2)
    values = torch.linalg.eigvalsh(B)
    for nodes, weights in zip(spectrum.nodes, spectrum.weights, strict=True):
        assert (nodes - values).abs().max() < 1e-10
        assert abs(weights.sum() - 1) < 1e-12


def test_density_integrates_to_one_and_matches_the_smoothed_spectrum() -> None:
    n = 300
    B = matrices.symmetric(torch.cat([torch.linspace(0, 1, n - 60), torch.linspace(2, 3, 60)]), seed=5)
    spectrum = spectral_density(matrices.operator(B), steps=60, probes=10)
    width = 0.1
    grid = spectrum.grid(2001, width)
    density = spectrum.density(grid, width)
    assert abs(torch.trapezoid(density, grid) - 1) < 1e-4
    z = (grid[:, None] - torch.linalg.eigvalsh(B)) / width
    exact = (torch.exp(-0.5 * z * z) / (width * math.sqrt(2 * math.pi))).mean(1)
    # 10 probes of 300 elements, seeds 0-9.
    assert torch.trapezoid((density - exact).abs(), grid) < 0.1
    within = (density - exact).abs() <= 4 * spectrum.standard_error(grid, width) + 1e-3
    assert within.double().mean() > 0.95


def test_semicircle_of_a_random_matrix() -> None:
    n = 400
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = spectral_density(matrices.operator((A + A.T) / (2 * n) ** 0.5), steps=40, probes=6)
    grid = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    semicircle = torch.sqrt(4 - grid**2) / (2 * math.pi)
    assert (spectrum.density(grid, 0.15) - semicircle).abs().max() < 0.03


def test_low_rank_spectrum_has_its_mass_at_zero() -> None:
    B = matrices.low_rank()
    spectrum = spectral_density(matrices.operator(B), steps=20, probes=8)
    at_zero = torch.stack(
        [w[t.abs() < 1e-8].sum() for t, w in zip(spectrum.nodes, spectrum.weights, strict=True)]
    )
    assert abs(at_zero.mean() - 57 / 60) < 0.05  # 8 probes
    assert all(int((w > 1e-12).sum()) == 4 for w in spectrum.weights)


def test_bad_arguments_are_refused() -> None:
    B = matrices.operator(matrices.indefinite())
    with pytest.raises(ValueError, match="steps must be >= 1"):
        spectral_density(B, steps=0)
    with pytest.raises(ValueError, match="probes must be >= 1"):
        spectral_density(B, probes=0)
    with pytest.raises(ValueError, match="width must be > 0"):
        spectral_density(B, steps=2, probes=1).density(torch.zeros(1), width=0.0)


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-30, 2.0, 1e30])
def test_density_of_a_multiple_of_the_identity_integrates_to_one(scale: float) -> None:
    B = MatrixFreeOperator(lambda v: [scale * x for x in v], [torch.zeros(7, dtype=torch.float64)])
    spectrum = spectral_density(B, steps=5, probes=2)
    assert [len(t) for t in spectrum.nodes] == [1, 1]
    grid = spectrum.grid()
    density = spectrum.density(grid)
    assert density.isfinite().all()
    assert abs(float(torch.trapezoid(density, grid)) - 1) < 1e-4
