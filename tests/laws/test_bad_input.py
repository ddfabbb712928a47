"""Bad input is refused when built, or by a clear error in the first step: by name, and composed by hand."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import trust_region as tr
from curvature import DiagonalOperator, GaussNewton, Hessian, Identity, Needs
from optimizers import SecondOrder, build
from optimizers.registry import optimizers
from trust_region.registry import trust_regions

TRIAL = [name for name in trust_regions.names() if trust_regions[name]().needs & Needs.TRIAL_LOSS]
PRESETS = ["trust-region-newton", "arc", "cat", "hessian-free", "natural-gradient", "lsr1-trust-region",
           "lbfgs-trust-region", "kfac", "ekfac"]  # fmt: skip


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def flat_step(model: nn.Module, optimizer: SecondOrder) -> None:
    outputs = model(torch.ones(5, 4, dtype=torch.float64))
    loss = nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 0, 1, 1]))
    optimizer.backward(loss, outputs)
    optimizer.step(loss=loss)


def refuses_the_flat_loop(model: nn.Module, optimizer: SecondOrder) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"judges a trial point: call optimizer.step\(closure\)"):
        flat_step(model, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# --- a policy that needs a trial, without a closure -------------------------------------------------------------------


@pytest.mark.parametrize("name", TRIAL)
def test_a_trial_without_a_closure_is_refused_in_the_first_step(name: str) -> None:
    model = network()
    refuses_the_flat_loop(model, build(model, curvature="gauss-newton", trust_region=name))
    model = network()
    by_hand = SecondOrder(
        model.parameters(), lr=1.0, curvature=GaussNewton(), trust_region=trust_regions[name]()
    )
    refuses_the_flat_loop(model, by_hand)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_judges_a_trial_refuses_the_flat_loop(name: str) -> None:
    model = network()
    refuses_the_flat_loop(model, build(model, name))


def test_every_preset_that_judges_is_listed() -> None:
    judging = {name for name in optimizers.names() if build(network(), name).needs.trial}
    assert judging == set(PRESETS)


def test_a_closure_without_gradients_is_refused_where_the_trial_needs_them() -> None:
    """CAT's ratio needs the gradient at the trial point, and a closure that only evaluates gives none."""
    model = network()
    optimizer = build(model, "cat")
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        loss = model(torch.ones(5, 4, dtype=torch.float64)).square().mean()
        if len(calls) == 1:
            optimizer.zero_grad()
            optimizer.backward(loss)
            return loss
        return loss.detach()

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="the closure computed no gradient at the trial point"):
        optimizer.step(closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# --- sizes that are not positive --------------------------------------------------------------------------------------

#: What every entry calls the size of its region.
SIZES = ("radius", "initial_radius", "initial_damping", "initial_sigma", "damping")


def sized() -> list[tuple[str, str]]:
    found = []
    for name in trust_regions.names():
        factory = trust_regions[name]
        taken = list(inspect.signature(factory).parameters)
        policy = factory().radius
        found += [
            (name, size) for size in SIZES if size in taken or ("policy" in taken and hasattr(policy, size))
        ]
    return found


@pytest.mark.parametrize(("name", "size"), sized())
@pytest.mark.parametrize("value", [-1.0, math.nan, 0.0])
def test_a_size_that_is_not_positive_is_refused_when_built(name: str, size: str, value: float) -> None:
    if size == "damping" and value == 0.0:  # no damping at all is a choice
        trust_regions[name](damping=0.0)
        return
    with pytest.raises(ValueError, match=rf"{size} must be (> 0|>= 0|in)"):
        build(network(), curvature="gauss-newton", trust_region=name, trust_region_options={size: value})
    with pytest.raises(ValueError, match=rf"{size} must be (> 0|>= 0|in)"):
        trust_regions[name](**{size: value})


def test_every_region_with_a_size_is_listed() -> None:
    without = {"soaa", "tadam"}  # their radius is a multiplier, and starts at 1
    assert {name for name, size in sized() if size != "damping"} | without | {"unbounded"} == set(
        trust_regions.names()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tr.FixedRadius(-1.0), "radius must be > 0, got -1.0"),
        (lambda: tr.FixedRadius(math.nan), "radius must be > 0, got nan"),
        (lambda: tr.RecordedRadius((1.0, math.inf)), r"radii\[1\] must be > 0 and finite, got inf"),
        (lambda: tr.Backtracking(radius=math.inf), "radius must be > 0 and finite, got inf"),
        (lambda: tr.CAT(initial_radius=math.nan), "initial_radius must be in"),
        (lambda: tr.AdaptiveCubic(initial_sigma=0.0), "initial_sigma must be in"),
        (lambda: tr.AdaptiveCubic(initial_sigma=math.nan), "initial_sigma must be in"),
        (lambda: tr.LevenbergMarquardt(initial_damping=math.nan), "initial_damping must be in"),
        (lambda: tr.LevenbergMarquardt(radius=0.0), "radius must be > 0, got 0.0"),
        (lambda: tr.TrustRegion(damping=math.nan), "damping must be >= 0, got nan"),
    ],
)
def test_a_size_that_is_not_positive_is_refused_by_hand(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- an indefinite model ----------------------------------------------------------------------------------------------

INDEFINITE: dict[str, tr.TrustRegion] = {
    "dogleg": tr.TrustRegion(tr.L2Ball(), tr.Dogleg(), tr.RatioRadius()),
    "kl-ball": tr.TrustRegion(tr.KLBall()),
    "trpo": tr.TrustRegion(tr.KLBall(), tr.KLConjugateGradient(), tr.Backtracking(radius=0.1)),
    "unbounded": tr.TrustRegion(),
}


@pytest.mark.parametrize("name", INDEFINITE)
def test_an_indefinite_model_is_refused_when_built_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"Hessian may be indefinite, and .*: use .* or convex=True"):
        build(network(), curvature="hessian", trust_region=name)


