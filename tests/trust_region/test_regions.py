"""Regions beside closed forms: the relative ball, the KL ellipsoid, balls a tensor, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import trust_region as tr
from curvature import DiagonalOperator, IdentityOperator, vectors
from trust_region.registry import trust_regions
from trust_region.testing import KINDS, MatrixOperator, random_problem

one = torch.tensor(1.0, dtype=torch.float64)


def test_filled_relative_ball_is_the_trust_ratio_of_lamb() -> None:
    """You et al. 2019, algorithm 2: x ← x - η φ(‖x‖)/‖r‖ r, with φ cut at 10 and the ratio 1 where ‖x‖ = 0."""
    params = [torch.tensor([3.0, 4.0]), torch.zeros(2), torch.tensor([30.0, 40.0])]
    g = [torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])]
    region = tr.RelativeBall(fill=True, floor=0.0, cap=10.0)
    found = region.minimise({}, g, IdentityOperator(g), one, 0.0, tr.StepContext(params=params))
    norms = [5.0, float(g[1].norm()), 10.0]
    for p, r, norm in zip(found.step, g, norms, strict=True):
        torch.testing.assert_close(p, -norm * r / r.norm())


def test_relative_ball_without_parameters_says_what_it_needs() -> None:
    g = [torch.ones(2)]
    with pytest.raises(ValueError, match="params must be given"):
        tr.RelativeBall().minimise({}, g, IdentityOperator(g), one, 0.0, tr.StepContext())


def test_relative_ball_measures_every_tensor_by_itself() -> None:
    params = [torch.full((2,), 3.0, dtype=torch.float64), torch.full((1,), 1e-9, dtype=torch.float64)]
    g = [torch.full((2,), 100.0, dtype=torch.float64), torch.full((1,), 100.0, dtype=torch.float64)]
    found = tr.RelativeBall(floor=1e-3).minimise(
        {}, g, IdentityOperator(g), 0.1 * one, 0.0, tr.StepContext(params=params)
    )
    assert [float(p.norm()) for p in found.step] == pytest.approx([0.1 * math.sqrt(18), 0.1 * 1e-3])


def test_ball_a_tensor_equals_the_global_ball_of_each() -> None:
    gradient, B, _ = random_problem(3, "indefinite-diagonal")
    radii = [one * r for r in (0.5, 2.0, 0.1)]
    each = tr.L2Ball(scope="tensor").minimise({}, gradient, B, radii, 0.0, tr.StepContext())
    for i, h in enumerate(B.diagonal()):
        alone = tr.L2Ball().minimise(
            {}, [gradient[i]], DiagonalOperator([h]), radii[i], 0.0, tr.StepContext()
        )
        torch.testing.assert_close(each.step[i], alone.step[0])


@pytest.mark.parametrize("includes_lr", [True, False])
def test_kl_ball_measures_before_or_after_the_learning_rate(includes_lr: bool) -> None:
    gradient, B, params = random_problem(0, "definite")
    lr, bound = 0.1, 1e-3
    trust = tr.TrustRegion(tr.KLBall(includes_lr=includes_lr), radius=tr.FixedRadius(bound))
    proposal = trust.propose(trust.init(params), gradient, B, tr.StepContext(lr=[lr] * len(params)))
    scale = 1.0 if includes_lr else 1 / lr
    step = [scale * p for p in proposal.step]
    energy = sum(float((a * b).sum()) for a, b in zip(step, B.matvec(step), strict=True))
    assert energy == pytest.approx(bound, rel=1e-9)
    assert bool(proposal.on_boundary)


def test_kl_clip_equals_the_factor_of_kfac_optimizers() -> None:
    """ν = min(1, √(κ / Σ η² gᵀp)): the same where p = B⁻¹g, for then gᵀp = pᵀBp."""
    gradient, B, params = random_problem(1, "definite")
    lr, kappa = 0.3, 1e-2
    newton = B.solve(gradient)
    nu = min(
        1.0,
        math.sqrt(kappa / sum(lr**2 * float((g * p).sum()) for g, p in zip(gradient, newton, strict=True))),
    )
    trust = trust_regions["kl-clip"](radius=kappa, damping=0.0)
    proposal = trust.propose(trust.init(params), gradient, B, tr.StepContext(lr=[lr] * len(params)))
    torch.testing.assert_close(proposal.step, [-lr * nu * p for p in newton])


def test_damped_kl_ball_holds_and_predicts_by_the_matrix_that_is_solved_with() -> None:
    """p = -ν(B+λI)⁻¹g with η²pᵀ(B+λI)p = Δ, and the prediction is that of B+λI: a dense matrix, in float64."""
    gradient, B, params = random_problem(2, "definite")
    lr, bound, damping = 0.7, 1e-3, 0.4
    dense = B.to_dense() + damping * torch.eye(sum(g.numel() for g in gradient), dtype=torch.float64)
    g = vectors.flatten(gradient)
    newton = -torch.linalg.solve(dense, g)
    step = newton * math.sqrt(bound / (lr**2 * float(newton @ dense @ newton)))
    region = tr.KLBall(includes_lr=True, includes_damping=True)
    trust = tr.TrustRegion(region, radius=tr.FixedRadius(bound, damping=damping))
    proposal = trust.propose(trust.init(params), gradient, B, tr.StepContext(lr=[lr] * len(params)))
    torch.testing.assert_close(vectors.flatten(proposal.step), lr * step)
    predicted = -(lr * g @ step + 0.5 * lr**2 * step @ dense @ step)
    torch.testing.assert_close(proposal.predicted_reduction, predicted)


REFUSALS: list[tuple[Any, str]] = [
    (lambda g, B: tr.KLBall().minimise({}, g, B, one, 0.0, tr.StepContext()), "positive semi-definite"),
    (lambda g, B: tr.Dogleg().solve(g, B, one), "positive definite"),
    (lambda g, B: tr.SteihaugCG().solve(g, B, one * math.inf), "no minimum"),
    (lambda g, B: tr.CauchyPoint().solve(g, B, one * math.inf), "no minimum"),
    (lambda g, B: tr.Krylov().solve(g, B, one * math.inf), "no minimum"),
    (lambda g, B: tr.ExactSubproblem().solve(g, B, one * math.inf), "no minimum"),
    (lambda g, B: tr.L2Ball().minimise({}, g, B, one * math.inf, 0.0, tr.StepContext()), "no minimum"),
]


@pytest.mark.parametrize(("use", "message"), REFUSALS)
def test_indefinite_curvature_is_refused_where_it_cannot_be_taken(use: Any, message: str) -> None:
    g = [torch.ones(3, dtype=torch.float64)]
    # gᵀBg < 0 with the first, the Newton step's pᵀBp < 0 with the second
    negative = -0.2 if "definite" in message else -5.0
    with pytest.raises(ValueError, match=message):
        use(g, DiagonalOperator([torch.tensor([1.0, negative, 1.0], dtype=torch.float64)]))


def test_exact_subproblem_refuses_a_large_matrix_and_names_the_remedy() -> None:
    g = [torch.ones(11, dtype=torch.float64)]
    B = MatrixOperator(torch.eye(11, dtype=torch.float64), g)
    with pytest.raises(ValueError, match="use SteihaugCG or Krylov"):
        tr.ExactSubproblem(max_size=10).solve(g, B, one)


@pytest.mark.parametrize("name", trust_regions.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_proposals_keep_dtype_and_leave_the_global_generator_alone(name: str, dtype: torch.dtype) -> None:
    trust = trust_regions[name]()
    for kind in KINDS:
        gradient, B, params = random_problem(0, kind)
        gradient, params = [g.to(dtype) for g in gradient], [p.to(dtype) for p in params]
        if isinstance(B, MatrixOperator):
            B = MatrixOperator(B.matrix.to(dtype), params)
        else:
            B = DiagonalOperator([h.to(dtype) for h in B.diagonal()])
        before = torch.get_rng_state()
        state = trust.init(params)
        context = tr.StepContext(params=params, raw_gradient=gradient, lr=[0.1] * 3)
        try:
            proposal = trust.propose(state, gradient, B, context)
        except ValueError:
            assert kind.startswith("indefinite")
            continue
        assert torch.equal(before, torch.get_rng_state())
        assert [p.dtype for p in proposal.step] == [dtype] * 3
        assert proposal.predicted_reduction.dim() == 0
