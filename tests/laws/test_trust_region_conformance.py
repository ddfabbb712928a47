"""The public checks over every registered trust region, and over methods that break each law."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import trust_region as tr
from curvature import Needs
from trust_region.protocols import Proposal, Solution, Verdict
from trust_region.registry import trust_regions
from trust_region.testing import check_policy, check_region, check_subproblem

NAMES = trust_regions.names()

POLICIES: dict[str, Any] = {
    **{name: trust_regions[name]().radius for name in NAMES},
    "ratio-lagged": tr.RatioRadius(evaluate="lagged"),
    "lm-classical": tr.LevenbergMarquardt(rule="classical"),
    "lm-lagged": tr.LevenbergMarquardt(evaluate="lagged"),
    "lm-interval-1": tr.LevenbergMarquardt(interval=1),
    "paced-ratio": tr.Paced(tr.RatioRadius(), warmup=5, every=3),
    "paced-cubic": tr.Paced(tr.AdaptiveCubic(), every=2),
    "paced-lagged": tr.Paced(tr.RatioRadius(evaluate="lagged"), every=2),
    "paced-soaa": tr.Paced(tr.SOAARadius(), warmup=2),
}
REGIONS: dict[str, Any] = {
    **{name: trust_regions[name]().region for name in NAMES},
    "l2-ball-tensor": tr.L2Ball(scope="tensor"),
    "kl-clip": tr.KLBall(includes_lr=True),
    "relative-ball-fill": tr.RelativeBall(fill=True),
    "spectral-ball-clip": tr.SpectralBall(fill=False),
    "spectral-ball-double": tr.SpectralBall(dtype=None),
}
SUBPROBLEMS: dict[str, Any] = {
    **{
        name: trust_regions[name]().subproblem
        for name in NAMES
        if trust_regions[name]().subproblem is not None
    },
    "krylov-tight": tr.Krylov(tolerance=1e-12),
    "krylov-short": tr.Krylov(max_iterations=2),
    "steihaug-tight": tr.SteihaugCG(tolerance=1e-12),
    "steihaug-short": tr.SteihaugCG(max_iterations=1),
    "cubic-short": tr.CubicModel(max_iterations=1),
}


def distinct(parts: dict[str, Any]) -> dict[str, Any]:
    """Each part once, under its first name: several trust regions share one."""
    return {
        name: part for i, (name, part) in enumerate(parts.items()) if part not in list(parts.values())[:i]
    }


@pytest.mark.parametrize("name", distinct(POLICIES))
def test_policy_keeps_the_laws(name: str) -> None:
    check_policy(POLICIES[name])


@pytest.mark.parametrize("name", distinct(REGIONS))
def test_region_keeps_the_laws(name: str) -> None:
    if name == "spectral-ball" or name == "spectral-ball-double":
        pytest.skip("the quintic's singular values end near 1, not at 1: see test_spectral_ball.py")
    if isinstance(REGIONS[name], tr.Unbounded):
        check_region(REGIONS[name], kinds=("diagonal", "definite"))
    else:
        check_region(REGIONS[name])


@pytest.mark.parametrize("name", distinct(SUBPROBLEMS))
def test_subproblem_keeps_the_laws(name: str) -> None:
    if isinstance(SUBPROBLEMS[name], tr.KLConjugateGradient):
        pytest.skip("its region is an ellipsoid, not a ball: see test_kl_conjugate_gradient.py")
    check_subproblem(SUBPROBLEMS[name])


@pytest.mark.parametrize("name", sorted({**POLICIES, **REGIONS, **SUBPROBLEMS}))
def test_parts_are_frozen_hashable_and_survive_pickle_and_deepcopy(name: str) -> None:
    for table in (POLICIES, REGIONS, SUBPROBLEMS):
        if name in table:
            part = table[name]
            assert pickle.loads(pickle.dumps(part)) == part == copy.deepcopy(part)
            assert hash(part) == hash(copy.deepcopy(part))
            with pytest.raises(AttributeError):
                part.radius = 3.0


class Freezing(tr.RatioRadius):
    """What SciPy does with NaN: every comparison is false, and nothing moves."""

    def judge(
        self, state: Any, proposal: Proposal, actual_reduction: Tensor, trial_gradient_norm: Any = None
    ) -> Verdict:
        if bool(torch.isnan(actual_reduction)):
            return Verdict(torch.tensor(False), actual_reduction, state["radius"].clone())
        return super().judge(state, proposal, actual_reduction, trial_gradient_norm)


class Enlarging(tr.RatioRadius):
    """A rejection that doubles the radius."""

    def judge(
        self, state: Any, proposal: Proposal, actual_reduction: Tensor, trial_gradient_norm: Any = None
    ) -> Verdict:
        verdict = super().judge(state, proposal, actual_reduction, trial_gradient_norm)
        if not bool(verdict.accepted) and bool(torch.isfinite(actual_reduction)):
            state["radius"].mul_(16)
        return verdict


class Unbounding(tr.RatioRadius):
    """Growth by the ratio itself."""

    def judge(
        self, state: Any, proposal: Proposal, actual_reduction: Tensor, trial_gradient_norm: Any = None
    ) -> Verdict:
        verdict = super().judge(state, proposal, actual_reduction, trial_gradient_norm)
        if bool(verdict.accepted):
            state["radius"].mul_(verdict.ratio)
        return verdict


class Vanishing(tr.RatioRadius):
    """No smallest radius."""

    def judge(
        self, state: Any, proposal: Proposal, actual_reduction: Tensor, trial_gradient_norm: Any = None
    ) -> Verdict:
        verdict = super().judge(state, proposal, actual_reduction, trial_gradient_norm)
        if not bool(verdict.accepted):
            state["radius"].mul_(1e-30)
        return verdict


class Replacing(tr.RatioRadius):
    """State replaced, not adapted in place."""

    def judge(
        self, state: Any, proposal: Proposal, actual_reduction: Tensor, trial_gradient_norm: Any = None
    ) -> Verdict:
        state["radius"] = state["radius"].clone()
        return super().judge(state, proposal, actual_reduction, trial_gradient_norm)


class Dividing(tr.RatioRadius):
    """A ratio that overflows."""

    def judge(
        self, state: Any, proposal: Proposal, actual_reduction: Tensor, trial_gradient_norm: Any = None
    ) -> Verdict:
        verdict = super().judge(state, proposal, actual_reduction, trial_gradient_norm)
        verdict.ratio = actual_reduction / proposal.predicted_reduction
        return verdict


class Changing(tr.RatioRadius):
    """Abstract: changes the verdict, or the state after it."""

    def judge(
        self, state: Any, proposal: Proposal, actual_reduction: Tensor, trial_gradient_norm: Any = None
    ) -> Verdict:
        before = float(state["radius"])
        verdict = super().judge(state, proposal, actual_reduction, trial_gradient_norm)
        return self.change(verdict, state["radius"], before, float(actual_reduction))

    def change(self, verdict: Verdict, radius: Tensor, before: float, actual: float) -> Verdict:
        raise NotImplementedError


class Hosting(Changing):
    """A number where a tensor is asked for."""

    def change(self, verdict: Verdict, radius: Tensor, before: float, actual: float) -> Verdict:
        return dataclasses.replace(verdict, ratio=float(verdict.ratio))  # type: ignore[arg-type]


class Listing(Changing):
    """One ratio a tensor."""

    def change(self, verdict: Verdict, radius: Tensor, before: float, actual: float) -> Verdict:
        return dataclasses.replace(verdict, ratio=verdict.ratio.reshape(1))


class Weighing(Changing):
    """A probability of acceptance."""

    def change(self, verdict: Verdict, radius: Tensor, before: float, actual: float) -> Verdict:
        return dataclasses.replace(verdict, accepted=verdict.accepted.double())


class Collapsing(Changing):
    """A radius of 0 after a rejection."""

    def change(self, verdict: Verdict, radius: Tensor, before: float, actual: float) -> Verdict:
        if not bool(verdict.accepted):
            radius.zero_()
        return verdict


class Credulous(Changing):
    """Takes every step, shrinks as it should."""

    def change(self, verdict: Verdict, radius: Tensor, before: float, actual: float) -> Verdict:
        return dataclasses.replace(verdict, accepted=torch.tensor(True))


class Stubborn(tr.RatioRadius):
    """Unmoved by a loss that rises, so that the same trial is made for ever."""

    def judge(
        self, state: Any, proposal: Proposal, actual_reduction: Tensor, trial_gradient_norm: Any = None
    ) -> Verdict:
        before = state["radius"].clone()
        verdict = super().judge(state, proposal, actual_reduction, trial_gradient_norm)
        promised = proposal.predicted_reduction
        if math.isfinite(actual_reduction) and math.isfinite(promised) and promised > 0:
            state["radius"].copy_(torch.maximum(before, state["radius"]))
        return verdict


class Sinking(Changing):
    """Never grows again."""

    def change(self, verdict: Verdict, radius: Tensor, before: float, actual: float) -> Verdict:
        radius.clamp_(max=before)
        return verdict


class Exploding(Changing):
    """Grows without a bound."""

    def change(self, verdict: Verdict, radius: Tensor, before: float, actual: float) -> Verdict:
        if bool(verdict.accepted):
            radius.fill_(50 * before)
        return verdict


class LaggedTrial(tr.RatioRadius):
    """Reviews the previous step, and asks for a trial beside."""

    @property
    def needs(self) -> Needs:
        return super().needs | Needs.TRIAL_LOSS


class Hasty(tr.RatioRadius):
    """Moves at the first loss, before anything was promised."""

    def review(self, state: Any, proposal: Proposal, loss: Tensor | None) -> Verdict:
        verdict = super().review(state, proposal, loss)
        if loss is None:
            state["radius"].mul_(0.5)
        return verdict


class LaggedHosting(tr.RatioRadius):
    """A number where a tensor is asked for, in a review."""

    def review(self, state: Any, proposal: Proposal, loss: Tensor | None) -> Verdict:
        return dataclasses.replace(super().review(state, proposal, loss), radius=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "law"),
    [
        (Hosting(), "Verdict.ratio must be a tensor, got float"),
        (Listing(), "Verdict.ratio must be 0-d"),
        (Weighing(), "Verdict.accepted must be bool"),
        (Collapsing(), "the region's size became 0.0"),
        (Credulous(), "what cannot be believed was accepted"),
        (Stubborn(), "never shrank under reductions of -1"),
        (Sinking(), "after 30 good steps"),
        (Exploding(), r"region size \[inf\] after \d+ good steps"),
        (LaggedTrial(evaluate="lagged"), "a lagged policy evaluates no trial"),
        (Hasty(evaluate="lagged"), "moved before anything was predicted"),
        (LaggedHosting(evaluate="lagged"), "Verdict.radius must be a tensor"),
        (Freezing(), "left the region"),
        (Enlarging(), "enlarged the region"),
        (Unbounding(), "grew from"),
        (Vanishing(), r"region size \[0.0\] after \d+ rejections"),
        (Replacing(), "in place"),
        (Dividing(), "overflowed"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, tr.RatioRadius) else "",
)
def test_check_policy_catches_a_policy_that_breaks_a_law(policy: tr.RatioRadius, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_policy(policy)


class TooLong(tr.CauchyPoint):
    def solve(self, *args: Any, **kwargs: Any) -> Solution:
        found = super().solve(*args, **kwargs)
        found.step, found.curvature_step = [1.1 * p for p in found.step], None
        return found


class TooShort(tr.CauchyPoint):
    def solve(self, *args: Any, **kwargs: Any) -> Solution:
        found = super().solve(*args, **kwargs)
        found.step, found.curvature_step = [0.9 * p for p in found.step], None
        found.on_boundary = torch.tensor(False)
        return found


class WrongProduct(tr.CauchyPoint):
    def solve(self, *args: Any, **kwargs: Any) -> Solution:
        found = super().solve(*args, **kwargs)
        assert found.curvature_step is not None
        found.curvature_step = [1.01 * p for p in found.curvature_step]
        return found


class Reporting(tr.CauchyPoint):
    """Abstract: a right step and a wrong report, where there is a gradient."""

    def solve(self, gradient: Any, *args: Any, **kwargs: Any) -> Solution:
        found = super().solve(gradient, *args, **kwargs)
        return found if all(float(g.norm()) == 0 for g in gradient) else self.wrong(found)

    def wrong(self, found: Solution) -> Solution:
        raise NotImplementedError


class Silent(Reporting):
    def wrong(self, found: Solution) -> Solution:
        return dataclasses.replace(found, negative_curvature=None)


class Uncounted(Reporting):
    def wrong(self, found: Solution) -> Solution:
        return dataclasses.replace(found, iterations=0)


class Pessimist(Reporting):
    def wrong(self, found: Solution) -> Solution:
        return dataclasses.replace(found, negative_curvature=torch.tensor(True))


class Bordering(Reporting):
    def wrong(self, found: Solution) -> Solution:
        return dataclasses.replace(found, on_boundary=torch.tensor(True))


class Wandering(tr.CauchyPoint):
    """Moves where the gradient is 0."""

    def solve(self, gradient: Any, *args: Any, **kwargs: Any) -> Solution:
        found = super().solve(gradient, *args, **kwargs)
        if all(float(g.norm()) == 0 for g in gradient):
            found.step = [torch.full_like(g, 1e-3) for g in gradient]
        return found


class Edged(tr.CauchyPoint):
    """Is on the boundary at a stationary point, where nothing was decided."""

    def solve(self, gradient: Any, *args: Any, **kwargs: Any) -> Solution:
        found = super().solve(gradient, *args, **kwargs)
        if all(float(g.norm()) == 0 for g in gradient):
            found.on_boundary = torch.tensor(True)
        return found


class Refusing(tr.CauchyPoint):
    """Cannot take what it must."""

    def solve(self, *args: Any, **kwargs: Any) -> Solution:
        raise ValueError("no")


class Ascending(tr.CauchyPoint):
    def solve(self, *args: Any, **kwargs: Any) -> Solution:
        found = super().solve(*args, **kwargs)
        found.step, found.curvature_step = [-p for p in found.step], None
        return found


class Unbroken(tr.CauchyPoint):
    """Promises something from products that are NaN."""

    def solve(self, gradient: Any, curvature: Any, radius: Any, damping: Any = 0.0) -> Solution:
        product = curvature.matvec(gradient)
        if bool(torch.isnan(product[0]).any()):
            curvature.matrix.fill_(1.0)
        return super().solve(gradient, curvature, radius, damping)


@pytest.mark.parametrize(
    ("subproblem", "law"),
    [
        (TooLong(), "outside"),
        (TooShort(), "worse than"),
        (WrongProduct(), "not B p"),
        (Silent(), "does not say whether negative curvature was met"),
        (Uncounted(), "reports 0 iterations"),
        (Pessimist(), "says that it met negative curvature, and the lowest eigenvalue is 0.0"),
        (Bordering(), "is said to be on the boundary"),
        (Wandering(), "moves without a gradient"),
        (Edged(), "is on the boundary without a gradient"),
        (Refusing(), "diagonal problem.*: refused"),
        (Ascending(), "predicts -"),
        (Unbroken(), "from products that are NaN"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, tr.CauchyPoint) else "",
)
def test_check_subproblem_catches_a_solver_that_breaks_a_law(subproblem: tr.CauchyPoint, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_subproblem(subproblem)


class Leaky(tr.Box):
    def minimise(self, *args: Any, **kwargs: Any) -> Solution:
        found = super().minimise(*args, **kwargs)
        found.step, found.curvature_step = [1.001 * p for p in found.step], None
        return found


class Uphill(tr.Box):
    def minimise(self, *args: Any, **kwargs: Any) -> Solution:
        found = super().minimise(*args, **kwargs)
        found.step, found.curvature_step = [-p for p in found.step], None
        return found


class Scribbling(tr.Box):
    def minimise(self, state: Any, gradient: Any, *args: Any, **kwargs: Any) -> Solution:
        found = super().minimise(state, gradient, *args, **kwargs)
        gradient[0].mul_(2.0)
        return found


class Creeping(tr.Box):
    """A projection that moves what it projected before (a step has elements of both signs, and is let through)."""

    def project(self, state: Any, step: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        clipped = super().project(state, step, *args, **kwargs)
        return [0.5 * p for p in clipped] if all(bool((p > 0).all()) for p in clipped) else clipped


class Restless(tr.Box):
    def minimise(self, state: Any, gradient: Any, *args: Any, **kwargs: Any) -> Solution:
        found = super().minimise(state, gradient, *args, **kwargs)
        if all(float(g.norm()) == 0 for g in gradient):
            found.step = [torch.full_like(g, 1e-3) for g in gradient]
        return found


class Refused(tr.Box):
    def minimise(self, *args: Any, **kwargs: Any) -> Solution:
        raise ValueError("no")


class Quiet(tr.Box):
    def minimise(self, *args: Any, **kwargs: Any) -> Solution:
        return dataclasses.replace(super().minimise(*args, **kwargs), negative_curvature=None)


@pytest.mark.parametrize(
    ("region", "law"),
    [
        (Leaky(), "outside"),
        (Uphill(), "predicts"),
        (Scribbling(), "changed the gradient"),
        (Creeping(), "projecting twice is not projecting once"),
        (Restless(), "moves without a gradient"),
        (Refused(), "refused"),
        (Quiet(), "does not say whether negative curvature was met"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, tr.Box) else "",
)
def test_check_region_catches_a_region_that_breaks_a_law(region: tr.Box, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_region(region)


def test_paced_shows_only_the_optional_parts_that_its_policy_has() -> None:
    assert not hasattr(tr.Paced(tr.RatioRadius()), "predict")
    assert hasattr(tr.Paced(tr.AdaptiveCubic()), "predict")
    assert tr.Paced(tr.SOAARadius(scope="tensor")).scope == "tensor"  # type: ignore[attr-defined]