@pytest.mark.parametrize("name", INDEFINITE)
def test_an_indefinite_model_composed_by_hand_is_refused_in_its_first_step(name: str) -> None:
    """-½‖w‖² + …: the Hessian diag(-1, 2) is indefinite, and nothing has moved when the error comes."""
    w = nn.Parameter(torch.tensor([1.0, 0.3], dtype=torch.float64))
    optimizer = SecondOrder([w], lr=1.0, curvature=Hessian(), trust_region=INDEFINITE[name])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -0.5 * w[0] ** 2 + w[1] ** 2
        optimizer.backward(loss)
        return loss

    with pytest.raises(ValueError, match=r"positive (semi-)?definite curvature|the curvature is indefinite"):
        optimizer.step(closure)
    assert torch.equal(w.detach(), torch.tensor([1.0, 0.3], dtype=torch.float64))


@pytest.mark.parametrize(
    "solver", [tr.CauchyPoint(), tr.SteihaugCG(), tr.Krylov(), tr.ExactSubproblem(), None], ids=str
)
def test_an_indefinite_model_without_a_bound_has_no_minimum(solver: Any) -> None:
    """An infinite radius is accepted (a convex model has its minimum), and the first step that needs one says so."""
    trust = tr.TrustRegion(tr.L2Ball(), solver, tr.FixedRadius(math.inf))
    w = nn.Parameter(torch.tensor([1.0, 0.3], dtype=torch.float64))
    # without a solver the ball's closed form is for a diagonal B: the identity, turned round
    optimizer = SecondOrder([w], lr=1.0, curvature=Hessian() if solver else Negative(), trust_region=trust)
    optimizer.backward(-0.5 * w[0] ** 2 - w[1] ** 2)
    with pytest.raises(ValueError, match="no minimum"):
        optimizer.step()
    assert torch.equal(w.detach(), torch.tensor([1.0, 0.3], dtype=torch.float64))


class Negative(Identity):
    """B = -I."""

    semidefinite = False

    def operator(self, state: Any) -> Any:
        return DiagonalOperator([-torch.ones_like(x) for x in super().operator(state).diagonal()])


