"""Laws of every radius policy on random histories of trials, and what a rejected trial leaves behind in an optimizer.

SOAA's and Tadam's policies evaluate no trial and reject nothing: their law is that d stays between its two bounds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trust_region as tr
from curvature import GaussNewton, Identity, Needs
from optimizers import SecondOrder
from tests.trust_region import rosenbrock as module
from tests.trust_region.rosenbrock import Run, minimise, rosenbrock
from trust_region.registry import trust_regions
from trust_region.testing import SIZES, MatrixOperator, proposal, sizes

law = settings(max_examples=30, deadline=None, derandomize=True)

TRIAL: dict[str, Any] = {
    "ratio": tr.RatioRadius(),
    "ratio-greedy": tr.RatioRadius(eta=0.0, shrink=0.5, grow=10.0, max_radius=5.0),
    "lm-martens": tr.LevenbergMarquardt(),
    "lm-martens-each": tr.LevenbergMarquardt(interval=1, omega=2 / 3, radius=1.0),
    "lm-classical": tr.LevenbergMarquardt(rule="classical"),
    "cubic": tr.AdaptiveCubic(),
    "cat": tr.CAT(),
    "backtracking": tr.Backtracking(),
    "paced-ratio": tr.Paced(tr.RatioRadius(), warmup=3, every=2),
    "paced-cubic": tr.Paced(tr.AdaptiveCubic(), every=3),
    "paced-cat": tr.Paced(tr.CAT(), warmup=2),
}
LAGGED: dict[str, Any] = {
    "soaa": tr.SOAARadius(),
    "soaa-total": tr.SOAARadius(total_steps=20, gamma=0.25),
    "soaa-model": tr.SOAARadius(prediction="model"),
    "tadam": tr.TadamRadius(),
    "tadam-total": tr.TadamRadius(total_steps=20),
    "ratio-lagged": tr.RatioRadius(evaluate="lagged"),
    "lm-lagged": tr.LevenbergMarquardt(evaluate="lagged"),
    "paced-soaa": tr.Paced(tr.SOAARadius(), warmup=2, every=2),
    "paced-tadam": tr.Paced(tr.TadamRadius(), every=2),
    "paced-ratio-lagged": tr.Paced(tr.RatioRadius(evaluate="lagged"), every=2),
}
STILL: dict[str, Any] = {"fixed": tr.FixedRadius(), "recorded": tr.RecordedRadius((1.0, 2.0))}


def test_every_policy_is_covered() -> None:
    def bare(policy: Any) -> type:
        return type(getattr(policy, "policy", policy))

    covered = {bare(p) for table in (TRIAL, LAGGED, STILL) for p in table.values()} | {tr.Paced}
    public = {getattr(tr, name) for name in tr.__all__}
    policies = {c for c in public if isinstance(c, type) and issubclass(c, tr.Policy) and c is not tr.Policy}
    assert policies <= covered
    assert {bare(trust_regions[name]().radius) for name in trust_regions.names()} <= covered


extremes = [0.0, 1.0, -1.0, 0.25, 0.75, 1e-45, 1e38, -1e38, math.nan, math.inf, -math.inf]
number = st.one_of(st.sampled_from(extremes), st.floats(width=32))
trials = st.lists(
    st.tuples(number, number, st.floats(1e-3, 1e3), st.booleans(), st.floats(0, 1e3)), min_size=1, max_size=12
)


def judge(
    policy: Any, state: Any, trial: tuple[Any, ...], dtype: torch.dtype, loss: float | None = None
) -> tr.Verdict:
    actual, predicted, length, boundary, slope = trial
    promised = proposal(predicted, length, boundary, gradient_norm=1.0)
    promised = replace(
        promised,
        predicted_reduction=promised.predicted_reduction.to(dtype),
        step_norm=promised.step_norm.to(dtype),
        loss=None if loss is None else torch.tensor(loss, dtype=dtype),
    )
    return policy.judge(state, promised, torch.tensor(actual, dtype=dtype), torch.tensor(slope, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TRIAL)
@law
@given(history=trials)
def test_what_no_trial_may_do(name: str, dtype: torch.dtype, history: list[tuple[Any, ...]]) -> None:
    """A rejection never enlarges; NaN, ±Inf and a prediction <= 0 reject and shrink; sizes stay in their bounds."""
    policy = TRIAL[name]
    moving = policy.adapts
    state = policy.init([torch.zeros(1, dtype=dtype)])
    bounds = size_bounds(policy, state)
    for trial in history:
        before = sizes(state, moving)
        actual, predicted = (float(torch.tensor(x, dtype=dtype)) for x in trial[:2])
        verdict = judge(policy, state, trial, dtype)
        after = sizes(state, moving)
        credible = math.isfinite(actual) and math.isfinite(predicted) and predicted > 0
        accepted = bool(verdict.accepted)
        assert credible or not accepted
        for a, b, (low, high) in zip(before, after, bounds, strict=True):
            assert low <= b <= high
            assert accepted or b <= a
            # at the smallest size there is nothing left to shrink
            assert credible or b < a or a <= low * (1 + 1e-6)
        assert not math.isinf(float(verdict.ratio))
        assert math.isnan(float(verdict.ratio)) or credible or not accepted


def size_bounds(policy: Any, state: Any) -> list[tuple[float, float]]:
    """The smallest and the largest size that the policy's own bounds allow; to rounding of a float32 state."""
    inner = getattr(policy, "policy", policy)
    found = []
    for key in inner.adapts:
        if key == "radius":
            smallest = float(torch.finfo(state["radius"].dtype).tiny)
            largest = getattr(inner, "max_radius", None) or inner.radius
        else:
            kind = "damping" if key == "damping" else "sigma"
            smallest, largest = 1 / getattr(inner, f"max_{kind}"), 1 / getattr(inner, f"min_{kind}")
        found.append((smallest * (1 - 1e-6), largest * (1 + 1e-6)))
    return found


