"""What Levenberg-Marquardt's ratio compares: the step that was taken, on the batch that judges it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import EmpiricalFisherDiagonal, Hessian
from optimizers import KFAC, SecondOrder
from trust_region import (
    KLBall,
    L2Ball,
    LevenbergMarquardt,
    Paced,
    SteihaugCG,
    StepContext,
    TrustRegion,
    Unbounded,
)
from trust_region.testing import MatrixOperator, random_problem


def judged(
    policy: LevenbergMarquardt,
    region: Any = None,
    *,
    lr: list[float | Tensor] | None = None,
    raw: list[Tensor] | None = None,
    share: float = 1.0,
) -> tuple[float, float, Tensor]:
    """One proposal on a definite problem; its promise, λ after a trial that kept ``share`` of it, and the ratio."""
    gradient, B, params = random_problem(0, "definite")
    trust = TrustRegion(region or Unbounded(), radius=policy)
    state = trust.init(params)
    context = StepContext(lr=lr, params=params, raw_gradient=gradient if raw is None else raw)
    found = trust.propose(state, gradient, B, context)
    promised = found.diagnostics.get("promised", found.predicted_reduction)
    assert isinstance(promised, Tensor)
    verdict = trust.judge(state, found, share * promised)
    return float(promised), float(state["damping"]), verdict.ratio  # type: ignore[arg-type]


def test_the_promise_is_that_of_the_step_taken_on_the_batchs_own_gradient() -> None:
    gradient, B, params = random_problem(0, "definite")
    raw = [g + 0.1 * torch.cos(torch.arange(g.numel(), dtype=g.dtype)).reshape(g.shape) for g in gradient]
    for lr in ([1.0] * 3, [0.3] * 3, [0.3, torch.tensor(0.7, dtype=torch.float64), 1.0]):
        policy = LevenbergMarquardt(initial_damping=0.1, radius=0.05)
        trust = TrustRegion(KLBall(includes_lr=True), radius=policy)
        found = trust.propose(
            trust.init(params), gradient, B, StepContext(lr=lr, params=params, raw_gradient=raw)
        )
        p = torch.cat([x.reshape(-1) for x in found.step])
        g = torch.cat([x.reshape(-1) for x in raw])
        assert isinstance(B, MatrixOperator)
        expected = -float(g @ p + 0.5 * p @ B.matrix @ p)
        promised, _, ratio = judged(policy, KLBall(includes_lr=True), lr=lr, raw=raw, share=0.5)
        assert promised == pytest.approx(expected, rel=1e-10)
        assert float(ratio) == pytest.approx(0.5)
        assert float(found.predicted_reduction) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("region", "radius", "lr", "falls"),
    [
        (None, 1.0, None, True),
        (None, 1.0, [1.0] * 3, True),
        (None, 1.0, [2.0] * 3, True),
        (None, 1.0, [torch.tensor(1.0)] * 3, True),
        (None, 1.0, [0.1] * 3, False),
        (None, 1.0, [1.0, torch.tensor(0.5), 1.0], False),
        (KLBall(), 1e-4, None, False),
        (KLBall(), 1e9, None, True),
    ],
)
def test_a_shortened_step_does_not_lower_the_damping_below_its_start(
    region: Any, radius: float, lr: Any, falls: bool
) -> None:
    policy = LevenbergMarquardt(initial_damping=0.1, interval=1, radius=radius)
    _, damping, _ = judged(policy, region, lr=lr)
    assert damping == pytest.approx(0.1 * 19 / 20 if falls else 0.1)
    _, damping, _ = judged(policy, region, lr=lr, share=0.1)
    assert damping == pytest.approx(0.1 * 20 / 19)


def test_a_shortened_step_undoes_a_rise() -> None:
    gradient, B, params = random_problem(0, "definite")
    trust = TrustRegion(
        KLBall(), radius=LevenbergMarquardt(initial_damping=0.1, interval=1, radius=1e-4, omega=0.5)
    )
    state = trust.init(params)
    seen = []
    for share in (0.1, 0.1, 1.0, 1.0, 1.0):
        found = trust.propose(state, gradient, B, StepContext(params=params, raw_gradient=gradient))
        trust.judge(state, found, share * found.predicted_reduction)
        seen.append(float(state["damping"]))  # type: ignore[arg-type]
    assert seen == pytest.approx([0.2, 0.4, 0.2, 0.1, 0.1])


def test_momentum_against_the_batch_tells_nothing_and_is_no_rejection() -> None:
    gradient, _, _ = random_problem(0, "definite")
    policy = LevenbergMarquardt(initial_damping=0.1, interval=1)
    promised, damping, ratio = judged(policy, raw=[-g for g in gradient])
    assert promised < 0
    assert damping == pytest.approx(0.1)
    assert bool(torch.isnan(ratio))


def blobs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(dim=1)
    return x, y


def train(model: nn.Module, optimizer: SecondOrder, steps: int, batch: int = 32) -> list[float]:
    """Minibatch steps; λ after each."""
    x, y = blobs()
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(steps):
        rows = torch.randint(0, len(x), (batch,), generator=generator)
        optimizer.step(closure(model, optimizer, x[rows], y[rows]))
        seen.append(float(optimizer.step_info.damping))
    return seen


def closure(
    model: nn.Module, optimizer: SecondOrder, x: Tensor, y: Tensor, calls: list[int] | None = None
) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        if calls is not None:
            calls.append(1)
        optimizer.zero_grad()
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        optimizer.backward(loss, outputs)
        return loss

    return evaluate


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()


@pytest.mark.parametrize("lr", [1.0, 0.1])
def test_kfacs_damping_does_not_run_away_under_a_small_rate_or_radius(lr: float) -> None:
    """It fell by (19/20)^5 at every look, to 1e-10, while the KL radius made every promise come true."""
    model = network()
    seen = train(model, KFAC(model, lr=lr, fisher="type-2", radius=1e-3, damping_interval=1), steps=120)
    assert min(seen) >= 0.01
    assert max(seen) < 1.0


def lm(policy: Any) -> Callable[[nn.Module], SecondOrder]:
    return lambda model: SecondOrder(
        model.parameters(),
        lr=1.0,
        curvature=EmpiricalFisherDiagonal(),
        trust_region=TrustRegion(radius=policy),
        momentum=0.5,
    )


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: Paced(p, warmup=0)])
def test_due_trials_pay_a_forward_pass_only_where_the_rule_looks(wrap: Any) -> None:
    x, y = blobs()
    counts, dampings = {}, {}
    for trials in ("every", "due"):
        model = network()
        optimizer = lm(wrap(LevenbergMarquardt(initial_damping=1.0, interval=3, trials=trials)))(model)
        calls: list[int] = []
        seen = []
        for _ in range(9):
            optimizer.step(closure(model, optimizer, x, y, calls))
            seen.append(float(optimizer.step_info.damping))
        counts[trials], dampings[trials] = len(calls), seen
    assert counts == {"every": 18, "due": 12}
    assert dampings["every"] == dampings["due"]  # no step was refused, so both take the same way
    assert dampings["due"][2] != 1.0


def test_hessian_free_damping_still_falls_to_newtons_method() -> None:
    """A whole step, at a rate of 1, inside the region: λ goes down, and convergence is fast."""
    w = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    trust = TrustRegion(L2Ball(), SteihaugCG(tolerance=1e-10), LevenbergMarquardt(rule="classical"))
    optimizer = SecondOrder([w], lr=1.0, curvature=Hessian(), trust_region=trust)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2
        optimizer.backward(loss)
        return loss

    for _ in range(60):
        optimizer.step(evaluate)
    assert float((w.detach() - 1).abs().max()) < 1e-8
    assert float(optimizer.step_info.damping) < 1e-4


def test_a_lagged_rule_is_held_by_the_step_that_it_judges() -> None:
    gradient, B, params = random_problem(0, "definite")
    for lr, expected in ((1.0, 0.05), (0.1, 0.1)):
        trust = TrustRegion(
            radius=LevenbergMarquardt(initial_damping=0.1, interval=1, omega=0.5, evaluate="lagged")
        )
        state = trust.init(params)
        loss = torch.tensor(10.0, dtype=torch.float64)
        found = trust.propose(
            state, gradient, B, StepContext(lr=[lr] * 3, params=params, raw_gradient=gradient)
        )
        trust.review(state, found, loss)
        # the step under review is the first one, whatever the second one's rate is
        second = trust.propose(
            state, gradient, B, StepContext(lr=[1.0] * 3, params=params, raw_gradient=gradient)
        )
        trust.review(state, second, loss - found.predicted_reduction)
        assert float(state["damping"]) == pytest.approx(expected)  # type: ignore[arg-type]


def test_trials_is_checked() -> None:
    with pytest.raises(ValueError, match="trials must be 'every' or 'due', got 'never'"):
        LevenbergMarquardt(trials="never")  # type: ignore[arg-type]
