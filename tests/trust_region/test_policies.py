"""Each policy against its paper written literally in Python floats, and what all of them survive."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import trust_region as tr
from curvature import Needs
from tests.trust_region.rosenbrock import minimise, rosenbrock
from trust_region.registry import trust_regions
from trust_region.testing import proposal

reductions = st.one_of(
    st.sampled_from([0.0, 1.0, 0.25, 0.75, 0.15, -1.0, math.nan, math.inf, -math.inf]), st.floats()
)
law = settings(max_examples=200, deadline=None, derandomize=True)


def run(
    policy: Any, trials: list[tuple[float, float, float, bool]], norm: float = 0.0
) -> list[tuple[bool, float]]:
    """(actual, predicted, ‖p‖, boundary) of every trial; whether accepted, and the radius afterwards."""
    state = policy.init([torch.zeros(1, dtype=torch.float64)])
    out = []
    for actual, predicted, length, boundary in trials:
        verdict = policy.judge(
            state,
            proposal(predicted, length, boundary),
            torch.tensor(actual, dtype=torch.float64),
            torch.tensor(norm, dtype=torch.float64),
        )
        out.append((bool(verdict.accepted), float(verdict.radius)))
    return out


def credible(actual: float, predicted: float) -> bool:
    return math.isfinite(actual) and math.isfinite(predicted) and predicted > 0


trials = st.lists(
    st.tuples(reductions, st.one_of(st.just(1.0), st.floats()), st.floats(1e-3, 1e3), st.booleans()),
    min_size=1,
    max_size=8,
)


@law
@given(trials)
def test_ratio_radius_is_algorithm_4_1_with_products_for_quotients(
    sequence: list[tuple[float, float, float, bool]],
) -> None:
    radius, expected = 1.0, []
    for actual, predicted, _, boundary in sequence:
        good = credible(actual, predicted)
        if not good or actual < 0.25 * predicted:
            radius = 0.25 * radius
        elif actual > 0.75 * predicted and boundary:
            radius = min(2 * radius, 1000.0)
        expected.append((good and actual > 0.15 * predicted, radius))
    assert run(tr.RatioRadius(), sequence) == expected


@law
@given(trials)
def test_martens_rule_moves_the_damping_every_five_steps(
    sequence: list[tuple[float, float, float, bool]],
) -> None:
    damping, expected = 1.0, []
    for k, (actual, predicted, _, boundary) in enumerate(sequence, start=1):
        good = credible(actual, predicted)
        if not good:
            damping *= 4.0
        elif k % 5 == 0:
            if actual > 0.75 * predicted:
                # a step that the region cut says nothing for a damping below the first one
                damping = max(damping * (19 / 20) ** 5, min(damping, 1.0) if boundary else 0.0)
            elif actual < 0.25 * predicted:
                damping /= (19 / 20) ** 5
        expected.append((good, pytest.approx(damping, rel=1e-12)))
    assert run(tr.LevenbergMarquardt(), sequence) == expected


@law
@given(trials)
def test_classical_levenberg_marquardt_rejects_and_delays_gratification(
    sequence: list[tuple[float, float, float, bool]],
) -> None:
    damping, expected = 1.0, []
    for actual, predicted, _, boundary in sequence:
        good = credible(actual, predicted)
        if not good:
            damping *= 4.0
        elif actual > 0.75 * predicted:
            damping = max(damping / 3.0, min(damping, 1.0) if boundary else 0.0)
        elif actual < 0.25 * predicted:
            damping *= 2.0
        expected.append((good and actual > 1e-4 * predicted, pytest.approx(damping, rel=1e-12)))
    assert run(tr.LevenbergMarquardt(rule="classical"), sequence) == expected


@law
@given(trials, st.floats(0, 1e3))
def test_cat_is_algorithm_1_of_hamad_and_hinder(
    sequence: list[tuple[float, float, float, bool]], norm: float
) -> None:
    beta = theta = 0.1
    radius, expected = 1.0, []
    for actual, predicted, length, _ in sequence:
        good = credible(actual, predicted)
        accepted = good and actual >= 0
        enough = accepted and actual >= beta * (predicted + 0.5 * theta * norm * length)
        length = min(length, radius)  # a step is inside its region
        if enough:
            radius = min(8.0 * length, 1e10)
        else:
            radius = length / 8.0
        expected.append((accepted, pytest.approx(radius, rel=1e-12)))
    assert run(tr.CAT(), sequence, norm) == expected


@law
@given(trials)
def test_adaptive_cubic_is_algorithm_2_1_with_the_update_of_section_7(
    sequence: list[tuple[float, float, float, bool]],
) -> None:
    sigma, expected = 3.0, []
    for actual, predicted, length, _ in sequence:
        good = credible(actual, predicted)
        accepted = good and actual >= 0.1 * predicted
        if not good:
            sigma = max(2 * sigma, 1.0 / length**2)  # ‖g‖ = 1 in these proposals
        elif not accepted:
            sigma = 2 * sigma
        elif actual > 0.9 * predicted:
            sigma = min(sigma, 1.0)
        expected.append((accepted, pytest.approx(min(max(sigma, 1e-16), 1e16), rel=1e-12)))
    assert run(tr.AdaptiveCubic(initial_sigma=3.0), sequence) == expected


def test_boundary_values_of_the_ratio_are_those_of_scipy() -> None:
    """ρ = ¼ does not shrink, ρ = ¾ does not grow, ρ = η is refused, ρ = 0/0 is refused."""
    one = [(0.25, 1.0, 1.0, True), (0.75, 1.0, 1.0, True), (0.15, 1.0, 1.0, True), (0.0, 0.0, 1.0, True)]
    assert run(tr.RatioRadius(), one) == [(True, 1.0), (True, 1.0), (False, 0.25), (False, 0.0625)]


def test_an_interior_step_never_enlarges_the_ratio_radius() -> None:
    assert run(tr.RatioRadius(), [(1.0, 1.0, 0.5, False)]) == [(True, 1.0)]


def test_a_reduction_lost_in_the_rounding_of_the_loss_counts_as_the_predicted_one() -> None:
    loss = torch.tensor(1e6, dtype=torch.float64)
    for policy in (tr.RatioRadius(), tr.AdaptiveCubic(), tr.CAT(), tr.LevenbergMarquardt(rule="classical")):
        for actual, expected in ((-1e-10, True), (-1e-8, False)):
            trial = proposal(1e-10, 1.0, True)
            trial.loss = loss
            state = policy.init([loss])
            verdict = policy.judge(
                state,
                trial,
                torch.tensor(actual, dtype=torch.float64),
                torch.tensor(0.0, dtype=torch.float64),
            )
            assert bool(verdict.accepted) is expected, policy


def test_rounding_rule_can_be_switched_off() -> None:
    trial = proposal(1e-10, 1.0, True)
    trial.loss = torch.tensor(1e6, dtype=torch.float64)
    policy = tr.RatioRadius(rounding=0)
    state = policy.init([trial.loss])
    assert not bool(policy.judge(state, trial, torch.tensor(-1e-10, dtype=torch.float64)).accepted)


# --- recovery -------------------------------------------------------------------------------------------------------

TRIAL_NAMES = [n for n in trust_regions.names() if trust_regions[n]().needs & Needs.TRIAL_LOSS]
#: What goes with the Hessian of the Rosenbrock function, which is indefinite in places.
HESSIAN_NAMES = ["ratio", "exact", "krylov", "cauchy", "cubic", "cat", "levenberg-marquardt"]


def trust(name: str) -> tr.TrustRegion:
    if name == "levenberg-marquardt":
        return trust_regions[name](cg=True, rule="classical", radius=10.0)
    return trust_regions[name]()


@pytest.mark.parametrize("name", HESSIAN_NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how_many", [1, 5])
def test_recovers_within_fifty_steps_of_a_trial_that_is_not_finite(
    name: str, bad: float, how_many: int
) -> None:
    """SciPy 1.17's radius freezes here, and the same trial is refused for ever."""
    x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64)

    def spoil(k: int, loss: Tensor) -> Tensor:
        return torch.full_like(loss, bad) if 5 <= k < 5 + how_many else loss

    done = minimise(trust(name), rosenbrock, x0, max_steps=5 + how_many + 50, spoil=spoil)
    assert not any(done.accepted[5 : 5 + how_many])
    assert done.losses[4 : 4 + how_many] == [done.losses[4]] * how_many
    later = done.losses[5 + how_many :]
    assert later[-1] < done.losses[4]
    assert all(b <= a for a, b in zip(done.losses, later, strict=False)), "the loss never rises"
    if name not in (
        "cauchy",
        "cat",
    ):  # steepest descent crawls along the valley; CAT needs 80 steps unspoiled
        assert done.gradient_norm < 1e-8