@pytest.mark.parametrize("name", TRIAL)
@law
@given(
    history=trials,
    worse=st.floats(1e-6, 1e6),
    predicted=st.floats(1e-3, 1e3),
    length=st.floats(1e-3, 1e3),
    boundary=st.booleans(),
)
def test_a_loss_that_rises_shrinks_the_region_before_long(
    name: str, history: list[tuple[Any, ...]], worse: float, predicted: float, length: float, boundary: bool
) -> None:
    """After any history. Martens' looks every five steps and takes no finite step back; the rest reject at once."""
    policy, dtype = TRIAL[name], torch.float64
    moving = policy.adapts
    state = policy.init([torch.zeros(1, dtype=dtype)])
    for trial in history:
        judge(policy, state, trial, dtype)
    inner = getattr(policy, "policy", policy)
    martens = isinstance(inner, tr.LevenbergMarquardt) and inner.rule == "martens"
    looks = inner.interval if martens else 1
    start, low = sizes(state, moving), [b[0] for b in size_bounds(policy, state)]
    for k in range(looks):
        before = sizes(state, moving)
        verdict = judge(policy, state, (-worse, predicted, length, boundary, 1.0), dtype)
        assert bool(verdict.accepted) is martens
        assert all(b <= a for a, b in zip(before, sizes(state, moving), strict=True)), k
    for a, b, least in zip(start, sizes(state, moving), low, strict=True):
        assert b < a or a <= least * (1 + 1e-5)


reviews = st.lists(st.tuples(st.one_of(st.none(), number), number, st.booleans()), min_size=1, max_size=15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAGGED)
@law
@given(history=reviews)
def test_what_no_review_may_do(name: str, dtype: torch.dtype, history: list[tuple[Any, ...]]) -> None:
    policy = LAGGED[name]
    inner = getattr(policy, "policy", policy)
    moving = [k for k in getattr(policy, "adapts", SIZES) if k in policy.init([torch.zeros(1)])]
    bounded = isinstance(inner, (tr.SOAARadius, tr.TadamRadius))
    state = policy.init([torch.zeros(1, dtype=dtype)])
    for loss, predicted, boundary in history:
        before = sizes(state, moving)
        value = None if loss is None else torch.tensor(loss, dtype=dtype)
        promised = proposal(predicted, on_boundary=boundary)
        promised = replace(
            promised,
            predicted_reduction=promised.predicted_reduction.to(dtype),
            predicted_parts=[promised.predicted_reduction.to(dtype)],
        )
        if hasattr(policy, "prepare"):
            policy.prepare(state, tr.StepContext(loss=value))
        verdict = policy.review(state, promised, value)
        after = sizes(state, moving)
        assert not math.isinf(float(verdict.ratio))
        for a, b in zip(before, after, strict=True):
            assert 0 < b < math.inf
            if bounded:
                widest = (1 - inner.gamma, 2.0) if inner.total_steps else (1 - inner.gamma, 1 + inner.gamma)
                assert widest[0] * (1 - 1e-6) <= b <= widest[1] * (1 + 1e-6)
            if loss is None or (bounded and not math.isfinite(loss)):
                assert b == a
            elif not math.isfinite(loss):
                assert b <= a


