"""Bad input, through ``estimate`` and through an optimizer: one clear error with the remedy, or the right matrix.

Every registered estimator meets every case in both ways. Which estimators can answer a case is written down beside it;
all others must refuse it in the given words.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import EKFAC, KFAC, Fisher, FisherDiagonal, GaussNewton, Hessian, estimate
from curvature.registry import estimators
from optimizers import SecondOrder, available
from optimizers.build import takes_model
from tests.curvature import dense
from tests.curvature.cases import Call, classes, reals, seeded
from trust_region import FixedRadius, RmsBox, TrustRegion, Unbounded

NAMES = sorted(available()["curvature"])
OPTIONS: dict[str, dict[str, Any]] = {
    "empirical-fisher": {"likelihood": "categorical"},
    "low-rank": {"rank": 3},
    "kfac": {"fisher": "type-2"},
    "ekfac": {"fisher": "type-2"},
    "fisher": {"likelihood": "categorical"},
    "fisher-diagonal": {"likelihood": "categorical"},
}
#: Those that see gradients alone.
GRADIENTS = {"empirical-fisher-diagonal", "gradient-variance", "identity", "lbfgs", "lsr1", "shampoo", "soap"}
#: Those that differentiate the loss twice by the parameters.
HESSIANS = {"adahessian-diagonal", "hessian", "hessian-diagonal", "hutchinson-diagonal"}
#: Those that push vectors through the model's Jacobian.
JACOBIANS = {"empirical-fisher", "fisher", "gauss-newton", "low-rank"}
EVERY = set(NAMES)

N = 6
X, Y = reals(N, 4), classes(N)
Loss = Callable[[Any, Any], Tensor]


def network() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


class Once(torch.autograd.Function):
    """tanh without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def once() -> nn.Module:
    return seeded(Call(lambda m, x: m.b(Once.apply(m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3)))


def fused_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).reshape(len(x), 1, 2, 8)
        return m.b(functional.scaled_dot_product_attention(h, h, h).mean((1, 2)))

    return seeded(Call(forward, a=nn.Linear(4, 16), b=nn.Linear(8, 3)))


def with_integers() -> nn.Module:
    model = Call(
        lambda m, x: m.a(x) + m.i, a=nn.Linear(4, 3), i=nn.Parameter(torch.arange(3), requires_grad=False)
    )
    model.a = seeded(model.a)
    return model


def complex_outputs() -> nn.Module:
    return seeded(Call(lambda m, x: torch.complex(m.a(x), m.a(x).sin()), a=nn.Linear(4, 3)))


@dataclass(frozen=True)
class Bad:
    """A case.

    Args:
        make: the model.
        loss: of (outputs, target).
        message: what the refusal must say.
        error: its type.
        x: inputs.
        y: target.
        right: estimators that answer, by way.
        other: other words of some estimators.
    """

    make: Callable[[], nn.Module]
    message: str
    loss: Loss = functional.cross_entropy
    error: type[Exception] = ValueError
    x: Tensor = field(default_factory=lambda: X)
    y: Tensor = field(default_factory=lambda: Y)
    right: dict[str, set[str]] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)


def both(names: set[str]) -> dict[str, set[str]]:
    return {"estimate": names, "optimizer": names}


TWICE = 'no derivative of its derivative here .*custom autograd.Function.*use hvp="finite-difference"'
ONCE_LOSS = "this loss has no derivative of its derivative .*gradients only"
OUTPUTS = {*JACOBIANS, "ekfac", "kfac", "per-parameter", "fisher-diagonal", "gauss-newton-diagonal"}
CASES: dict[str, Bad] = {
    "empty batch": Bad(network, "empty.*shape|no sample.*leave the empty batch out", x=X[:0], y=Y[:0]),
    "frozen model": Bad(
        lambda: network().requires_grad_(False), "no parameter that requires grad: unfreeze|from a frozen model"
    ),
    "complex parameters": Bad(
        lambda: nn.Linear(4, 3, dtype=torch.complex128),
        r"complex.*view .* as real \(torch.view_as_real\)",
        lambda z, y: functional.cross_entropy(z.abs(), y),
        x=X.to(torch.complex128),
    ),
    "integer parameters": Bad(
        with_integers,
        "floating point, got torch.int64: pass only those that require grad",
        right={"estimate": EVERY},  # they are frozen, as all integers are
    ),
    "complex outputs": Bad(
        complex_outputs,
        "outputs must be real.*torch.view_as_real",
        lambda z, y: functional.cross_entropy(z.abs(), y),
        right=both(EVERY - OUTPUTS),
    ),
    "complex loss": Bad(complex_outputs, "loss must be real", lambda z, y: z.square().mean()),
    "loss for every sample": Bad(
        network, "loss must be a scalar.*reduce it", lambda z, y: functional.cross_entropy(z, y, reduction="none")
    ),
    "loss without a gradient": Bad(
        network, "loss must require grad", lambda z, y: (z.argmax(1) == y).double().mean()
    ),
    "model differentiable once": Bad(
        once,
        TWICE,
        error=RuntimeError,
        right=both(EVERY - HESSIANS - JACOBIANS),
        other=dict.fromkeys(JACOBIANS, TWICE.replace("hvp", "jvp")),
    ),
    "fused attention": Bad(
        fused_attention,
        TWICE,
        error=RuntimeError,
        right={"estimate": EVERY - HESSIANS | {"hessian"}, "optimizer": EVERY - HESSIANS - JACOBIANS},
        other=dict.fromkeys(JACOBIANS, TWICE.replace("hvp", "jvp")),
    ),
    "loss differentiable once": Bad(
        network,
        ONCE_LOSS,
        lambda z, y: functional.cross_entropy(Once.apply(z), y),
        RuntimeError,
        right=both(GRADIENTS),
        other=dict.fromkeys(HESSIANS, TWICE),
    ),
    "samples coupled by the loss": Bad(
        network,
        "couples the outputs of different|is not that of likelihood='categorical': name the likelihood",
        lambda z, y: functional.cross_entropy(z, y) ** 2,
        right=both(GRADIENTS | HESSIANS | {"gauss-newton", "low-rank"}),
        other={"empirical-fisher": "weights of the samples in this loss are not known|is not that of likelihood"},
    ),
}  # fmt: skip


