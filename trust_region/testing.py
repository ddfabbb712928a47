"""Public conformance checks: does a policy, a region or a solver keep the laws of this package?

Run them over a method of your own; each raises :class:`AssertionError` with the law that is broken. The tests of
this package run them over every registered trust region.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.identity import Identity
from curvature.operators import DiagonalOperator, Operator
from curvature.protocols import CurvatureOperator, Needs, State
from trust_region.cauchy_point import CauchyPoint
from trust_region.fixed_radius import FixedRadius
from trust_region.protocols import Proposal, RadiusPolicy, Region, Solution, StepContext, Subproblem, Verdict
from trust_region.trust_region import TrustRegion

#: State entries that say how large the region is; a larger damping or weight is a smaller region.
SIZES = ("radius", "damping", "sigma")


class MatrixOperator(Operator):
    """B as a given symmetric matrix.

    Args:
        matrix: (P, P).
        like: tensors shaped like the parameters.

    >>> MatrixOperator(torch.eye(2), [torch.zeros(2)]).matvec([torch.ones(2)])
    [tensor([1., 1.])]
    """

    def __init__(self, matrix: Tensor, like: Sequence[Tensor]) -> None:
        super().__init__(like)
        self.matrix = matrix

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """B v."""
        self.check_vector(v)
        return vectors.unflatten(self.matrix @ vectors.flatten(v), self.like)

    def to_dense(self) -> Tensor:
        """The matrix."""
        return self.matrix


def proposal(
    predicted: float, norm: float = 1.0, on_boundary: bool = True, gradient_norm: float = 1.0
) -> Proposal:
    """A proposal of which only the scalars matter, float64."""
    return Proposal(
        step=[torch.full((1,), norm, dtype=torch.float64)],
        predicted_reduction=torch.tensor(predicted, dtype=torch.float64),
        predicted_parts=[torch.tensor(predicted, dtype=torch.float64)],
        step_norm=torch.tensor(norm, dtype=torch.float64),
        on_boundary=torch.tensor(on_boundary),
        diagnostics={"gradient_norm": gradient_norm},
    )


def check_policy(policy: RadiusPolicy, max_growth: float = 100.0) -> None:
    """Check the laws of radius policies on a grid of trials.

    A rejection never enlarges the region. What cannot be believed (a loss or prediction that is NaN or infinite, a
    prediction <= 0) is rejected and shrinks it, and so, in the end, does a loss that rises. However large ρ is,
    growth is bounded. The size stays positive and finite through hundreds of rejections, and comes back afterwards.
    Verdicts are tensors without infinities, and the state keeps its tensors, devices and dtypes.

    Args:
        policy: what to check. Its ``adapts`` names the state entries that move; one without it is checked on all.
        max_growth: the largest factor by which one accepted step may enlarge the region, 100 by default.

    Raises:
        AssertionError: naming the law and the trial that broke it.

    >>> from trust_region import RatioRadius
    >>> check_policy(RatioRadius())

    Cost: a few thousand calls of ``judge`` or ``review``, under two seconds.
    """
    params = [torch.zeros(1, dtype=torch.float64)]
    if policy.lagged:
        _check_lagged(policy, params)
        return
    moving = tuple(getattr(policy, "adapts", SIZES))
    big, nan = math.inf, math.nan
    reductions = [nan, big, -big, -1e300, -1.0, -1e-300, 0.0, 1e-300, 0.1, 0.2, 0.5, 1.0, 3.0, 1e300]
    predictions = [nan, big, -big, -1.0, 0.0, 1e-300, 1.0, 1e300]
    for actual, predicted, boundary in itertools.product(reductions, predictions, (True, False)):
        state = policy.init(params)
        before = sizes(state, moving)
        entries = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        verdict = _judge(policy, state, proposal(predicted, on_boundary=boundary), actual)
        trial = f"actual reduction {actual}, predicted {predicted}, boundary {boundary}"
        _check_verdict(policy, verdict, state, entries, moving, trial)
        credible = math.isfinite(actual) and math.isfinite(predicted) and predicted > 0
        accepted, after = bool(verdict.accepted), sizes(state, moving)
        if math.isfinite(actual) and not moving:
            continue
        assert credible or not accepted, f"{policy}: what cannot be believed was accepted ({trial})"
        for a, b in zip(before, after, strict=True):
            assert accepted or b <= a, f"{policy}: a rejection enlarged the region from {a} to {b} ({trial})"
            assert credible or b < a, f"{policy}: what cannot be believed left the region at {b} ({trial})"
            assert b <= a * max_growth, (
                f"{policy}: grew from {a} to {b}, more than {max_growth} times ({trial})"
            )
    if moving:
        _check_long_run(policy, params, moving)


def _check_long_run(policy: RadiusPolicy, params: Sequence[Tensor], moving: Sequence[str]) -> None:
    for bad in (math.nan, -1.0):
        state = policy.init(params)
        start = sizes(state, moving)
        for k in range(600):
            _judge(policy, state, proposal(1.0, norm=_step_norm(state)), bad)
            now = sizes(state, moving)
            assert all(0 < s < math.inf for s in now), f"{policy}: region size {now} after {k + 1} rejections"
        assert all(b < a for a, b in zip(start, now, strict=True)), (
            f"{policy}: never shrank under reductions of {bad}"
        )
        low = now
        for _ in range(30):
            _judge(policy, state, proposal(1.0, norm=_step_norm(state), gradient_norm=1e-3), 1.0)
        now = sizes(state, moving)
        assert all(b > a for a, b in zip(low, now, strict=True)), (
            f"{policy}: stayed at {low} after 30 good steps"
        )
    state = policy.init(params)
    for k in range(600):
        _judge(policy, state, proposal(1.0, norm=_step_norm(state), gradient_norm=0.0), 1.0)
        now = sizes(state, moving)
        assert all(0 < s < math.inf for s in now), f"{policy}: region size {now} after {k + 1} good steps"


def _check_lagged(policy: RadiusPolicy, params: Sequence[Tensor]) -> None:
    assert not policy.needs & Needs.TRIAL_LOSS, f"{policy}: a lagged policy evaluates no trial"
    losses = [1.0, 0.5, None, 0.4, math.nan, 0.3, math.inf, -1e300, 1e300, -5.0, -6.0, -math.inf, 0.0, 0.0]
    predictions = [1.0, 0.0, -1.0, 1e-300, 1e300, math.nan]
    state = policy.init(params)
    moving = [k for k in getattr(policy, "adapts", SIZES) if k in state]
    entries = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    for k in range(40):
        loss = losses[k % len(losses)]
        value = None if loss is None else torch.tensor(loss, dtype=torch.float64)
        verdict = policy.review(state, proposal(predictions[k % len(predictions)]), value)
        trial = f"step {k}, loss {loss}"
        _check_verdict(policy, verdict, state, entries, moving, trial)
    for first in (None, 1.0):
        state = policy.init(params)
        before = sizes(state, moving)
        policy.review(
            state, proposal(1.0), None if first is None else torch.tensor(first, dtype=torch.float64)
        )
        assert sizes(state, moving) == before, f"{policy}: moved before anything was predicted"


def _check_verdict(
    policy: RadiusPolicy,
    verdict: Verdict,
    state: State,
    entries: dict[str, Tensor],
    moving: Sequence[str],
    trial: str,
) -> None:
    for name in ("accepted", "ratio", "radius"):
        value = getattr(verdict, name)
        assert isinstance(value, Tensor), (
            f"{policy}: Verdict.{name} must be a tensor, got {type(value).__name__}"
        )
        assert value.dim() == 0, f"{policy}: Verdict.{name} must be 0-d, got shape {tuple(value.shape)}"
    assert verdict.accepted.dtype == torch.bool, f"{policy}: Verdict.accepted must be bool"
    assert not bool(torch.isinf(verdict.ratio)) or "inf" in trial, f"{policy}: the ratio overflowed ({trial})"
    for key, tensor in entries.items():
        assert state[key] is tensor, f"{policy}: state[{key!r}] was replaced; adapt it in place"
    for size in sizes(state, moving):
        assert 0 < size < math.inf, f"{policy}: the region's size became {size} ({trial})"


def sizes(state: State, moving: Sequence[str]) -> list[float]:
    """How large the region is, by every entry that moves: Δ, 1/λ, 1/σ."""
    out = []
    for key in moving:
        entry = state.get(key)
        for value in [entry] if isinstance(entry, Tensor) else cast("list[Tensor]", entry or []):
            size = float(value)
            out.append(size if key == "radius" else 1 / size)
    return out


def _step_norm(state: State) -> float:
    radius = state.get("radius")
    return min(float(radius), 1e3) if isinstance(radius, Tensor) and math.isfinite(float(radius)) else 1.0


def _judge(policy: RadiusPolicy, state: State, trial: Proposal, actual: float) -> Verdict:
    norm = torch.tensor(0.0, dtype=torch.float64) if policy.needs & Needs.TRIAL_GRADIENT else None
    return policy.judge(state, trial, torch.tensor(actual, dtype=torch.float64), norm)


def random_problem(seed: int, kind: str) -> tuple[list[Tensor], CurvatureOperator, list[Tensor]]:
    """Gradient, curvature and parameters of a small problem, float64.

    Args:
        seed: of its own generator.
        kind: ``"diagonal"``, ``"definite"`` (a positive definite matrix), ``"indefinite"`` or
            ``"indefinite-diagonal"``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    like = [normal(3, 2), normal(4), normal(1)]
    gradient = [normal(3, 2), normal(4), normal(1)]
    size = vectors.numel(like)
    if kind.endswith("diagonal"):
        values = [normal(*x.shape) for x in like]
        return (
            gradient,
            DiagonalOperator([v if kind.startswith("in") else v.abs() + 0.01 for v in values]),
            like,
        )
    A = normal(size, size)
    B = (
        0.5 * (A + A.T)
        if kind == "indefinite"
        else A @ A.T / size + 0.01 * torch.eye(size, dtype=torch.float64)
    )
    return gradient, MatrixOperator(B, like), like


