"""Facts of single presets: Sophia's literal step, the replay's control, K-FAC in a flat loop, refused arguments."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import curvature
import optimizers
from curvature import AdaHessianDiagonal, EmpiricalFisherDiagonal, FlooredDiagonal, Observation
from curvature.hutchinson import over_space
from optimizers import SecondOrder
from trust_region import FixedRadius, KLBall, RmsBox, SOAARadius, TrustRegion


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (16,), generator=generator),
        )
        for _ in range(steps)
    ]


def test_sophia_g_takes_the_papers_step_with_drawn_labels() -> None:
    """θ ← θ - η clip(m / max(γh, ε), ρ), h a running mean from 0 of the diagonal that FisherDiagonal measures."""
    model = network()
    optimizer = optimizers.SophiaG(
        model.parameters(), lr=0.01, gamma=0.5, rho=0.4, interval=2, betas=(0.9, 0.8)
    )
    reference = curvature.estimators["fisher-diagonal"]("categorical", interval=2, beta=0.0)
    state = reference.init(list(model.parameters()))
    theta = [p.detach().clone() for p in model.parameters()]
    m, h = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
    empirical_differs = False
    for t, (x, y) in enumerate(batches(6)):
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        g = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        if reference.due(state):
            measured = reference.measure(state, curvature.LossGraph(loss, list(model.parameters()), outputs))
            reference.update(state, Observation(g, statistics=measured))
            diagonal = reference.operator(state).diagonal()
            h = [0.8 * a + 0.2 * b for a, b in zip(h, diagonal, strict=True)]
            empirical_differs |= not torch.allclose(diagonal[0], 16 * g[0] ** 2)
        else:
            reference.update(state, Observation(g))
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
        theta = [
            p - 0.01 * (a / (0.5 * b).clamp(min=1e-12)).clamp(-0.4, 0.4)
            for p, a, b in zip(theta, m, h, strict=True)
        ]
        optimizer.zero_grad()
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        optimizer.backward(loss, outputs)
        optimizer.step()
        for p, q in zip(model.parameters(), theta, strict=True):
            torch.testing.assert_close(
                p.detach(), q, rtol=1e-10, atol=1e-12, msg=lambda s, t=t: f"step {t}: {s}"
            )
    assert empirical_differs  # it is not the squared gradient of the data's labels


def test_replay_equals_soaa_without_its_fisher_branch() -> None:
    """SOAA with the interior switched off, and AdamW with the radii which that run used."""
    one, two = network(), network()
    soaa = SecondOrder(
        one.parameters(),
        lr=0.01,
        curvature=EmpiricalFisherDiagonal(),
        trust_region=TrustRegion(region=RmsBox(interior=False), radius=SOAARadius(total_steps=30)),
        momentum=0.9,
    )
    radii = [1.0]
    for x, y in batches(30):
        soaa.zero_grad()
        soaa.backward(nn.functional.cross_entropy(one(x), y))
        soaa.step()
        radii.append(float(soaa.step_info.radius))
    assert len(set(radii)) > 10
    replay = optimizers.AdamWReplay(two.parameters(), lr=0.01, radii=radii)
    for x, y in batches(30):
        replay.zero_grad()
        replay.backward(nn.functional.cross_entropy(two(x), y))
        replay.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("preset", [optimizers.KFAC, optimizers.EKFAC])
def test_kronecker_presets_in_a_loop_without_a_closure(preset: type[SecondOrder]) -> None:
    def turn(optimizer: SecondOrder, model: nn.Module) -> float:
        (x, y) = batches(1)[0]
        optimizer.zero_grad()
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        optimizer.backward(loss, outputs)
        optimizer.step()
        return loss.item()

    model = network()
    with pytest.raises(RuntimeError, match=r"call optimizer.step\(closure\)"):
        turn(preset(model), model)
    own = TrustRegion(region=KLBall(includes_lr=True), radius=FixedRadius(0.05, damping=0.1))
    for options in ({"damping": "fixed"}, {"damping": "lagged"}, {"trust_region": own}):
        model = network()
        optimizer = preset(model, **options)
        losses = [turn(optimizer, model) for _ in range(15)]
        assert losses[-1] < 0.7 * losses[0], options


def test_kfac_tries_only_the_steps_in_which_damping_is_looked_at() -> None:
    evaluations: list[int] = []
    for trials in ("every", "due"):
        model = network()
        optimizer = optimizers.KFAC(model, trials=trials, damping_interval=3)
        evaluations.append(0)
        for x, y in batches(6):

            def closure(x: Any = x, y: Any = y, model: nn.Module = model, it: Any = optimizer) -> Any:
                evaluations[-1] += 1
                it.zero_grad()
                outputs = model(x)
                loss = nn.functional.cross_entropy(outputs, y)
                it.backward(loss, outputs)
                return loss

            optimizer.step(closure)
    assert evaluations == [12, 8]
    with pytest.raises(ValueError, match="trials='due' goes with"):
        optimizers.KFAC(network(), trials="due", damping="fixed")


def test_ekfac_refuses_factored_damping() -> None:
    with pytest.raises(ValueError, match="EKFAC's damping is exact"):
        optimizers.EKFAC(network(), damping_kind="factored")


def test_kfac_holds_the_kl_bound_on_the_step_that_is_taken() -> None:
    model = network()
    optimizer = optimizers.KFAC(
        model, lr=0.7, damping="fixed", radius=1e-3, damping_kind="exact", fisher="type-2", momentum=0.0
    )
    for x, y in batches(5):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        optimizer.backward(loss, outputs)
        optimizer.step()
        step = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        B = optimizer.curvature.operator(optimizer._curvature_state)
        damped = [b + 0.03 * s for s, b in zip(step, B.matvec(step), strict=True)]
        energy = sum(float((s * b).sum()) for s, b in zip(step, damped, strict=True))
        assert energy == pytest.approx(1e-3, rel=1e-6)


def test_adahessian_averages_signed_values_over_the_kernel() -> None:
    """Equation (10): the mean over a kernel comes before the square, for convolutions alone."""
    h = torch.tensor([[[1.0, -3.0]]])
    assert torch.equal(over_space(h), torch.tensor([[[-1.0, -1.0]]]))
    assert torch.equal(over_space(h[0]), h[0])
    estimator = AdaHessianDiagonal(beta=0.5, power=0.5)
    state = estimator.init([h])
    for value in (h, 3.0 * h):
        estimator.update(state, Observation(gradient=[h], statistics={"diagonal": [value]}))
    # bias-corrected mean of 1 and 9 with weights 1/3 and 2/3, to the power 1/4
    torch.testing.assert_close(
        estimator.operator(state).diagonal()[0], torch.full((1, 1, 2), (19 / 3) ** 0.25)
    )


def test_wrapped_diagonals_refuse_what_is_not_diagonal() -> None:
    wrapped = FlooredDiagonal(curvature.Shampoo())
    state = wrapped.init([torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="wrap a diagonal estimator"):
        wrapped.operator(state)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("AdaHessian", {"eps": 0.0}, "eps must be > 0, got 0.0"),
        ("AdaHessian", {"hessian_power": 0.0}, r"power must be in \(0, 1\], got 0.0"),
        ("SophiaH", {"gamma": 0.0}, "gamma must be > 0, got 0.0"),
        ("SophiaH", {"rho": -1.0}, "rho must be > 0, got -1.0"),
        ("SophiaG", {"eps": 0.0}, "eps must be > 0, got 0.0"),
        ("LARS", {"trust_coefficient": 0.0}, "trust_coefficient must be > 0, got 0.0"),
        ("LAMB", {"cap": 0.0}, "cap must be > 0, got 0.0"),
        ("Muon", {"ns_steps": 0}, r"steps must be in \[1, 100\), got 0"),
        ("Muon", {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ("Shampoo", {"interval": 0}, "interval must be >= 1, got 0"),
        ("SOAP", {"max_dim": 0}, "max_dim must be >= 1 or None, got 0"),
        ("TrustRegionNewton", {"initial_radius": 0.0}, "initial_radius must be in"),
        ("HessianFree", {"initial_damping": 0.0}, "initial_damping must be in"),
        ("NaturalGradient", {"radius": -1.0}, "radius must be > 0 and finite, got -1.0"),
        ("CAT", {"omega": 1.0}, "omega must be > 1 and finite, got 1.0"),
        ("LSR1TrustRegion", {"history": 0}, "history must be"),
        ("LBFGSTrustRegion", {"safeguard": "other"}, "safeguard must be 'skip' or 'powell', got 'other'"),
        ("AdamWReplay", {"radii": [1.0, 0.0]}, r"radii\[1\] must be > 0 and finite, got 0.0"),
        ("AdamWReplay", {"radii": []}, "radii must hold at least one radius"),
    ],
)
def test_bad_arguments_are_refused_when_built(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(optimizers, name)(network().parameters(), **arguments)


@pytest.mark.parametrize("preset", [optimizers.KFAC, optimizers.EKFAC])
def test_bad_arguments_of_kronecker_presets(preset: type[SecondOrder]) -> None:
    with pytest.raises(ValueError, match="damping must be 'trial', 'lagged' or 'fixed', got 'none'"):
        preset(network(), damping="none")
    with pytest.raises(ValueError, match="give either trust_region="):
        preset(network(), radius=1.0, trust_region=TrustRegion())
    with pytest.raises(TypeError, match=r"model must be the torch.nn.Module itself, not its parameters"):
        preset(network().parameters())


def test_an_unknown_option_is_answered_with_the_nearest_and_with_all_that_are_passed_on() -> None:
    with pytest.raises(
        TypeError, match=r"SOAA takes no option 'beta': did you mean 'betas'\? valid: .*compile"
    ):
        optimizers.SOAA(network().parameters(), beta=(0.9, 0.99))  # type: ignore[arg-type]


def test_every_preset_names_its_source_and_where_its_defaults_come_from() -> None:
    """The paper with its equation, algorithm or section (AdamWReplay is this package's own), and the defaults."""
    tuned_elsewhere = {"kfac", "ekfac", "shampoo", "soap"}
    for name in optimizers.available()["optimizers"]:
        text = " ".join((optimizers.registry.optimizers[name].__doc__ or "").split())
        assert re.search(r"References?:", text), name
        place = r"equation|algorithm|section|appendix|procedure|theorem"
        source = text[re.search(r"References?:", text).start() :]
        assert (
            name == "adamw-replay"
            or re.search(place, source)
            or "those above" in source
            or "explanation" in source
        ), name
        assert "Defaults:" in text or name in tuned_elsewhere, name
        assert "Cost:" in text, name