def made(name: str, model: nn.Module) -> Any:
    options = dict(OPTIONS.get(name, {}))
    if takes_model(estimators[name]):
        options["model"] = model
    return estimators[name](**options)


def vector(model: nn.Module) -> list[Tensor]:
    return [reals(*p.shape, seed=20 + i) for i, p in enumerate(dense.trainable(model))]


def made_estimate(estimator: Any, model: nn.Module, case: Bad) -> Tensor:
    B = estimate(estimator, model, case.loss, [(case.x, case.y)])
    return dense.flat(B.matvec(vector(model)))


def made_step(estimator: Any, model: nn.Module, case: Bad) -> None:
    optimizer = SecondOrder(
        list(model.parameters()),
        lr=0.1,
        curvature=estimator,
        trust_region=TrustRegion(region=RmsBox(beta=0.9), radius=FixedRadius(1.0, damping=0.1)),
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = model(case.x)
        loss = case.loss(outputs, case.y)
        optimizer.backward(loss, outputs)
        return loss

    optimizer.step(closure)


def through_estimate(name: str, model: nn.Module, case: Bad) -> None:
    product = made_estimate(made(name, model), model, case)
    assert bool(torch.isfinite(product).all())
    expected = reference(name, model, case)
    if expected is not None:
        assert (
            dense.relative_error(product, expected) < 1e-6
        )  # half of a double's digits by finite differences


def through_an_optimizer(name: str, model: nn.Module, case: Bad) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    made_step(made(name, model), model, case)
    assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def reference(name: str, model: nn.Module, case: Bad) -> Tensor | None:
    """B times the vector by the dense matrix, where the estimator is exact and the model has the derivatives."""
    z = model(case.x)
    loss, params = case.loss(z, case.y), dense.trainable(model)
    if name not in ("hessian", "gauss-newton", "hessian-diagonal", "gauss-newton-diagonal"):
        return None
    if model_is_once(model):
        return None
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z = model(case.x)
        loss = case.loss(z, case.y)
        B = dense.hessian(loss, params) if name.startswith("hessian") else dense.gauss_newton(loss, z, params)
    v = dense.flat(vector(model))
    return B.diagonal() * v if name.endswith("diagonal") else B @ v


def model_is_once(model: nn.Module) -> bool:
    z = model(X)
    return (
        z.is_complex() is False
        and isinstance(model, Call)
        and "Once" in str(model.function.__code__.co_names)
    )


WAYS = {"estimate": through_estimate, "optimizer": through_an_optimizer}


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.filterwarnings("ignore:.*adapts by the loss")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_every_estimator_answers_or_refuses(name: str, what: str, way: str) -> None:
    case = CASES[what]
    model = case.make()
    if name in case.right.get(way, set()):
        WAYS[way](name, model, case)
        return
    with pytest.raises(case.error, match=f"(?s){case.other.get(name, case.message)}"):
        WAYS[way](name, model, case)


# -- a likelihood that is not the loss's ------------------------------------------------------------------------------

WRONG = [
    ("categorical", functional.mse_loss, reals(N, 3, seed=4)),
    ("gaussian", functional.cross_entropy, Y),
    ("bernoulli", functional.mse_loss, reals(N, 3, seed=4)),
    ("bernoulli", functional.cross_entropy, Y),
]


@pytest.mark.parametrize(("likelihood", "loss", "target"), WRONG)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Fisher, FisherDiagonal, KFAC, EKFAC])
def test_a_wrong_likelihood_is_named(
    kind: Any, way: str, likelihood: str, loss: Loss, target: Tensor
) -> None:
    model = network()
    made = kind(model, fisher="mc", likelihood=likelihood) if kind in (KFAC, EKFAC) else kind(likelihood)
    case = Bad(network, "", loss, y=target)
    run = made_estimate if way == "estimate" else made_step
    with pytest.raises(ValueError, match=f"is not that of likelihood='{likelihood}': name the likelihood"):
        run(made, model, case)