KINDS = ("diagonal", "indefinite-diagonal", "definite", "indefinite")
RADII = (1e-6, 0.1, 1.0, 1e3)


def check_region(region: Region, kinds: Sequence[str] = KINDS, seeds: Sequence[int] = range(3)) -> None:
    """Check the laws of regions on random problems.

    A step lies inside (projecting it changes nothing), projecting twice is projecting once, the model falls, inputs
    stay as they are, and a zero gradient gives no step. The solution says how many iterations it took, and negative
    curvature is met only where there is some. A curvature that a region cannot take raises ``ValueError``.

    Args:
        region: what to check.
        kinds: kinds of problems, as in ``random_problem``.
        seeds: one problem each.

    Raises:
        AssertionError: naming the law and the problem that broke it.

    >>> from trust_region import Box
    >>> check_region(Box())
    """
    for kind, seed, radius in itertools.product(kinds, seeds, RADII):
        gradient, B, params = random_problem(seed, kind)
        trial = f"{region} on a {kind} problem, seed {seed}, radius {radius}"
        trust = TrustRegion(region=region, radius=FixedRadius(radius))
        state = trust.init(params, Identity())
        given = [x.clone() for x in gradient]
        context = StepContext(params=params, raw_gradient=gradient)
        try:
            found = trust.propose(state, gradient, B, context)
        except ValueError:
            assert kind.startswith("indefinite"), f"{trial}: refused"
            continue
        assert all(torch.equal(a, b) for a, b in zip(given, gradient, strict=True)), (
            f"{trial}: changed the gradient"
        )
        assert bool(found.predicted_reduction > 0), f"{trial}: predicts {float(found.predicted_reduction)}"
        assert found.solution is not None
        _check_report(found.solution, B, trial)
        Δ = cast(Tensor, state["radius"])
        held = StepContext(params=params)
        inside = region.project(state, found.step, gradient, B, Δ, held)
        _assert_close(inside, found.step, f"{trial}: the step is outside the region")
        outer = [10 * p + 1 for p in found.step]
        once = region.project(state, outer, gradient, B, Δ, held)
        twice = region.project(state, once, gradient, B, Δ, held)
        _assert_close(twice, once, f"{trial}: projecting twice is not projecting once")
        still = trust.propose(
            trust.init(params, Identity()),
            [torch.zeros_like(g) for g in gradient],
            B,
            StepContext(params=params),
        )
        assert float(still.step_norm) == 0, f"{trial}: moves without a gradient"


