"""Matrix-free, low-rank and quasi-Newton curvature inside SecondOrder."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import LBFGS, LSR1, EmpiricalFisher, Fisher, GaussNewton, Hessian, LowRank
from curvature.protocols import TRANSIENT
from optimizers import SecondOrder
from tests.curvature import dense
from tests.curvature.matrix_free import cases
from trust_region import L2Ball, LevenbergMarquardt, RatioRadius, SteihaugCG, TrustRegion

CURVATURES: dict[str, Callable[[], Any]] = {
    "hessian": Hessian,
    "hessian by differences": lambda: Hessian(hvp="finite-difference"),
    "gauss-newton": GaussNewton,
    "fisher": lambda: Fisher("categorical"),
    "sampled fisher": lambda: Fisher("categorical", samples=4),
    "low rank": lambda: LowRank(rank=4, interval=3),
    "low rank hessian": lambda: LowRank(rank=4, of="hessian", interval=3),
    "lsr1": lambda: LSR1(history=5),
    "lbfgs": lambda: LBFGS(history=5),
}
#: Is made for the model that it is used on.
EMPIRICAL = object()


def trust_region() -> TrustRegion:
    return TrustRegion(region=L2Ball(), subproblem=SteihaugCG(), radius=RatioRadius())


def run(
    curvature: Any, steps: int, region: TrustRegion | None = None
) -> tuple[SecondOrder, nn.Module, list[float]]:
    model, loss_fn, x, y = cases.classification()
    optimizer = SecondOrder(
        model.parameters(),
        lr=1.0,
        curvature=EmpiricalFisher("categorical", model=model) if curvature is EMPIRICAL else curvature,
        trust_region=trust_region() if region is None else region,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = model(x)
        loss = loss_fn(z, y)
        optimizer.backward(loss, z)
        return loss

    return optimizer, model, [float(optimizer.step(closure).detach()) for _ in range(steps)]


@pytest.mark.parametrize("name", [*CURVATURES, "empirical fisher"])
def test_trust_region_lowers_the_loss(name: str) -> None:
    optimizer, model, losses = run(EMPIRICAL if name == "empirical fisher" else CURVATURES[name](), 40)
    assert all(b <= a for a, b in itertools.pairwise(losses))  # a trust region never climbs
    assert losses[-1] < 0.35 * losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert TRANSIENT not in optimizer._curvature_state


def test_exact_and_difference_hessian_take_the_same_steps() -> None:
    _, exact, _ = run(Hessian(), 8)
    _, difference, _ = run(Hessian(hvp="finite-difference"), 8)
    a, b = dense.flat(exact.parameters()), dense.flat(difference.parameters())
    assert dense.relative_error(b, a) < 1e-6


def test_gauss_newton_with_damping_takes_the_damped_step() -> None:
    model, loss_fn, x, y = cases.classification()
    z = model(x)
    params = dense.trainable(model)
    G, g = dense.gauss_newton(loss_fn(z, y), z, params), dense.gradient(loss_fn(model(x), y), params)
    expected = dense.flat(params) - torch.linalg.solve(G + 0.5 * torch.eye(len(G), dtype=G.dtype), g)
    _, moved, _ = run(GaussNewton(), 1, TrustRegion(radius=LevenbergMarquardt(initial_damping=0.5)))
    assert dense.relative_error(dense.flat(moved.parameters()), expected) < 1e-8


@pytest.mark.parametrize("name", ["hessian", "gauss-newton", "low rank", "lbfgs"])
def test_memory_does_not_grow_over_1000_steps(name: str) -> None:
    model, loss_fn, x, y = cases.classification()
    optimizer = SecondOrder(
        model.parameters(),
        lr=1e-3,
        curvature=CURVATURES[name](),
        trust_region=TrustRegion(region=L2Ball(), subproblem=SteihaugCG()),
    )

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    count = 0
    for step in range(1000):
        optimizer.zero_grad()
        z = model(x)
        loss = loss_fn(z, y)
        optimizer.backward(loss, z)
        optimizer.step()
        if step == 20:
            del z, loss
            count = alive()
    del z, loss
    assert alive() <= count


@pytest.mark.parametrize("name", ["lsr1", "lbfgs", "low rank", "sampled fisher"])
def test_interrupted_run_continues_as_the_whole_one(name: str) -> None:
    _, loss_fn, x, y = cases.classification()

    def fresh(model: nn.Module) -> SecondOrder:
        return SecondOrder(
            model.parameters(), lr=1.0, curvature=CURVATURES[name](), trust_region=trust_region()
        )

    def steps(model: nn.Module, optimizer: SecondOrder, count: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            z = model(x)
            loss = loss_fn(z, y)
            optimizer.backward(loss, z)
            return loss

        for _ in range(count):
            optimizer.step(closure)

    whole = cases.mlp()
    optimizer = fresh(whole)
    steps(whole, optimizer, 12)
    part = cases.mlp()
    first = fresh(part)
    steps(part, first, 6)
    second = fresh(part)
    second.load_state_dict(first.state_dict())
    steps(part, second, 6)
    assert torch.equal(dense.flat(part.parameters()), dense.flat(whole.parameters()))


def test_flat_loop_with_differences_names_the_closure() -> None:
    model, loss_fn, x, y = cases.classification()
    optimizer = SecondOrder(
        model.parameters(),
        curvature=Hessian(hvp="finite-difference"),
        trust_region=TrustRegion(region=L2Ball(), subproblem=SteihaugCG()),
    )
    loss_fn(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        optimizer.step()


def test_differences_leave_gradients_parameters_and_random_state() -> None:
    model, loss_fn, x, y = cases.classification()
    noisy = nn.Sequential(model, nn.Dropout(0.0))
    optimizer = SecondOrder(
        noisy.parameters(),
        lr=0.0,
        curvature=Hessian(hvp="finite-difference"),
        trust_region=TrustRegion(region=L2Ball(), subproblem=SteihaugCG()),
    )
    before = [p.detach().clone() for p in noisy.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(noisy(x), y)
        optimizer.backward(loss)
        return loss

    rng = torch.get_rng_state()
    optimizer.step(closure)
    expected = torch.autograd.grad(loss_fn(noisy(x), y), list(noisy.parameters()))
    assert all(torch.equal(p, b) for p, b in zip(noisy.parameters(), before, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(noisy.parameters(), expected, strict=True))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), rng)
