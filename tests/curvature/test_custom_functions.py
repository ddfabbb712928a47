"""Custom autograd functions: right second derivatives pass without a word, wrong ones are refused by name.

The right ones are compared with dense differences of gradients, which know nothing of a second backward pass.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

from curvature import (
    EKFAC,
    KFAC,
    AdaHessianDiagonal,
    EmpiricalFisher,
    EmpiricalFisherDiagonal,
    Fisher,
    FisherDiagonal,
    GaussNewton,
    GaussNewtonDiagonal,
    Hessian,
    HessianDiagonal,
    HutchinsonDiagonal,
    LowRank,
    PerParameter,
    Shampoo,
    custom_functions,
    estimate,
)
from optimizers import AdaHessian, SophiaH, TrustRegionNewton, build
from tests.curvature import dense
from tests.curvature.cases import Call, classes, reals, seeded

N = 6
X, Y = reals(N, 3), classes(N)


class Right(torch.autograd.Function):
    """tanh."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


class RightByOutput(Right):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return g * (1 - y**2)


class Rectifier(Right):
    """The second derivative is zero but at the kink, and the backward does not depend on the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mask = x > 0
        return x * ctx.mask

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.mask


class Doubled(Right):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return 2 * g


class WithoutGraph(Right):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return g * (1 - x.tanh() ** 2)


class DetachedGradient(Right):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g.detach() * (1 - x.tanh() ** 2)


class DetachedInput(Right):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * (1 - x.detach().tanh() ** 2)


class KeptSlope(Right):
    """The slope is computed in the forward pass, where no graph is recorded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(1 - y**2)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return g * slope


