"""The spectral-norm ball beside torch.optim.Muon and the singular value decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from curvature import DiagonalOperator, IdentityOperator
from trust_region import FixedRadius, SpectralBall, StepContext, TrustRegion
from trust_region.spectral_ball import QUINTIC, newton_schulz

SHAPES = [(4, 4), (8, 3), (3, 8), (1, 5), (16, 16)]


def matrix(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_equals_torch_muon_bit_for_bit(shape: tuple[int, int]) -> None:
    G = matrix(*shape)
    assert torch.equal(newton_schulz(G), _zeropower_via_newtonschulz(G, QUINTIC, 5, 1e-7))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_filled_step_equals_one_step_of_torch_muon(shape: tuple[int, int], scale: str) -> None:
    G, lr = matrix(*shape), 0.02
    p = torch.nn.Parameter(torch.zeros(*shape))
    p.grad = G.clone()
    # momentum 0 hands the gradient itself to the orthogonalisation
    torch.optim.Muon([p], lr=lr, momentum=0.0, nesterov=False, weight_decay=0.0, adjust_lr_fn=scale).step()
    trust = TrustRegion(SpectralBall(scale=scale), radius=FixedRadius(1.0))  # type: ignore[arg-type]
    proposal = trust.propose(trust.init([G]), [G], IdentityOperator([G]), StepContext(lr=[lr]))
    torch.testing.assert_close(proposal.step[0], p.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_the_quintic_of_the_singular_values(shape: tuple[int, int]) -> None:
    """In float64 the iteration acts on singular values alone: U q(q(…q(s/‖G‖))) Vᵀ."""
    G = matrix(*shape, dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    s = s / G.norm()
    a, b, c = QUINTIC
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(G, dtype=None), (U * s) @ Vh, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 2, 2), (5,), ()])
def test_clipped_step_is_the_exact_minimiser_for_the_identity(shape: tuple[int, ...]) -> None:
    """min ⟨G,P⟩ + ½‖P‖² in the ball is the point nearest to -G: its singular values cut at Δ."""
    G, radius = matrix(*shape, dtype=torch.float64), 0.7
    flat = G.reshape(G.shape[0], -1) if G.dim() >= 2 else G.reshape(-1, 1)
    U, s, Vh = torch.linalg.svd(flat, full_matrices=False)
    expected = -((U * s.clamp(max=radius)) @ Vh).reshape(shape)
    trust = TrustRegion(SpectralBall(fill=False), radius=FixedRadius(radius))
    proposal = trust.propose(trust.init([G]), [G], IdentityOperator([G]))
    torch.testing.assert_close(proposal.step[0], expected)
    assert bool(proposal.on_boundary) == bool(s.max() > radius)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 2, 2), (5,), ()])
def test_filled_step_predicts_the_linear_model_and_lies_near_the_sphere(shape: tuple[int, ...]) -> None:
    G, radius = matrix(*shape, dtype=torch.float64), 0.3
    trust = TrustRegion(SpectralBall(dtype=None), radius=FixedRadius(radius))
    proposal = trust.propose(trust.init([G]), [G], IdentityOperator([G]))
    P = proposal.step[0]
    assert P.shape == G.shape
    assert float(proposal.predicted_reduction) == pytest.approx(-float((G * P).sum()), rel=1e-12)
    flat = P.reshape(P.shape[0], -1) if P.dim() >= 2 else P.reshape(-1, 1)
    # Jordan et al. 2024: singular values end in about [0.7, 1.2] times the radius
    largest = float(torch.linalg.svdvals(flat).max())
    assert 0.65 * radius <= largest <= 1.25 * radius


def test_filled_step_is_downhill_with_any_curvature() -> None:
    for seed in range(20):
        G = matrix(4, 3, dtype=torch.float64, seed=seed)
        h = matrix(4, 3, dtype=torch.float64, seed=100 + seed) + 0.01  # of both signs
        trust = TrustRegion(SpectralBall(dtype=None), radius=FixedRadius(1.0))
        assert float(trust.propose(trust.init([G]), [G], DiagonalOperator([h])).predicted_reduction) > 0


def test_zero_gradient_gives_no_step_and_no_nan() -> None:
    for fill in (True, False):
        G = torch.zeros(3, 2)
        trust = TrustRegion(SpectralBall(fill=fill), radius=FixedRadius(1.0))
        proposal = trust.propose(trust.init([G]), [G], IdentityOperator([G]))
        assert float(proposal.step_norm) == 0
        assert math.isfinite(float(proposal.predicted_reduction))