def check_subproblem(
    subproblem: Subproblem, kinds: Sequence[str] = KINDS, seeds: Sequence[int] = range(5)
) -> None:
    """Check the laws of subproblem solvers on random problems.

    The step is no worse than the Cauchy point, lies in the ball to rounding, is on the boundary where it says so, and
    its B p is B p. It says how many iterations it took, and meets negative curvature only where there is some. A zero
    gradient gives no step; products that are NaN end the search. A curvature that a solver cannot take raises
    ``ValueError``.

    Args:
        subproblem: what to check; with ``weight = "sigma"`` it is a cubic model's.
        kinds: kinds of problems, as in ``random_problem``.
        seeds: one problem each.

    Raises:
        AssertionError: naming the law and the problem that broke it.

    >>> from trust_region import SteihaugCG
    >>> check_subproblem(SteihaugCG())
    """
    cubic = getattr(subproblem, "weight", None) == "sigma"
    for kind, seed, value in itertools.product(kinds, seeds, RADII):
        gradient, B, _ = random_problem(seed, kind)
        radius = torch.tensor(value, dtype=torch.float64)
        trial = f"{subproblem} on a {kind} problem, seed {seed}, {'sigma' if cubic else 'radius'} {value}"
        try:
            found = subproblem.solve(gradient, B, radius)
        except ValueError:
            assert kind.startswith("indefinite"), f"{trial}: refused"
            continue
        norm = float(vectors.norm(found.step))
        _check_report(found, B, trial)
        if found.curvature_step is not None:
            _assert_close(found.curvature_step, B.matvec(found.step), f"{trial}: curvature_step is not B p")
        mine = reduction(gradient, B, found.step, value if cubic else 0.0)
        if cubic:
            best = cubic_cauchy_reduction(gradient, B, value)
        else:
            cauchy = CauchyPoint().solve(gradient, B, radius)
            best = reduction(gradient, B, cauchy.step)
            assert norm <= value * (1 + 1e-9), f"{trial}: ‖p‖ = {norm} is outside"
            if bool(found.on_boundary):
                assert norm >= value * (1 - 1e-6), f"{trial}: ‖p‖ = {norm} is said to be on the boundary"
        assert mine > 0, f"{trial}: predicts {mine}"
        assert mine >= best * (1 - 1e-9), f"{trial}: {mine} is worse than the Cauchy point's {best}"
        zeros = [torch.zeros_like(g) for g in gradient]
        try:
            still = subproblem.solve(zeros, B, radius)
        except ValueError:
            continue
        assert float(vectors.norm(still.step)) == 0, f"{trial}: moves without a gradient"
        assert not bool(still.on_boundary), f"{trial}: is on the boundary without a gradient"
    _check_broken(subproblem)