@pytest.mark.parametrize("name", STILL)
@law
@given(history=trials)
def test_a_radius_that_does_not_adapt_refuses_only_a_loss_that_is_not_finite(
    name: str, history: list[tuple[Any, ...]]
) -> None:
    policy = STILL[name]
    state = policy.init([torch.zeros(1, dtype=torch.float64)])
    start = float(state["radius"])
    for trial in history:
        verdict = judge(policy, state, trial, torch.float64)
        assert bool(verdict.accepted) is math.isfinite(trial[0])
        assert float(state["radius"]) == start


# --- rules of wrappers and line searches, literally -------------------------------------------------------------------


#: Trials of which most would enlarge the region: with arbitrary numbers nearly every one is a rejection.
mostly_good = st.lists(
    st.tuples(
        st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.2, -1.0, math.nan]),
        st.just(1.0),
        st.just(1.0),
        st.booleans(),
        st.just(0.0),
    ),
    min_size=3,
    max_size=14,
)


@law
@given(history=mostly_good, warmup=st.integers(0, 5), every=st.integers(1, 4))
def test_paced_moves_after_warmup_at_every_kth_step_and_on_rejections(
    history: list[tuple[Any, ...]], warmup: int, every: int
) -> None:
    """Beside the bare rule of algorithm 4.1: what it would do now, applied at steps w+1, w+1+k, … and when refused."""
    policy = tr.Paced(tr.RatioRadius(), warmup=warmup, every=every)
    state = policy.init([torch.zeros(1, dtype=torch.float64)])
    radius = 1.0
    for t, trial in enumerate(history, start=1):
        actual, predicted, _, boundary, _ = trial
        good = math.isfinite(actual) and math.isfinite(predicted) and predicted > 0
        accepted = good and actual > 0.15 * predicted
        bare = radius
        if not good or actual < 0.25 * predicted:
            bare = 0.25 * radius
        elif actual > 0.75 * predicted and boundary:
            bare = min(2 * radius, 1000.0)
        due = t > warmup and (t - warmup - 1) % every == 0
        radius = bare if due or not accepted else radius
        verdict = judge(policy, state, trial, torch.float64)
        assert bool(verdict.accepted) is accepted
        assert float(verdict.radius) == float(state["radius"]) == radius  # type: ignore[arg-type]


@law
@given(history=trials, radius=st.floats(1e-3, 1e3), shrink=st.floats(0.1, 0.9), eta=st.floats(0, 0.9))
def test_backtracking_is_the_line_search_of_trpo(
    history: list[tuple[Any, ...]], radius: float, shrink: float, eta: float
) -> None:
    """Schulman et al. 2015, appendix C: j = 0, 1, … until the loss falls by more than η of the promise; then j = 0."""
    policy = tr.Backtracking(radius=radius, shrink=shrink, eta=eta)
    state = policy.init([torch.zeros(1, dtype=torch.float64)])
    j = 0
    for trial in history:
        actual, predicted = trial[:2]
        falls = (
            math.isfinite(actual) and math.isfinite(predicted) and predicted > 0 and actual > eta * predicted
        )
        j = 0 if falls else j + 1
        verdict = judge(policy, state, trial, torch.float64)
        assert bool(verdict.accepted) is falls
        assert float(verdict.radius) == pytest.approx(radius * shrink**j, rel=1e-12)


def test_kl_clip_holds_the_step_that_is_taken_at_the_bound() -> None:
    """ν = min(1, √(κ / Σ η² pᵀFp)), p the damped Newton step, on random definite models (seeds 0 to 49)."""
    clipped = 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        g = torch.randn(6, generator=generator, dtype=torch.float64)
        F, damping, kappa, lr = (A @ A.T).numpy(), 0.1, 10.0 ** (seed % 5 - 3), 0.2 * (1 + seed % 3)
        trust = trust_regions["kl-clip"](radius=kappa, damping=damping)
        found = trust.propose(
            trust.init([g]), [g], MatrixOperator(torch.from_numpy(F), [g]), tr.StepContext(lr=[lr])
        )
        p = -np.linalg.solve(F + damping * np.eye(6), g.numpy())
        nu = min(1.0, math.sqrt(kappa / (lr**2 * float(p @ F @ p))))
        np.testing.assert_allclose(found.step[0].numpy(), lr * nu * p, rtol=1e-9)
        assert bool(found.on_boundary) is (nu < 1)
        clipped += nu < 1
    assert 10 < clipped < 40


# --- a rejected trial in an optimizer ---------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Batch-norm statistics, dropout, and a buffer that is replaced and not written into."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1.0
        return self.body(x)


