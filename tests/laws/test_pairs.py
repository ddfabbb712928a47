"""Pairs that cannot work are refused when they are built; nobody who says nothing about itself is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trust_region as tr
from curvature import GaussNewton, Hessian, HutchinsonDiagonal, Identity, LowRank, PerParameter
from curvature.operators import DiagonalOperator
from curvature.protocols import Needs, SingularCurvatureError
from curvature.registry import estimators
from optimizers import SecondOrder, build
from optimizers.checks import check_pair
from tests.laws.grid import CURVATURE_OPTIONS
from trust_region.registry import trust_regions
from trust_region.testing import MatrixOperator

INDEFINITE = {"hessian", "hessian-diagonal", "hutchinson-diagonal", "lsr1"}
DEFINITE_ONLY = {"backtracking", "dogleg", "kl-ball", "kl-clip", "ratio-kl-ball", "trpo", "unbounded"}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


@pytest.mark.parametrize("curvature", estimators.names())
def test_a_pair_is_refused_when_built_exactly_where_an_indefinite_curvature_meets_what_cannot_take_it(
    curvature: str,
) -> None:
    for name in trust_regions.names():
        options = CURVATURE_OPTIONS.get(curvature, {})

        def make(name: str = name, options: dict[str, Any] = options, **more: Any) -> SecondOrder:
            return build(network(), curvature=curvature, trust_region=name, curvature_options=options, **more)

        if curvature in INDEFINITE and name in DEFINITE_ONLY:
            with pytest.raises(ValueError, match=r"may be indefinite, and .*: use .* or convex=True"):
                make()
            make(convex=True)
        else:
            make()


def test_every_registered_estimator_says_whether_it_is_semidefinite() -> None:
    said = {}
    for name in estimators.names():
        optimizer = build(
            network(),
            curvature=name,
            trust_region="box",
            curvature_options=CURVATURE_OPTIONS.get(name, {}),
        )
        said[name] = optimizer.curvature.semidefinite  # type: ignore[attr-defined]
    assert {name for name, promise in said.items() if promise is not True} == INDEFINITE


def test_promises_follow_the_parts() -> None:
    assert LowRank(3).semidefinite
    assert not LowRank(3, of="hessian").semidefinite
    assert PerParameter([("*", Identity())]).semidefinite is True
    assert PerParameter([("*.bias", Identity()), ("*", HutchinsonDiagonal())]).semidefinite is False
    assert PerParameter([("*.bias", Identity()), ("*", Silent())]).semidefinite is None


class Silent:
    """A third party's curvature that says nothing about its sign."""

    needs = Needs.GRAD

    def init(self, params: Sequence[Tensor]) -> dict[str, Any]:
        return {"h": [torch.zeros_like(p) for p in params]}

    def update(self, state: dict[str, Any], seen: Any) -> None:
        for h in state["h"]:
            h.fill_(-1.0)

    def operator(self, state: dict[str, Any]) -> DiagonalOperator:
        return DiagonalOperator(state["h"])


@pytest.mark.parametrize(
    ("trust", "message"),
    [
        (tr.TrustRegion(tr.KLBall()), "KLBall needs positive semi-definite curvature"),
        (tr.TrustRegion(), "without a region its step goes uphill"),
        (tr.TrustRegion(radius=tr.SOAARadius()), "without a region its step goes uphill"),
    ],
)
def test_a_curvature_that_says_nothing_is_found_out_in_the_first_step(
    trust: tr.TrustRegion, message: str
) -> None:
    model = network()
    check_pair(Silent(), trust)  # type: ignore[arg-type]
    optimizer = SecondOrder(model.parameters(), lr=0.1, curvature=Silent(), trust_region=trust)  # type: ignore[arg-type]
    loss = model(torch.ones(5, 4)).square().mean()
    loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        optimizer.step(loss=loss)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_hand_made_newton_method_is_not_refused_and_solves_a_convex_problem() -> None:
    w = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = SecondOrder([w], lr=1.0, curvature=Hessian(), trust_region=tr.TrustRegion())
    optimizer.backward((torch.tensor([1.0, 50.0], dtype=torch.float64) * w**2).sum())
    optimizer.step()
    assert float(w.detach().abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("policy", "takes"),
    [
        (tr.FixedRadius(), True),
        (tr.SOAARadius(), True),
        (tr.RecordedRadius((1.0,)), True),
        (tr.LevenbergMarquardt(evaluate="lagged"), False),
        (tr.RatioRadius(), False),
    ],
)
def test_what_takes_every_step_without_a_region(policy: Any, takes: bool) -> None:
    assert tr.TrustRegion(radius=policy).takes_every_step is takes
    assert not tr.TrustRegion(region=tr.Box(), radius=policy).takes_every_step
    refusal = tr.TrustRegion(radius=policy).definite_only
    assert (refusal is not None) is takes
    check_pair(GaussNewton(), tr.TrustRegion(radius=policy))


@pytest.mark.parametrize("region", [tr.Box(), tr.L2Ball(), tr.RelativeBall(), tr.SpectralBall(fill=False)])
def test_an_eigenvalue_of_minus_the_damping_falls_back_to_the_cauchy_step(region: Any) -> None:
    """H + λI singular: measure zero, and met in training; without a damping it is the caller's to give one."""
    g = [torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)]
    Q = torch.linalg.qr(torch.arange(9.0, dtype=torch.float64).reshape(3, 3).cos()).Q
    B = MatrixOperator(Q @ torch.diag(torch.tensor([-0.25, 1.0, 2.0], dtype=torch.float64)) @ Q.T, g)
    context = tr.StepContext(params=[torch.ones(3, dtype=torch.float64)])
    one = torch.tensor(1.0, dtype=torch.float64)

    class Solving(MatrixOperator):
        def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
            raise SingularCurvatureError(
                "the damped curvature is singular; use a damping > 0 (or a larger one)"
            )

    singular = Solving(B.matrix, g)
    found = region.minimise({}, g, singular, one, 0.25, context)
    assert bool(found.diagnostics["cauchy_fallback"])
    p = found.step[0]
    assert float(g[0] @ p + 0.5 * p @ B.matrix @ p) < 0
    torch.testing.assert_close(found.curvature_step[0], B.matrix @ p)
    with pytest.raises(SingularCurvatureError):
        region.minimise({}, g, singular, one, 0.0, context)