class HalfDetached(Right):
    """x y² with one of the two inputs detached in one of the two gradients: what is left still reaches both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sin() ** 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * (x.sin() ** 2 + 2 * x.detach() * x.sin() * x.cos())


RIGHT = [Right, RightByOutput, Rectifier, Doubled]
CUT = [WithoutGraph, DetachedGradient]
SILENT = [DetachedInput, KeptSlope, HalfDetached]
REFUSED = "(?s)no derivative of its derivative here .*custom autograd.Function.*use {}.*{}"
HESSIANS = {
    "hessian": Hessian(),
    "hessian-diagonal": HessianDiagonal(),
    "hutchinson-diagonal": HutchinsonDiagonal(),
    "adahessian-diagonal": AdaHessianDiagonal(),
    "low-rank": LowRank(2, of="hessian"),
    "per-parameter": PerParameter((("a.*", HutchinsonDiagonal()), ("*", EmpiricalFisherDiagonal()))),
}


@pytest.fixture(autouse=True)
def nothing_proven() -> Iterator[None]:
    custom_functions.proven.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def network(function: Any, dtype: torch.dtype = torch.float64) -> nn.Module:
    made = Call(lambda m, x: m.b(function.apply(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 3))
    return seeded(made).to(dtype)


def differences(model: nn.Module) -> Tensor:
    """The Hessian by central differences of the gradient."""
    params, rows = dense.trainable(model), []
    for p in params:
        flat = p.detach().view(-1)
        for i in range(p.numel()):
            sides = []
            for sign in (1.0, -1.0):
                flat[i] += sign * 1e-5
                sides.append(dense.gradient(functional.cross_entropy(model(X), Y), params))
                flat[i] -= sign * 1e-5
            rows.append((sides[0] - sides[1]) / 2e-5)
    return torch.stack(rows)


@pytest.mark.parametrize("function", RIGHT)
def test_a_right_function_passes_and_has_the_hessian_of_differences(function: Any) -> None:
    model = network(function)
    H = differences(model)
    for estimator in (Hessian(), Hessian(hvp="finite-difference")):
        assert (
            dense.relative_error(estimate(estimator, model, functional.cross_entropy, [(X, Y)]).to_dense(), H)
            < 1e-6
        )
    diagonal = estimate(HessianDiagonal(), model, functional.cross_entropy, [(X, Y)]).diagonal()
    assert dense.relative_error(dense.flat(diagonal), H.diagonal()) < 1e-6


@pytest.mark.parametrize("name", HESSIANS)
@pytest.mark.parametrize("function", CUT + SILENT)
def test_a_hessian_through_a_detached_backward_is_refused(function: Any, name: str) -> None:
    model = network(function)
    with pytest.raises(RuntimeError, match=REFUSED.format('hvp="finite-difference"', function.__name__)):
        estimate(HESSIANS[name], model, functional.cross_entropy, [(X, Y)]).matvec(dense.trainable(model))


@pytest.mark.parametrize("function", [Right, *CUT, *SILENT])
def test_the_remedies_give_the_matrix_itself(function: Any) -> None:
    """Differences, and what differentiates the model only once."""
    model = network(function)
    z = model(X)
    loss, params = functional.cross_entropy(z, Y), dense.trainable(model)
    G, H = dense.gauss_newton(loss, z, params), differences(model)
    product = estimate(Hessian(hvp="finite-difference"), model, functional.cross_entropy, [(X, Y)])
    assert dense.relative_error(product.to_dense(), H) < 1e-6
    diagonal = estimate(GaussNewtonDiagonal(), model, functional.cross_entropy, [(X, Y)]).diagonal()
    assert dense.relative_error(dense.flat(diagonal), G.diagonal()) < 1e-10
    by_differences = estimate(GaussNewton(jvp="finite-difference"), model, functional.cross_entropy, [(X, Y)])
    assert dense.relative_error(by_differences.to_dense(), G) < 1e-6
    estimate(EKFAC(model), model, functional.cross_entropy, [(X, Y)])


@pytest.mark.parametrize("estimator", [GaussNewton(), Fisher("categorical"), LowRank(2)])
def test_a_jacobian_product_needs_the_backward_as_a_function_of_its_gradient_alone(estimator: Any) -> None:
    for function in CUT:
        model = network(function)
        with pytest.raises(RuntimeError, match=REFUSED.format('jvp="finite-difference"', function.__name__)):
            estimate(estimator, model, functional.cross_entropy, [(X, Y)]).matvec(dense.trainable(model))
    if isinstance(estimator, LowRank):
        return
    for function in [*RIGHT, *SILENT]:
        model = network(function)
        z = model(X)
        G = dense.gauss_newton(functional.cross_entropy(z, Y), z, dense.trainable(model))
        found = estimate(estimator, model, functional.cross_entropy, [(X, Y)]).to_dense()
        assert dense.relative_error(found, G) < 1e-10


@pytest.mark.parametrize("function", [*RIGHT, *CUT, *SILENT])
@pytest.mark.parametrize(
    "kind", ["gauss-newton", "kfac", "ekfac", "gauss-newton-diagonal", "hutchinson-diagonal"]
)
def test_a_function_in_the_loss_is_proven_as_well(kind: str, function: Any) -> None:
    model = seeded(nn.Linear(3, 3))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(function.apply(z), y)

    made = {
        "gauss-newton": GaussNewton(),
        "kfac": KFAC(model),
        "ekfac": EKFAC(model),
        "gauss-newton-diagonal": GaussNewtonDiagonal(),
        "hutchinson-diagonal": HutchinsonDiagonal(),
    }[kind]
    if function in RIGHT:
        with contextlib.suppress(ValueError):  # K-FAC refuses a loss that is not convex in its outputs
            estimate(made, model, loss, [(X, Y)])
        return
    with pytest.raises(RuntimeError, match=f"no derivative of its derivative .*{function.__name__}"):
        estimate(made, model, loss, [(X, Y)]).matvec(dense.trainable(model))


def test_single_precision_tells_right_from_wrong() -> None:
    x = X.float()
    for function in [*RIGHT, *CUT, *SILENT]:
        model = network(function, torch.float32)
        if function in RIGHT:
            estimate(Hessian(), model, functional.cross_entropy, [(x, Y)])
            continue
        with pytest.raises(RuntimeError, match=function.__name__):
            estimate(Hessian(), model, functional.cross_entropy, [(x, Y)]).matvec(dense.trainable(model))


# -- in an optimizer, where the loss cannot be evaluated anew ----------------------------------------------------------


def step(optimizer: Any, model: nn.Module) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = model(X)
        loss = functional.cross_entropy(outputs, Y)
        optimizer.backward(loss, outputs)
        return loss

    optimizer.step(closure)


PRESETS = {
    "adahessian": lambda model: AdaHessian(model.parameters(), lr=0.1),
    "sophia-h": lambda model: SophiaH(model.parameters(), lr=0.1),
    "trust-region-newton": lambda model: TrustRegionNewton(model.parameters()),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_refuses_what_its_graph_shows_and_says_what_it_cannot_see(preset: str) -> None:
    for function in CUT:
        model = network(function)
        with pytest.raises(RuntimeError, match=REFUSED.format('hvp="finite-difference"', function.__name__)):
            step(PRESETS[preset](model), model)
    for function in (KeptSlope, DetachedInput):
        model = network(function)
        with pytest.warns(
            UserWarning, match=f"{function.__name__} does not depend on its inputs.*piecewise linear"
        ):
            step(PRESETS[preset](model), model)
    model = network(Right)
    step(PRESETS[preset](model), model)
    model = network(Rectifier)
    estimate(Hessian(), model, functional.cross_entropy, [(X, Y)])  # proven once, it needs no word
    step(PRESETS[preset](model), model)


def test_a_step_of_kfac_differentiates_the_model_once() -> None:
    for function in [*CUT, *SILENT]:
        model = network(function)
        step(build(model, "kfac"), model)


# -- functions of torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_right_or_refused(reentrant: bool) -> None:
    def make(function: Any) -> nn.Module:
        return seeded(
            Call(
                lambda m, x: m.b(
                    checkpoint(
                        lambda h: function.apply(m.a(h)), x.clone().requires_grad_(), use_reentrant=reentrant
                    )
                ),
                a=nn.Linear(3, 4),
                b=nn.Linear(4, 3),
            )
        )

    model = make(Right)
    if reentrant:  # autograd.grad would find no parameter in it, and take their derivatives for zero
        every = [*HESSIANS.values(), Hessian(hvp="finite-difference"), GaussNewton(), GaussNewtonDiagonal()]
        every += [
            KFAC(model),
            EKFAC(model),
            Fisher("categorical"),
            FisherDiagonal("categorical"),
            EmpiricalFisher(),
        ]
        every += [EmpiricalFisherDiagonal(), EmpiricalFisherDiagonal(samples="per_sample"), Shampoo()]
        for estimator in every:
            with pytest.raises(
                RuntimeError, match=r"hides its layers behind CheckpointFunction.*use_reentrant=False"
            ):
                estimate(estimator, model, functional.cross_entropy, [(X, Y)]).matvec(dense.trainable(model))
        return
    for estimator in (Hessian(), HutchinsonDiagonal()):
        B = estimate(estimator, model, functional.cross_entropy, [(X, Y)])
        if isinstance(estimator, Hessian):
            assert dense.relative_error(B.to_dense(), differences(model)) < 1e-6
        with pytest.raises(RuntimeError, match="KeptSlope"):
            estimate(estimator, make(KeptSlope), functional.cross_entropy, [(X, Y)])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("normalise", [parametrizations.weight_norm, weight_norm])
def test_weight_norm_whose_second_derivative_torch_gets_wrong_is_refused(normalise: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = seeded(nn.Sequential(normalise(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)))
    H, params = differences(model), dense.trainable(model)
    found = estimate(Hessian(hvp="finite-difference"), model, functional.cross_entropy, [(X, Y)]).to_dense()
    assert dense.relative_error(found, H) < 1e-6
    assert dense.relative_error(H, H.T) < 1e-6
    autograds = dense.hessian(functional.cross_entropy(model(X), Y), params)
    for estimator in (Hessian(), HutchinsonDiagonal()):
        if dense.relative_error(autograds, H) < 1e-6:  # a torch that gets it right
            estimate(estimator, model, functional.cross_entropy, [(X, Y)])
            continue
        with pytest.raises(RuntimeError, match="no double backward: torch's weight_norm"):
            estimate(estimator, model, functional.cross_entropy, [(X, Y)]).matvec(params)
    z = model(X)
    G = dense.gauss_newton(functional.cross_entropy(z, Y), z, params)
    found = estimate(GaussNewton(), model, functional.cross_entropy, [(X, Y)]).to_dense()
    assert dense.relative_error(found, G) < 1e-10


def test_a_model_without_custom_functions_is_evaluated_no_more_often() -> None:
    """Three times: two by which a snapshot sees that the loss is deterministic, and the graph of the product."""
    calls = []
    counted: nn.Module = Call(lambda m, x: (calls.append(1), m.a(x))[1], a=nn.Linear(3, 3))
    model = seeded(counted)
    estimate(Hessian(), model, functional.cross_entropy, [(X, Y)]).matvec(dense.trainable(model))
    assert len(calls) == 3
    calls.clear()
    estimate(HutchinsonDiagonal(), model, functional.cross_entropy, [(X, Y)])
    assert len(calls) == 1
