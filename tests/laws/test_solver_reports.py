"""What a solver says of its step, on models of which it is known: predicted reduction, boundary, curvature, iterations.

Legend: B = diag(h) turned by a rotation where it is not meant to be diagonal; the gradient in the same basis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import trust_region as tr
from curvature import DiagonalOperator, IdentityOperator
from curvature.protocols import CurvatureOperator
from trust_region.testing import MatrixOperator, reduction

F64 = torch.float64


@dataclass(frozen=True)
class Model:
    """gᵀp + ½ pᵀBp, with B's eigenvalues h and the gradient's coefficients in that basis."""

    h: tuple[float, ...]
    g: tuple[float, ...]

    def build(self, diagonal: bool) -> tuple[list[Tensor], CurvatureOperator, list[Tensor]]:
        h, g = torch.tensor(self.h, dtype=F64), torch.tensor(self.g, dtype=F64)
        if diagonal:
            shapes: Sequence[Tensor] = (g[:2], g[2:])
            return (
                [x.clone() for x in shapes],
                DiagonalOperator([h[:2], h[2:]]),
                [torch.ones(2, dtype=F64)] * 2,
            )
        generator = torch.Generator().manual_seed(0)
        Q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=F64)).Q
        g = Q @ g
        if float(g.norm()) == 0:
            g = g.abs()
        like = [g[:2], g[2:]]
        return (
            [x.clone() for x in like],
            MatrixOperator(Q @ torch.diag(h) @ Q.T, like),
            [torch.ones(2, dtype=F64)] * 2,
        )


MODELS = {
    "definite": Model((1.0, 2.0, 4.0, 8.0), (1.0, -1.0, 0.5, 2.0)),
    # gᵀBg < 0, so that even the Cauchy point meets it; no Krylov space of g misses it
    "indefinite": Model((-3.0, 1.0, 2.0, 0.5), (4.0, 1.0, 0.5, 0.5)),
    # g has no part in the lowest eigenspace, and the radius is larger than the step that the rest of B asks for
    "hard case": Model((-1.0, 1.0, 2.0, 4.0), (0.0, 1.0, 0.5, 1.0)),
    "no gradient": Model((-1.0, 1.0, 2.0, 4.0), (0.0, 0.0, 0.0, 0.0)),
}
WIDE, NARROW = 100.0, 0.05

SOLVERS: dict[str, Any] = {
    "cauchy": tr.CauchyPoint(),
    "dogleg": tr.Dogleg(),
    "steihaug": tr.SteihaugCG(tolerance=1e-12),
    "exact": tr.ExactSubproblem(),
    "krylov": tr.Krylov(tolerance=1e-12),
    "cubic": tr.CubicModel(tolerance=1e-12),
    "kl-cg": tr.KLConjugateGradient(max_iterations=20, tolerance=1e-12),
}
REGIONS: dict[str, Any] = {
    "unbounded": tr.Unbounded(),
    "l2-ball": tr.L2Ball(),
    "l2-ball-tensor": tr.L2Ball(scope="tensor"),
    "box": tr.Box(),
    "rms-box": tr.RmsBox(beta=0.0, rank_one_scale=False),
    "rms-box-edge": tr.RmsBox(interior=False),
    "kl-ball": tr.KLBall(),
    "kl-ball-damped": tr.KLBall(includes_damping=True),
    "relative-ball": tr.RelativeBall(),
    "relative-ball-fill": tr.RelativeBall(fill=True),
    "spectral-ball": tr.SpectralBall(dtype=None),
    "spectral-ball-clip": tr.SpectralBall(fill=False),
}
#: What takes only a positive semi-definite B, and says so by an error.
DEFINITE = {"dogleg", "kl-cg", "kl-ball", "kl-ball-damped"}
#: What sees only what products with the gradient excite: a curvature that g has no part in stays unmet.
KRYLOV = {"cauchy", "steihaug", "krylov", "cubic"}
#: What steps to the boundary whatever the model says, and never looks at the curvature's sign or only along -g.
FILLS = {"rms-box-edge", "relative-ball-fill", "spectral-ball"}


def propose(name: str, model: str, radius: float, diagonal: bool) -> tuple[tr.Proposal, tr.Solution, Any]:
    gradient, B, params = MODELS[model].build(diagonal)
    if name in SOLVERS:
        solver = SOLVERS[name]
        if name == "cubic":
            trust = tr.TrustRegion(tr.Unbounded(), solver, tr.AdaptiveCubic(initial_sigma=1 / radius))
        else:
            region = tr.KLBall() if name == "kl-cg" else tr.L2Ball()
            trust = tr.TrustRegion(region, solver, tr.RatioRadius(initial_radius=radius))
    else:
        # judged, so that an uphill step without a region is reported and not refused
        trust = tr.TrustRegion(REGIONS[name], radius=tr.RatioRadius(initial_radius=radius))
    state = trust.init(params, Estimator())  # type: ignore[arg-type]
    context = tr.StepContext(params=params, raw_gradient=gradient)
    found = trust.propose(state, gradient, B, context)
    assert found.solution is not None
    return found, found.solution, (gradient, B)


class Estimator:
    """A curvature without a second moment of its own."""

    tracks_second_moment = False


def check(name: str, model: str, radius: float, diagonal: bool, boundary: bool, negative: bool) -> None:
    found, solution, (gradient, B) = propose(name, model, radius, diagonal)
    mine = reduction(gradient, B, found.step)
    if name not in ("cubic", "relative-ball-fill", "spectral-ball"):  # the cubic term; the linear model
        assert float(found.predicted_reduction) == pytest.approx(mine, rel=1e-9)
    assert float(found.predicted_reduction) > 0
    assert solution.negative_curvature is not None
    assert bool(solution.negative_curvature) is negative
    assert bool(solution.on_boundary) is boundary
    assert found.on_boundary is solution.on_boundary
    for flag in (solution.on_boundary, solution.negative_curvature):
        assert flag.dtype == torch.bool
        assert flag.dim() == 0
    assert solution.iterations >= 1


EVERY = [*SOLVERS, *REGIONS]


@pytest.mark.parametrize("diagonal", [False, True], ids=["matrix", "diagonal"])
@pytest.mark.parametrize("name", EVERY)
def test_report_on_a_definite_model(name: str, diagonal: bool) -> None:
    """Far inside: Newton's step, no boundary. A small radius: the boundary. Never negative curvature."""
    held = {"cubic", *FILLS}  # the cubic term always holds back
    if name == "rms-box-edge":  # goes to the edge unasked: the model promises a loss, for a policy to see
        found, solution, (gradient, B) = propose(name, "definite", WIDE, diagonal)
        assert float(found.predicted_reduction) == pytest.approx(reduction(gradient, B, found.step))
        assert float(found.predicted_reduction) < 0
        assert bool(solution.on_boundary)
    else:
        check(name, "definite", WIDE, diagonal, boundary=name in held, negative=False)
    check(name, "definite", NARROW, diagonal, boundary=name != "unbounded", negative=False)