# -- a layer without a rule: its diagonal, said once ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_a_layer_without_a_rule_has_the_exact_diagonal_and_is_named_once(kind: type[KFAC]) -> None:
    model = seeded(Call(lambda m, x: m.b(m.a(x, x.sin())), a=nn.Bilinear(4, 4, 3), b=nn.Linear(3, 3)))
    with pytest.warns(UserWarning, match=r"'a' \(Bilinear\): no rule.*how_to/add_layer_rule") as said:
        B = estimate(kind(model), model, functional.cross_entropy, [(X, Y), (X, Y)])
    assert len(said) == 1
    z = model(X)
    params = dense.trainable(model)
    exact = dense.split(dense.gauss_newton(functional.cross_entropy(z, Y), z, params).diagonal(), params)
    for i in (0, 1):
        assert dense.relative_error(B.diagonal()[i], exact[i]) < 1e-10
    with warnings.catch_warnings(record=True) as said_in_training:
        warnings.simplefilter("always")
        optimizer = SecondOrder(
            model.parameters(),
            lr=0.1,
            curvature=kind(model),
            trust_region=TrustRegion(radius=FixedRadius(1.0, damping=0.1)),
        )
        for _ in range(3):
            optimizer.zero_grad()
            outputs = model(X)
            optimizer.backward(functional.cross_entropy(outputs, Y), outputs)
            optimizer.step()
    assert len([w for w in said_in_training if "no rule" in str(w.message)]) == 1


# -- a loss that changes from call to call ----------------------------------------------------------------------------


def dropout() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)))


@pytest.mark.parametrize("name", [*sorted(JACOBIANS), "hessian"])
def test_a_loss_that_is_not_deterministic_is_refused_where_it_would_be_evaluated_again(name: str) -> None:
    model = dropout()
    with pytest.raises(ValueError, match=r"must be deterministic.*model.eval\(\), or set the dropout to 0"):
        estimate(made(name, model), model, functional.cross_entropy, [(X, Y)]).matvec(vector(model))
    estimate(made(name, model.eval()), model, functional.cross_entropy, [(X, Y)]).matvec(vector(model))


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_a_matrix_free_step_solves_with_the_masks_of_its_own_loss(kind: Any) -> None:
    """All products of a step are taken on one graph, so dropout is as constant as the batch."""
    model, twin = dropout(), dropout()
    optimizer = SecondOrder(
        model.parameters(),
        lr=1.0,
        curvature=kind(),
        trust_region=TrustRegion(region=Unbounded(), radius=FixedRadius(1.0, damping=1.0)),
    )
    torch.manual_seed(5)
    outputs = model(X)
    optimizer.backward(functional.cross_entropy(outputs, Y), outputs)
    optimizer.step()
    torch.manual_seed(5)  # the same masks
    params = dense.trainable(twin)
    z = twin(X)
    loss = functional.cross_entropy(z, Y)
    B = dense.hessian(loss, params) if kind is Hessian else dense.gauss_newton(loss, z, params)
    step = torch.linalg.solve(B + torch.eye(len(B), dtype=B.dtype), -dense.gradient(loss, params))
    taken = dense.flat(model.parameters()) - dense.flat(params)
    assert dense.relative_error(taken, step) < 1e-4


@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical"])
def test_both_looks_of_ekfac_meet_the_same_masks(fisher: Any) -> None:
    """The one-shot estimate goes over the batches twice; with one batch it is the first update of a training run."""
    model = dropout()
    torch.manual_seed(3)
    B = estimate(EKFAC(model, fisher=fisher), model, functional.cross_entropy, [(X, Y)]).to_dense()
    ekfac = EKFAC(model, fisher=fisher)
    optimizer = SecondOrder(
        model.parameters(),
        lr=0.0,
        curvature=ekfac,
        trust_region=TrustRegion(radius=FixedRadius(1.0, damping=0.1)),
    )
    torch.manual_seed(3)
    outputs = model(X)
    optimizer.backward(functional.cross_entropy(outputs, Y), outputs)
    optimizer.step()
    ours = ekfac.operator(optimizer._curvature_state).to_dense()
    assert dense.relative_error(ours, B) < 1e-9