def test_a_region_of_nan_around_the_minimum_is_backed_out_of() -> None:
    """Not one bad trial but a wall: log of a negative number, as in a variance that went below zero."""

    def walled(x: Tensor) -> Tensor:
        return (x - 1e-3 * torch.log(x)).sum()

    x0 = torch.tensor([2.0, 2.0], dtype=torch.float64)
    for name in ("ratio", "exact", "krylov", "cubic", "cat"):
        done = minimise(trust(name), walled, x0, max_steps=200, gtol=1e-9)
        assert not all(done.accepted), name
        assert done.gradient_norm < 1e-9, name


@pytest.mark.parametrize("name", HESSIAN_NAMES)
def test_a_negative_loss_is_an_ordinary_loss(name: str) -> None:
    x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    plain = minimise(trust(name), rosenbrock, x0, max_steps=30)
    shifted = minimise(trust(name), lambda x: rosenbrock(x) - 64.0, x0, max_steps=30)
    assert shifted.accepted[:20] == plain.accepted[:20]
    assert shifted.radii[:20] == pytest.approx(plain.radii[:20], rel=1e-6)


# --- no wait for the host -------------------------------------------------------------------------------------------


class NoHost(TorchDispatchMode):
    """Fails where a tensor is read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "item" in str(func) or "is_nonzero" in str(func):
            raise AssertionError(f"the host was asked: {func}")
        return func(*args, **(kwargs or {}))


def test_no_host_sees_a_read() -> None:
    with NoHost(), pytest.raises(AssertionError, match="the host was asked"):
        float(torch.zeros(()) + 1)


@pytest.mark.parametrize("name", trust_regions.names())
def test_judging_never_waits_for_the_host(name: str) -> None:
    policy = trust_regions[name]().radius
    state = policy.init([torch.zeros(1)])
    trial, actual = proposal(1.0), torch.tensor(0.5)
    trial.loss = torch.tensor(1.0)
    with NoHost():
        if policy.lagged:
            policy.review(state, trial, actual)
        else:
            policy.judge(state, trial, actual, torch.tensor(0.1))


@pytest.mark.parametrize(
    "policy", [tr.RatioRadius(evaluate="lagged"), tr.LevenbergMarquardt(evaluate="lagged")]
)
def test_reviewing_never_waits_for_the_host(policy: Any) -> None:
    state = policy.init([torch.zeros(1)])
    with NoHost():
        for _ in range(2):
            tr.Paced(policy).review(
                {**state, "pace_steps": torch.zeros(())}, proposal(1.0), torch.tensor(1.0)
            )


# --- lagged -----------------------------------------------------------------------------------------------------------


def test_lagged_ratio_radius_judges_a_step_by_the_next_loss() -> None:
    policy = tr.RatioRadius(evaluate="lagged")
    assert policy.lagged
    assert not policy.needs & Needs.TRIAL_LOSS
    state = policy.init([torch.zeros(1, dtype=torch.float64)])
    #        loss, promised now, radius afterwards
    story = [
        (10.0, 1.0, 1.0),  # nothing was promised yet
        (9.0, 2.0, 2.0),  # 1 of 1 came: grow
        (8.8, 1.0, 0.5),  # 0.2 of 2: shrink
        (8.3, 1.0, 0.5),  # 0.5 of 1: stay
        (9.3, 1.0, 0.125),  # rose: shrink
        (None, 1.0, 0.125),  # no loss: nothing to judge
        (5.0, 1.0, 0.125),  # nor can this one be
        (4.0, 1.0, 0.25),  # 1 of 1: grow
        (math.nan, 1.0, 0.0625),  # the step led to NaN: shrink
        (4.0, 1.0, 0.0625),  # no loss before it
    ]
    for loss, promised, radius in story:
        value = None if loss is None else torch.tensor(loss, dtype=torch.float64)
        verdict = policy.review(state, proposal(promised), value)
        assert float(verdict.radius) == radius == float(state["radius"])  # type: ignore[arg-type]


def test_lagged_levenberg_marquardt_equals_the_trial_rule_on_the_same_reductions() -> None:
    actual, predicted = [0.9, 0.1, 0.5, -1.0, 0.8], [1.0] * 5
    trial = run(
        tr.LevenbergMarquardt(interval=1),
        [(a, p, 1.0, False) for a, p in zip(actual, predicted, strict=True)],
    )
    policy = tr.LevenbergMarquardt(interval=1, evaluate="lagged")
    state = policy.init([torch.zeros(1, dtype=torch.float64)])
    loss, radii = 10.0, []
    for reduction in [0.0, *actual]:
        loss -= reduction
        verdict = policy.review(state, proposal(1.0, 1.0, False), torch.tensor(loss, dtype=torch.float64))
        radii.append(float(verdict.radius))
    assert radii[1:] == pytest.approx([r for _, r in trial])


def test_paced_policy_holds_still_but_shrinks_on_rejection() -> None:
    good, bad = (1.0, 1.0, 1.0, True), (math.nan, 1.0, 1.0, True)
    paced = tr.Paced(tr.RatioRadius(), warmup=3, every=2)
    radii = [r for _, r in run(paced, [good, bad, good, good, good, good, good])]
    #         warm-up: still, shrinks, still; then every second step
    assert radii == [1.0, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0]


def test_backtracking_starts_afresh_after_every_accepted_step() -> None:
    bad, good = (-1.0, 1.0, 1.0, True), (0.1, 1.0, 1.0, True)
    out = run(tr.Backtracking(radius=2.0, shrink=0.5), [bad, bad, good, bad])
    assert out == [(False, 1.0), (False, 0.5), (True, 2.0), (False, 1.0)]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tr.RatioRadius(initial_radius=0.0), "initial_radius must be in"),
        (lambda: tr.RatioRadius(initial_radius=math.nan), "initial_radius must be in"),
        (lambda: tr.RatioRadius(initial_radius=2.0, max_radius=1.0), "initial_radius must be in"),
        (lambda: tr.RatioRadius(max_radius=math.inf), "max_radius must be"),
        (lambda: tr.RatioRadius(eta=0.3), "0 <= eta <= shrink_below"),
        (lambda: tr.RatioRadius(shrink=1.0), "shrink must be"),
        (lambda: tr.RatioRadius(grow=1.0), "grow must be"),
        (lambda: tr.RatioRadius(rounding=-1.0), "rounding must be"),
        (lambda: tr.RatioRadius(evaluate="later"), "evaluate must be"),  # type: ignore[arg-type]
        (lambda: tr.LevenbergMarquardt(initial_damping=0.0), "initial_damping must be in"),
        (lambda: tr.LevenbergMarquardt(min_damping=0.0), "min_damping"),
        (lambda: tr.LevenbergMarquardt(rule="other"), "rule must be"),  # type: ignore[arg-type]
        (lambda: tr.LevenbergMarquardt(interval=0), "interval must be"),
        (lambda: tr.LevenbergMarquardt(omega=1.0), "omega must be"),
        (lambda: tr.LevenbergMarquardt(increase=1.0), "increase must be"),
        (lambda: tr.LevenbergMarquardt(eta=0.25), "eta must be"),
        (lambda: tr.LevenbergMarquardt(radius=-1.0), "radius must be"),
        (lambda: tr.LevenbergMarquardt(rule="classical", evaluate="lagged"), "use rule='martens'"),
        (lambda: tr.AdaptiveCubic(initial_sigma=-1.0), "initial_sigma must be in"),
        (lambda: tr.AdaptiveCubic(eta1=0.95), "eta1, eta2 must satisfy"),
        (lambda: tr.AdaptiveCubic(min_sigma=0.0), "min_sigma"),
        (lambda: tr.AdaptiveCubic(increase=0.5), "increase must be"),
        (lambda: tr.CAT(initial_radius=-1.0), "initial_radius must be in"),
        (lambda: tr.CAT(beta=1.0), "beta must be"),
        (lambda: tr.CAT(beta=0.8, theta=0.5), "theta must be"),
        (lambda: tr.CAT(omega=1.0), "omega must be"),
        (lambda: tr.Backtracking(radius=0.0), "radius must be"),
        (lambda: tr.Backtracking(shrink=0.0), "shrink must be"),
        (lambda: tr.Backtracking(damping=-1.0), "damping must be"),
        (lambda: tr.Paced(warmup=-1), "warmup must be"),
        (lambda: tr.Paced(every=0), "every must be"),
        (lambda: tr.FixedRadius(0.0), "radius must be"),
        (lambda: tr.FixedRadius(damping=-1.0), "damping must be"),
        (lambda: tr.L2Ball(scope="layer"), "scope must be"),  # type: ignore[arg-type]
        (lambda: tr.SpectralBall(steps=0), "steps must be"),
        (lambda: tr.SpectralBall(scale="adam"), "scale must be"),  # type: ignore[arg-type]
        (lambda: tr.SpectralBall(fill=False, scale="original"), "goes with fill=True"),
        (lambda: tr.RelativeBall(floor=2.0, cap=1.0), "floor and cap"),
        (lambda: tr.SteihaugCG(max_iterations=0), "max_iterations must be"),
        (lambda: tr.SteihaugCG(tolerance=0.0), "tolerance must be"),
        (lambda: tr.Krylov(max_iterations=0), "max_iterations must be"),
        (lambda: tr.CubicModel(tolerance=2.0), "tolerance must be"),
        (lambda: tr.ExactSubproblem(max_size=0), "max_size must be"),
        (lambda: tr.TrustRegion(tr.Box(), tr.SteihaugCG(), tr.RatioRadius()), "inside L2Ball only, got Box"),
        (lambda: tr.TrustRegion(tr.Unbounded(), tr.CubicModel(), tr.RatioRadius()), "use AdaptiveCubic"),
        (lambda: tr.TrustRegion(tr.L2Ball(), tr.SteihaugCG(), tr.AdaptiveCubic()), "use it with CubicModel"),
        (lambda: tr.TrustRegion(radius=tr.AdaptiveCubic()), "use it with CubicModel"),
        (
            lambda: tr.TrustRegion(tr.L2Ball(), None, tr.SOAARadius(scope="tensor")),
            'needs a region with scope="tensor"',
        ),
    ],
)
def test_bad_input_is_refused_when_built(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_cat_without_the_trial_gradient_says_what_to_do() -> None:
    policy = tr.CAT()
    with pytest.raises(ValueError, match=r"trial_gradient_norm must be given.*step\(closure\)"):
        policy.judge(policy.init([torch.zeros(1)]), proposal(1.0), torch.tensor(1.0))


def test_every_name_of_a_trial_policy_is_exercised_above() -> None:
    known = {*HESSIAN_NAMES, "dogleg", "backtracking", "ratio-box", "ratio-kl-ball", "trpo"}
    assert set(TRIAL_NAMES) <= known, "a new trial policy: add it to the recovery tests"


@pytest.mark.parametrize(("actual", "grows"), [(0.149, False), (0.151, True)])
def test_cat_asks_for_more_where_the_trial_point_is_steep(actual: float, grows: bool) -> None:
    """β (q + θ/2 ‖∇f⁺‖ ‖d‖) = 0.1 (1 + 0.05 · 20 · 0.5) = 0.15."""
    assert run(tr.CAT(), [(actual, 1.0, 0.5, True)], norm=20.0) == [(True, 4.0 if grows else 0.0625)]