def _check_report(found: Solution, B: CurvatureOperator, trial: str) -> None:
    negative = found.negative_curvature
    assert negative is not None, f"{trial}: does not say whether negative curvature was met"
    assert found.iterations >= 1, f"{trial}: reports {found.iterations} iterations"
    if bool(negative):
        lowest = float(torch.linalg.eigvalsh(B.to_dense())[0])
        assert lowest <= 0, (
            f"{trial}: says that it met negative curvature, and the lowest eigenvalue is {lowest}"
        )


def _check_broken(subproblem: Subproblem) -> None:
    """Products that are NaN end the search, and predict nothing (or raise)."""
    gradient, B, params = random_problem(0, "definite")
    broken = MatrixOperator(torch.full_like(cast(MatrixOperator, B).matrix, math.nan), params)
    try:
        found: Solution = subproblem.solve(gradient, broken, torch.tensor(1.0, dtype=torch.float64))
    except (ValueError, ArithmeticError, RuntimeError):
        return
    predicted = reduction(gradient, broken, found.step)
    assert not predicted > 0, f"{subproblem}: predicts {predicted} from products that are NaN"


def reduction(
    gradient: Sequence[Tensor], B: CurvatureOperator, step: Sequence[Tensor], sigma: float = 0.0
) -> float:
    """-(gᵀp + ½ pᵀBp + (σ/3)‖p‖³)."""
    model = vectors.dot(gradient, step) + 0.5 * vectors.dot(step, B.matvec(step))
    return -float(model + sigma / 3 * vectors.norm(step) ** 3)


def cubic_cauchy_reduction(gradient: Sequence[Tensor], B: CurvatureOperator, sigma: float) -> float:
    """What the best step along -g reduces the cubic model by: the root of -‖g‖ + b t + σ t² = 0, t the length."""
    norm = float(vectors.norm(gradient))
    b = float(vectors.dot(gradient, B.matvec(gradient))) / norm**2
    t = 2 * norm / (b + math.sqrt(b * b + 4 * sigma * norm))
    return norm * t - 0.5 * b * t**2 - sigma / 3 * t**3


def _assert_close(a: Sequence[Tensor], b: Sequence[Tensor], message: str) -> None:
    scale = max(float(vectors.norm(b)), 1e-300)
    difference = float(vectors.norm(vectors.add(a, b, -1.0)))
    assert difference <= 1e-7 * scale, f"{message}: differs by {difference / scale:.2e}"