# --- pairs that cannot work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tr.TrustRegion(tr.Box(), tr.SteihaugCG()),
            "SteihaugCG finds steps inside L2Ball only, got Box",
        ),
        (
            lambda: tr.TrustRegion(tr.RmsBox(), tr.Dogleg()),
            "Dogleg finds steps inside L2Ball only, got RmsBox",
        ),
        (lambda: tr.TrustRegion(tr.KLBall(), tr.CauchyPoint()), "CauchyPoint finds steps inside L2Ball only"),
        (lambda: tr.TrustRegion(tr.Unbounded(), tr.Krylov()), "Krylov finds steps inside L2Ball only"),
        (
            lambda: tr.TrustRegion(tr.KLBall(), tr.ExactSubproblem()),
            "ExactSubproblem finds steps inside L2Ball",
        ),
        (lambda: tr.TrustRegion(tr.L2Ball(), tr.KLConjugateGradient()), "inside KLBall only, got L2Ball"),
        (lambda: tr.TrustRegion(tr.L2Ball(), tr.CubicModel(), tr.AdaptiveCubic()), "inside Unbounded only"),
        (
            lambda: tr.TrustRegion(tr.Unbounded(), tr.CubicModel(), tr.CAT()),
            "CubicModel needs a policy that adapts σ",
        ),
        (lambda: tr.TrustRegion(tr.L2Ball(), tr.SteihaugCG(), tr.AdaptiveCubic()), "use it with CubicModel"),
        (
            lambda: tr.TrustRegion(tr.L2Ball(scope="tensor"), tr.SteihaugCG(), tr.RatioRadius()),
            "SteihaugCG finds one step inside one ball over all tensors",
        ),
        (
            lambda: tr.TrustRegion(tr.KLBall(includes_lr=True), tr.KLConjugateGradient()),
            "KLConjugateGradient measures the step before the learning rate",
        ),
        (
            lambda: tr.TrustRegion(tr.KLBall(includes_damping=True), tr.KLConjugateGradient()),
            "KLConjugateGradient measures the step by B alone, .*: leave includes_damping False",
        ),
        (
            lambda: tr.TrustRegion(tr.L2Ball(), radius=tr.SOAARadius(scope="tensor")),
            'needs a region with scope="tensor"',
        ),
        (
            lambda: tr.TrustRegion(tr.RmsBox(), radius=tr.LevenbergMarquardt()),
            "RmsBox needs a finite radius, and that of LevenbergMarquardt is infinite",
        ),
        (
            lambda: tr.TrustRegion(tr.SpectralBall(), radius=tr.FixedRadius(math.inf)),
            "SpectralBall needs a finite radius, and that of FixedRadius is infinite",
        ),
        (
            lambda: tr.TrustRegion(tr.RmsBox(), radius=tr.Paced(tr.LevenbergMarquardt())),
            "RmsBox needs a finite radius, and that of LevenbergMarquardt is infinite",
        ),
        (
            lambda: tr.TrustRegion(tr.Box(), radius=tr.FixedRadius(damping=0.1), damping=0.1),
            "FixedRadius has a damping of its own",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_held_together(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"curvature": "hessian", "trust_region": "kl-ball"},
            ValueError,
            "KLBall needs positive semi-definite",
        ),
        ({"curvature": "lsr1", "trust_region": "trpo"}, ValueError, "KLConjugateGradient needs positive"),
        ({"curvature": "hutchinson-diagonal"}, ValueError, "without a region nothing holds its step back"),
        ({"curvature": "identity", "trust_region": "ratio", "maximize": True}, ValueError, "negate the loss"),
        (
            {"curvature": "identity", "trust_region": "box", "damping": -1.0},
            ValueError,
            "damping must be >= 0",
        ),
        ({"curvature": "identity", "trust_region": "ration"}, KeyError, "did you mean 'ratio'"),
        (
            {"curvature": "identity", "trust_region": "box", "initial_radius": 1.0},
            TypeError,
            "no part takes an option",
        ),
        ({"optimizer": "arc", "trust_region": "ratio"}, TypeError, "not both"),
        ({"curvature": "fisher-diagonal"}, TypeError, r"'fisher-diagonal' needs likelihood=: build\(model"),
        ({"curvature": "low-rank", "trust_region": "ratio"}, TypeError, "'low-rank' needs rank=: build"),
    ],
)
def test_pairs_and_options_that_cannot_work_are_refused_by_build(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(network(), **options)
