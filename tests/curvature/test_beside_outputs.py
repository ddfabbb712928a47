"""A part of the loss that does not come through the outputs: refused in training, or left out by name; nothing else is.

Legend: f = ℓ(z(θ)) + r(θ), z the outputs. What is taken at the outputs is the curvature of ℓ(z(θ)), exactly.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import (
    EKFAC,
    KFAC,
    EmpiricalFisher,
    EmpiricalFisherDiagonal,
    Fisher,
    FisherDiagonal,
    GaussNewton,
    GaussNewtonDiagonal,
    Hessian,
    HutchinsonDiagonal,
    LossGraph,
    LowRank,
    PerParameter,
    beside_outputs,
)
from optimizers import SecondOrder, build
from tests.curvature import dense
from tests.curvature.cases import classes, reals, seeded
from trust_region import FixedRadius, L2Ball, SteihaugCG, TrustRegion

N = 6
X, Y = reals(N, 4), classes(N)

AT_OUTPUTS: dict[str, Callable[[nn.Module], Any]] = {
    "gauss-newton": lambda m: GaussNewton(),
    "fisher": lambda m: Fisher("categorical"),
    "sampled fisher": lambda m: Fisher("categorical", samples=2),
    "empirical fisher": lambda m: EmpiricalFisher("categorical", model=m),
    "fisher diagonal": lambda m: FisherDiagonal("categorical"),
    "gauss-newton diagonal": lambda m: GaussNewtonDiagonal(m),
    "empirical fisher diagonal": lambda m: EmpiricalFisherDiagonal(
        samples="per_sample", model=m, likelihood="categorical"
    ),
    "kfac": lambda m: KFAC(m, fisher="type-2"),
    "kfac, drawn labels": lambda m: KFAC(m, fisher="mc"),
    "kfac, empirical": lambda m: KFAC(m, fisher="empirical"),
    "kfac, inputs alone": lambda m: KFAC(m, fisher="forward-only"),
    "ekfac": lambda m: EKFAC(m, fisher="type-2"),
    "low rank, sketched": lambda m: LowRank(rank=3),
    "low rank, lanczos": lambda m: LowRank(rank=3, method="lanczos"),
    "mixed": lambda m: PerParameter([("*", KFAC(m))], model=m),
}


class Net(nn.Module):
    """Logits, a hidden layer and a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.side = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        return {"logits": self.head(h), "hidden": h, "side": self.side(h)}


def ce(out: Any) -> Tensor:
    return functional.cross_entropy(out["logits"], Y)


Loss = Callable[[Any, dict[str, Tensor]], Tensor]
BESIDE: dict[str, Loss] = {
    "a penalty on weights": lambda m, out: ce(out) + 0.1 * m.body.weight.square().sum(),
    "a penalty below rounding": lambda m, out: ce(out) + 1e-14 * m.body.weight.square().sum(),
    "a penalty on hidden activations": lambda m, out: ce(out) + out["hidden"].abs().mean(),
    "a second output": lambda m, out: ce(out) + out["side"].square().mean(),
    "a part of another part of the outputs": lambda m, out: ce(out) + out["hidden"].logsumexp(1).mean(),
    "a weight in the loss": lambda m, out: functional.cross_entropy(
        out["logits"] * m.head.bias.exp().sum(), Y
    ),
}


def optimizer_for(estimator: Any, model: nn.Module, **options: Any) -> SecondOrder:
    return SecondOrder(
        model.parameters(),
        lr=0.1,
        curvature=estimator,
        trust_region=TrustRegion(
            region=L2Ball(), subproblem=SteihaugCG(max_iterations=2), radius=FixedRadius(1.0)
        ),
        **options,
    )


def train(optimizer: SecondOrder, model: nn.Module, loss_of: Loss, steps: int = 1, given: str = "") -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(X)
        optimizer.backward(loss_of(model, out), out[given] if given else out)
        optimizer.step()