JUDGED = [name for name in trust_regions.names() if trust_regions[name]().needs & Needs.TRIAL_LOSS]
WRAPPED: dict[str, tr.TrustRegion] = {
    **{name: trust_regions[name]() for name in JUDGED},
    "lm-classical-cg": trust_regions["levenberg-marquardt"](cg=True, rule="classical"),
    "paced-ratio": tr.TrustRegion(tr.L2Ball(), tr.SteihaugCG(), tr.Paced(tr.RatioRadius(), warmup=3)),
    "paced-cat": tr.TrustRegion(tr.L2Ball(), tr.Krylov(), tr.Paced(tr.CAT(), every=2)),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", WRAPPED)
def test_a_rejected_trial_leaves_parameters_buffers_and_random_state_bitwise(name: str, bad: float) -> None:
    """Every policy that judges: what the first evaluation left is what the step leaves, and the region is smaller."""
    trust = WRAPPED[name]
    torch.manual_seed(0)
    model, x = Noisy(), torch.randn(16, 5)
    optimizer = SecondOrder(model.parameters(), lr=1.0, curvature=Identity(), trust_region=trust)
    evaluations = 0
    after_first: dict[str, Tensor] = {}

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if evaluations % 2 == 0:
            moved.append(any(not torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True)))
            loss = loss * bad
            torch.rand(
                3
            )  # a trial that draws as many numbers as the first evaluation ends where that one did anyway
        optimizer.backward(loss)
        if evaluations % 2 == 1:
            after_first.update({k: v.clone() for k, v in model.state_dict().items()})
            after_first["random"] = torch.get_rng_state()
        return loss

    moving = trust.radius.adapts  # type: ignore[attr-defined]
    for _ in range(2):
        moved: list[bool] = []
        start = [p.detach().clone() for p in model.parameters()]
        before = sizes(optimizer._region_state, moving)
        optimizer.step(closure)
        assert moved == [True]  # the premise: the trial was somewhere else
        assert torch.equal(torch.get_rng_state(), after_first["random"])
        for key, value in model.state_dict().items():
            assert torch.equal(value, after_first[key]), key
        assert not bool(optimizer.step_info.accepted)
        for a, b in zip(before, sizes(optimizer._region_state, moving), strict=True):
            assert b < a


# --- recovery ---------------------------------------------------------------------------------------------------------

#: With the Hessian of Rosenbrock's function, indefinite in places; the rest with its Gauss-Newton matrix.
HESSIAN = {
    "ratio",
    "exact",
    "krylov",
    "cauchy",
    "cubic",
    "cat",
    "lm-classical-cg",
    "paced-ratio",
    "paced-cat",
}


def rosenbrock_run(name: str, steps: int, spoil: Any = None) -> Run:
    x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    trust = WRAPPED[name]
    if name in HESSIAN:
        return minimise(trust, rosenbrock, x0, max_steps=steps, spoil=spoil)
    exact = module.hessian
    module.hessian = lambda f, x: gauss_newton(x)
    try:
        return minimise(trust, rosenbrock, x0, max_steps=steps, spoil=spoil)
    finally:
        module.hessian = exact


def gauss_newton(x: Tensor) -> Tensor:
    """2 JᵀJ of the residuals 10 (y - x²) and 1 - x."""
    J = torch.tensor([[-20.0 * float(x[0]), 10.0], [-1.0, 0.0]], dtype=torch.float64)
    return 2 * J.T @ J


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", WRAPPED)
def test_a_trial_that_is_not_finite_costs_at_most_fifty_steps_on_rosenbrock(name: str, bad: float) -> None:
    """50 steps later the loss is below the undisturbed run's at the time of the trial (SciPy's is where it was)."""
    spoiled_at, steps = 5, 56
    free = rosenbrock_run(name, spoiled_at + 1)
    hurt = rosenbrock_run(name, steps, lambda k, loss: loss * 0 + bad if k == spoiled_at else loss)
    assert hurt.accepted[:spoiled_at] == free.accepted[:spoiled_at]
    assert not hurt.accepted[spoiled_at]
    assert torch.equal(hurt.iterates[spoiled_at], hurt.iterates[spoiled_at - 1])
    assert hurt.radii[spoiled_at] != hurt.radii[spoiled_at - 1] or name == "backtracking"
    assert hurt.losses[-1] < free.losses[spoiled_at] <= hurt.losses[spoiled_at]
    assert hurt.gradient_norm < 1e-8 or hurt.losses[-1] < 0.9 * hurt.losses[spoiled_at]


def test_the_gauss_newton_matrix_is_what_the_optimizers_one_would_be() -> None:
    """The premise of the recovery tests that need a definite B."""
    assert GaussNewton().semidefinite
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    r = torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
    J = torch.stack([torch.autograd.grad(r[i], x, retain_graph=True)[0] for i in range(2)])
    torch.testing.assert_close(gauss_newton(x.detach()), 2 * J.T @ J)