@pytest.mark.parametrize("diagonal", [False, True], ids=["matrix", "diagonal"])
@pytest.mark.parametrize("name", EVERY)
def test_report_on_an_indefinite_model(name: str, diagonal: bool) -> None:
    if name in DEFINITE:
        with pytest.raises(ValueError, match=r"positive (semi-)?definite curvature"):
            propose(name, "indefinite", 1.0, diagonal)
        return
    if name == "unbounded":  # the step goes uphill, which the policy's trial is there to refuse
        found, solution, _ = propose(name, "indefinite", 1.0, diagonal)
        assert not bool(solution.on_boundary)
        assert bool(solution.negative_curvature)
        assert solution.iterations == 1
        assert float(found.predicted_reduction) < 0
        return
    looks = name not in ("rms-box-edge",)
    check(name, "indefinite", 1.0, diagonal, boundary=True, negative=looks)


@pytest.mark.parametrize("diagonal", [False, True], ids=["matrix", "diagonal"])
@pytest.mark.parametrize("name", [n for n in EVERY if n not in DEFINITE and n != "rms-box-edge"])
def test_report_on_the_hard_case(name: str, diagonal: bool) -> None:
    """λ_min's eigenvector is unseen by products with g, and seen where all of B is."""
    found, solution, (gradient, B) = propose(name, "hard case", 10.0, diagonal)
    assert float(found.predicted_reduction) > 0
    assert solution.iterations >= 1
    seen = name == "exact" or (diagonal and name == "l2-ball")
    if name in KRYLOV or seen:
        assert bool(solution.negative_curvature) is seen
        assert bool(solution.on_boundary) is (seen or name == "cubic")
    if seen:
        # in a rotated basis the gradient's share is rounding, not 0: the same step, as a limit
        assert not diagonal or solution.diagnostics["hard_case"] is True
        assert float(found.step_norm) == pytest.approx(10.0)
        krylov, _, _ = propose("krylov", "hard case", 10.0, diagonal)
        assert reduction(gradient, B, found.step) > 10 * reduction(gradient, B, krylov.step)