@pytest.mark.parametrize("what", BESIDE)
@pytest.mark.parametrize("name", AT_OUTPUTS)
def test_curvature_at_the_outputs_refuses_a_loss_with_a_part_beside_them(name: str, what: str) -> None:
    model = seeded(Net())
    optimizer = optimizer_for(AT_OUTPUTS[name](model), model)
    before = dense.flat(model.parameters())
    with pytest.raises(ValueError, match=r"(?s)reaches parameter \d of shape .*beside_outputs='drop'"):
        train(optimizer, model, BESIDE[what])
    assert torch.equal(before, dense.flat(model.parameters()))


@pytest.mark.parametrize("name", AT_OUTPUTS)
def test_what_is_beside_the_outputs_is_left_out_by_name(name: str) -> None:
    """The same curvature as that of the loss without it."""
    pulls = []
    for loss_of, options in (
        (BESIDE["a penalty on weights"], {"beside_outputs": "drop"}),
        (lambda m, out: ce(out), {}),
    ):
        model = seeded(Net())
        estimator = AT_OUTPUTS[name](model)
        optimizer = optimizer_for(estimator, model, **options)
        optimizer.zero_grad()
        out = model(X)
        seen: list[list[Tensor]] = []
        operator = estimator.operator
        v = [reals(*p.shape, seed=30 + i) for i, p in enumerate(model.parameters())]

        def watched(state: Any, operator: Any = operator, v: Any = v, seen: Any = seen) -> Any:
            B = operator(state)
            seen.append(B.matvec(v))
            return B

        object.__setattr__(estimator, "operator", watched)
        optimizer.backward(loss_of(model, out), out)
        (penalty,) = torch.autograd.grad(0.1 * model.body.weight.square().sum(), model.body.weight)
        pulls.append((dense.flat(seen[0]) if seen else None, model.body.weight.grad.clone(), penalty))
        optimizer.step()
        pulls[-1] = (dense.flat(seen[0]), *pulls[-1][1:])
    (B, g, penalty), (B_alone, g_alone, _) = pulls
    assert dense.relative_error(B, B_alone) < 1e-10
    assert dense.relative_error(g, g_alone + penalty) < 1e-12  # the gradient keeps it


NOTHING_BESIDE: dict[str, Loss] = {
    "the loss alone": lambda m, out: ce(out),
    "scaled": lambda m, out: ce(out) * 1024.0 / 4,
    "a view of the outputs": lambda m, out: functional.cross_entropy(
        out["logits"].view(3, 2, 3).flatten(0, 1), Y
    ),
    "some of the outputs": lambda m, out: functional.cross_entropy(out["logits"][2:], Y[2:]),
    "the outputs twice": lambda m, out: ce(out) + 0.1 * out["logits"].square().mean(),
    "a copy of the outputs": lambda m, out: functional.cross_entropy(out["logits"].clone(), Y),
    "a constant penalty": lambda m, out: ce(out) + m.body.weight.detach().square().sum(),
    "a penalty times zero": lambda m, out: ce(out) + 0.0 * sum(p.sum() for p in m.parameters()),
    "noise on the labels": lambda m, out: functional.cross_entropy(
        out["logits"], (torch.eye(3)[Y].double() + 0.1 * reals(N, 3)).softmax(1)
    ),
    "a hidden layer without a gradient": lambda m, out: ce(out) * out["hidden"].detach().abs().mean(),
    "checkpointed": lambda m, out: torch.utils.checkpoint.checkpoint(ce, out, use_reentrant=False),
}


@pytest.mark.parametrize("what", NOTHING_BESIDE)
@pytest.mark.parametrize("name", ["gauss-newton diagonal", "kfac", "gauss-newton", "mixed"])
def test_no_other_loss_is_refused(name: str, what: str) -> None:
    model = seeded(Net())
    optimizer = optimizer_for(AT_OUTPUTS[name](model), model)
    train(optimizer, model, NOTHING_BESIDE[what], steps=2)


def test_parameters_of_the_loss_belong_to_whoever_trains_them() -> None:
    """A learned temperature is beside the outputs for an optimizer that holds it, and nothing to another."""
    model, temperature = seeded(Net()), nn.Parameter(torch.ones((), dtype=torch.float64))

    def loss_of(m: Any, out: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(out["logits"] * temperature, Y)

    train(optimizer_for(GaussNewtonDiagonal(model), model), model, loss_of)
    assert temperature.grad is not None
    holder = nn.Module()
    holder.model, holder.temperature = model, temperature
    both = optimizer_for(GaussNewtonDiagonal(model), holder)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(\) by another way"):
        train(both, model, loss_of)


@pytest.mark.parametrize(
    "name", ["gauss-newton", "gauss-newton diagonal", "empirical fisher diagonal", "kfac"]
)
def test_a_frozen_parameter_is_nothing_beside_the_outputs(name: str) -> None:
    model = seeded(Net())
    optimizer = optimizer_for(AT_OUTPUTS[name](model), model)
    model.body.weight.requires_grad_(False)
    train(optimizer, model, BESIDE["a penalty on weights"])


def test_a_part_that_comes_later_is_found_when_it_comes() -> None:
    model = seeded(Net())
    optimizer = optimizer_for(KFAC(model), model)
    weight = [0.0]

    def loss_of(m: Any, out: dict[str, Tensor]) -> Tensor:
        return ce(out) + weight[0] * m.body.weight.square().sum()

    train(optimizer, model, loss_of, steps=2)
    weight[0] = 0.1
    with pytest.raises(ValueError, match="by another way than the outputs"):
        train(optimizer, model, loss_of)


def test_only_parameters_with_curvature_at_the_outputs_are_asked_about() -> None:
    model = seeded(Net())
    rules = [("body.*", HutchinsonDiagonal(interval=1)), ("*", GaussNewtonDiagonal(model))]
    train(optimizer_for(PerParameter(rules, model=model), model), model, BESIDE["a penalty on weights"])
    other = optimizer_for(PerParameter(list(reversed([rules[0], ("*", rules[1][1])])), model=model), model)
    with pytest.raises(ValueError, match="by another way than the outputs"):
        train(other, model, BESIDE["a penalty on weights"])


@pytest.mark.parametrize("estimator", [Hessian(), HutchinsonDiagonal(interval=1), EmpiricalFisherDiagonal()])
@pytest.mark.parametrize("what", BESIDE)
def test_curvature_of_the_whole_loss_takes_every_loss(estimator: Any, what: str) -> None:
    model = seeded(Net())
    train(optimizer_for(estimator, model), model, BESIDE[what])


def test_the_outputs_of_a_node_with_several_are_told_apart() -> None:
    """Of ``split`` or an LSTM one output may be given while the loss reads the others."""
    model = seeded(nn.Linear(4, 6))
    params = list(model.parameters())

    def graph(loss: Callable[[Tensor, Tensor], Tensor]) -> LossGraph:
        a, b = model(X).split(3, 1)
        return LossGraph(loss(a, b), params, a)

    assert graph(lambda a, b: functional.cross_entropy(a, Y)).output.shape == (N, 3)
    with pytest.raises(ValueError, match="by another way than the outputs"):
        _ = graph(lambda a, b: functional.cross_entropy(a, Y) + b.square().mean()).output


def test_outputs_that_are_parameters_or_the_loss_itself_hold_all_of_it() -> None:
    z = nn.Parameter(reals(5))
    assert LossGraph(z.square().sum(), [z], z).output is z
    loss = z.square().sum()
    assert LossGraph(loss, [z], loss).output is loss
    with pytest.raises(ValueError, match="does not depend on outputs"):
        _ = LossGraph(loss, [z], z * 2).output


def test_looking_for_other_ways_takes_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Net())
    out = model(X)
    loss, z, params = ce(out), out["logits"], dense.trainable(model)

    def refused(*args: Any, **keywords: Any) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(beside_outputs.torch.autograd, "grad", refused)
    beside_outputs.refuse_beside_outputs(loss, z, params)
    with pytest.raises(AssertionError, match="a backward pass"):  # as the premise of this test
        beside_outputs.refuse_beside_outputs(BESIDE["a second output"](model, out), z, params)


def test_the_choice_travels_with_copies_and_through_presets() -> None:
    model = seeded(Net())
    optimizer = build(model, "sophia-g", lr=0.01, beside_outputs="drop")
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.beside_outputs == "drop"
    train(optimizer, model, BESIDE["a second output"])
    with pytest.raises(ValueError, match="beside_outputs must be 'refuse' or 'drop', got 'ignore'"):
        build(model, "kfac", beside_outputs="ignore")