@pytest.mark.parametrize("diagonal", [False, True], ids=["matrix", "diagonal"])
@pytest.mark.parametrize("name", EVERY)
def test_report_without_a_gradient(name: str, diagonal: bool) -> None:
    """No step, nothing predicted, nothing met; solvers that look at ‖g‖ on the host make no iteration."""
    found, solution, _ = propose(name, "no gradient", 1.0, diagonal)
    assert float(found.step_norm) == 0
    assert float(found.predicted_reduction) == 0
    assert bool(solution.negative_curvature) is False
    # a box whose sides are measured in gradients is a point here, and what is stretched to a sphere always ends on it
    assert bool(solution.on_boundary) is (name in FILLS or name == "rms-box")
    waits = {*SOLVERS} - {"cauchy"} | ({"l2-ball", "l2-ball-tensor", "relative-ball"} if diagonal else set())
    assert solution.iterations == (0 if name in waits else 1)


@pytest.mark.parametrize("name", ["steihaug", "krylov", "kl-cg"])
def test_iterations_count_products(name: str) -> None:
    """Four eigenvalues: four products find the minimiser, and each is one call."""
    gradient, B, _ = MODELS["definite"].build(False)
    calls = 0
    matvec = B.matvec

    def counted(v: Sequence[Tensor]) -> list[Tensor]:
        nonlocal calls
        calls += 1
        return matvec(v)

    B.matvec = counted  # type: ignore[method-assign]
    found = SOLVERS[name].solve(gradient, B, torch.tensor(WIDE**2, dtype=F64))
    assert found.iterations == 4
    more = {"kl-cg": 2}.get(name, 0)  # its residual that converged is computed anew, and F x for the scale
    assert calls == found.iterations + more


def test_iterations_of_an_exact_step_count_evaluations_of_the_secular_equation() -> None:
    inside = propose("exact", "definite", WIDE, False)[1]
    edge = propose("exact", "definite", NARROW, False)[1]
    assert inside.iterations == 1
    assert 2 <= edge.iterations <= 20
    assert math.isclose(float(torch.cat(edge.step).norm()), NARROW, rel_tol=1e-12)


def test_identity_is_never_negative() -> None:
    g = [torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=F64)]
    context = tr.StepContext(params=g)
    for region in REGIONS.values():
        state = region.init(g, Estimator())
        if hasattr(region, "observe"):
            region.observe(state, tr.StepContext(raw_gradient=g))
        found = region.minimise(state, g, IdentityOperator(g), torch.tensor(1.0, dtype=F64), 0.0, context)
        assert not bool(found.negative_curvature)


def test_dogleg_sees_negative_curvature_on_its_plane_where_newtons_step_goes_downhill() -> None:
    """h = (1, -5), g = (1, 1): gᵀp_B = -0.8 < 0, and gᵀBg = -4."""
    g = [torch.ones(2, dtype=F64)]
    with pytest.raises(ValueError, match="the curvature is not positive on the dogleg's plane"):
        tr.Dogleg().solve(
            g, DiagonalOperator([torch.tensor([1.0, -5.0], dtype=F64)]), torch.tensor(1.0, dtype=F64)
        )
