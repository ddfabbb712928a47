"""K-FAC and EK-FAC against curvlinops 3.0.1 and backpack 1.7.1 in float64: where they are right, and where not.

Both are right for losses that weigh all samples alike and modules that are called once. Where classes have weights,
targets are masked or a module is called twice, K-FAC here is held to the dense reference, and the peer is shown to
miss it, in settings in which A ⊗ G can be exact.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import EKFAC, KFAC, GaussNewtonDiagonal, estimate
from curvature.sample_draws import sample_numbers, uniform
from tests.curvature import dense
from tests.curvature.kronecker import reference
from tests.peers import cases

curvlinops = pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch (the extra 'peers')")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

NETWORKS = pytest.mark.parametrize("network", cases.NETWORKS)
SHARING = pytest.mark.parametrize("sharing", ["expand", "reduce"])


def parts(model: nn.Module, which: str) -> nn.Module:
    """The model with only its weights or only its biases trainable: the peer's separate blocks, one kind at a time."""
    for name, p in model.named_parameters():
        p.requires_grad_(which == "joint" or name.endswith(which))
    return model


def peer(
    kind: Any, model: nn.Module, loss_fn: nn.Module, data: Any, fisher: str, sharing: str, **options: Any
) -> Any:
    return kind(
        model,
        loss_fn,
        dense.trainable(model),
        data,
        check_deterministic=False,
        fisher_type=fisher,
        kfac_approx=sharing,
        **{"separate_weight_and_bias": False, **options},
    )


@NETWORKS
@SHARING
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("loss", ["cross entropy", "cross entropy, sum", "squared", "squared, sum"])
def test_kfac_and_its_inverse(network: str, sharing: Any, fisher: Any, loss: str) -> None:
    loss_fn, y = cases.LOSSES[loss]
    model, data = cases.NETWORKS[network](), cases.batches(cases.inputs(network), y)
    theirs = peer(curvlinops.KFACLinearOperator, model, loss_fn, data, fisher, sharing)
    expected = theirs @ cases.eye(model)
    ours = estimate(KFAC(model, fisher=fisher, sharing=sharing), model, loss_fn, data)
    found = ours.to_dense()
    if fisher == "empirical" and loss == "squared":
        # A mean over N samples of three outputs: c_n is 1/N here, for a sample's own mean loss; 1/(3N) in the peer, for
        # the sum over its outputs, whose gradient is three times as large.
        torch.testing.assert_close(3 * found, expected, rtol=1e-8, atol=1e-10)
        return
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    inverse = curvlinops.KFACInverseLinearOperator(theirs, damping=0.3, use_exact_damping=True)
    v = torch.randn(len(found), generator=cases.generator(4), dtype=torch.float64)
    solved = dense.flat(ours.solve(dense.split(v, dense.trainable(model)), 0.3))
    torch.testing.assert_close(solved, inverse @ v, rtol=1e-8, atol=1e-10)


@NETWORKS
@SHARING
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_separate_weights_and_biases(network: str, sharing: Any, which: str) -> None:
    loss_fn, y = cases.LOSSES["cross entropy"]
    model, data = parts(cases.NETWORKS[network](), which), cases.batches(cases.inputs(network), y)
    theirs = peer(curvlinops.KFACLinearOperator, model, loss_fn, data, "type-2", sharing)
    ours = estimate(KFAC(model, sharing=sharing), model, loss_fn, data).to_dense()
    torch.testing.assert_close(ours, theirs @ cases.eye(model), rtol=1e-8, atol=1e-10)


@NETWORKS
@SHARING
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_ekfac(network: str, sharing: Any, fisher: Any) -> None:
    loss_fn, y = cases.LOSSES["cross entropy"]
    model, data = cases.NETWORKS[network](), [(cases.inputs(network), y)]
    theirs = peer(curvlinops.EKFACLinearOperator, model, loss_fn, data, fisher, sharing)
    expected = theirs @ cases.eye(model)
    ours = estimate(EKFAC(model, fisher=fisher, sharing=sharing), model, loss_fn, data).to_dense()
    if sharing == "expand" or network == "perceptron":
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)
    elif fisher == "type-2":
        # Here S are the second moments of whole gradients in the basis, whatever the sharing: the best diagonal for it,
        # up to eigenspaces, over which it is averaged where theirs keeps the basis that happened to be found,
        # which may be luckier.
        z = model(data[0][0])
        exact = reference.module_gauss_newton(model, loss_fn(z, y), z)
        assert (ours - exact).norm() < 1.02 * (expected - exact).norm()
        kfac = estimate(KFAC(model, fisher=fisher, sharing=sharing), model, loss_fn, data).to_dense()
        assert (ours - exact).norm() < (kfac - exact).norm()


@NETWORKS
@SHARING
def test_sampled_kfac_with_the_same_labels(network: str, sharing: Any) -> None:
    loss_fn, y = cases.LOSSES["cross entropy"]
    model, x = cases.NETWORKS[network](), cases.inputs(network)
    drawn = iter(range(3))

    class Same(curvlinops.KFACLinearOperator):  # type: ignore[misc, name-defined]
        def draw_label(self, output: Tensor) -> Tensor:
            numbers = sample_numbers(0, len(output), output.device)
            u = uniform(9, next(drawn), numbers, 1, output.dtype)
            return torch.searchsorted(output.softmax(1).cumsum(1), u).squeeze(1)

    theirs = peer(Same, model, loss_fn, [(x, y)], "mc", sharing, mc_samples=3)
    expected = theirs @ cases.eye(model)
    assert next(drawn, None) is None
    ours = estimate(KFAC(model, fisher="mc", samples=3, seed=9, sharing=sharing), model, loss_fn, [(x, y)])
    torch.testing.assert_close(ours.to_dense(), expected, rtol=1e-8, atol=1e-10)


def test_kfac_against_backpack() -> None:
    backpack = pytest.importorskip("backpack", reason="needs backpack-for-pytorch (the extra 'peers')")
    from backpack import extensions

    loss_fn, y = cases.LOSSES["cross entropy"]
    x = cases.inputs("perceptron")
    extended = backpack.extend(cases.perceptron())
    with backpack.backpack(extensions.KFLR()):
        backpack.extend(nn.CrossEntropyLoss())(extended(x), y).backward()
    for which in ("weight", "bias"):
        model = parts(cases.perceptron(), which)
        ours = estimate(KFAC(model), model, loss_fn, [(x, y)]).to_dense()
        named = [p for name, p in extended.named_parameters() if name.endswith(which)]
        blocks = [
            torch.kron(*p.kflr) if len(p.kflr) == 2 else p.kflr[0]  # type: ignore[attr-defined]
            for p in named
        ]
        torch.testing.assert_close(ours, torch.block_diag(*blocks), rtol=1e-8, atol=1e-10)


WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def equal_curvature(case: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A linear classifier whose logits are equal for all samples, so that its Gauss-Newton matrix is A ⊗ H exactly."""
    x, y = cases.inputs("perceptron"), cases.classes()
    if case.startswith("masked"):
        y = y.index_fill(0, torch.tensor([0, 3, 4]), -100)
    weight = WEIGHT if "weight" in case else None
    reduction = "sum" if "sum" in case else "mean"
    model = cases.seeded(nn.Sequential(nn.Linear(4, 3)))
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[index]
    return model, nn.CrossEntropyLoss(weight=weight, reduction=reduction), x, y


@SHARING
@pytest.mark.parametrize(
    "case", ["class weights", "class weights, sum", "masked", "masked, sum", "masked and weighted"]
)
def test_weights_and_masks_are_exact_here_and_not_in_the_peer(case: str, sharing: Any) -> None:
    model, loss_fn, x, y = equal_curvature(case)
    z = model(x)
    exact = reference.module_gauss_newton(model, loss_fn(z, y), z)
    ours = estimate(KFAC(model, sharing=sharing), model, loss_fn, [(x, y)]).to_dense()
    assert dense.relative_error(ours, exact) < 1e-10
    theirs = peer(curvlinops.KFACLinearOperator, model, loss_fn, [(x, y)], "type-2", sharing)
    assert dense.relative_error(theirs @ cases.eye(model), exact) > 0.01


def test_without_weights_the_same_setting_is_exact_in_both() -> None:
    model, loss_fn, x, y = equal_curvature("plain")
    z = model(x)
    exact = reference.module_gauss_newton(model, loss_fn(z, y), z)
    ours = estimate(KFAC(model), model, loss_fn, [(x, y)]).to_dense()
    assert dense.relative_error(ours, exact) < 1e-10
    theirs = peer(curvlinops.KFACLinearOperator, model, loss_fn, [(x, y)], "type-2", "expand")
    assert dense.relative_error(theirs @ cases.eye(model), exact) < 1e-10


class Twice(nn.Module):
    """One layer called twice, side by side: W x + 2 W x, two positions whose gradients are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(2 * x)  # type: ignore[no-any-return]


def test_module_called_twice_is_exact_here_and_not_in_the_peer() -> None:
    # Σ_t g_t a_tᵀ = g (a + 2a)ᵀ: "reduce" takes the mean of a and the sum of g, 1.5 a and 2 g, so it is exact.
    model, x = cases.seeded(Twice()), cases.inputs("perceptron")
    loss_fn, y = cases.LOSSES["squared"]
    z = model(x)
    exact = dense.gauss_newton(loss_fn(z, y), z, dense.trainable(model))
    ours = estimate(KFAC(model, sharing="reduce"), model, loss_fn, [(x, y)]).to_dense()
    assert dense.relative_error(ours, exact) < 1e-10
    diagonal = dense.flat(estimate(GaussNewtonDiagonal(), model, loss_fn, [(x, y)]).diagonal())
    assert dense.relative_error(diagonal, exact.diagonal()) < 1e-10
    theirs = peer(curvlinops.KFACLinearOperator, model, loss_fn, [(x, y)], "type-2", "reduce")
    assert dense.relative_error(theirs @ cases.eye(model), exact) > 0.01


class Residual(nn.Module):
    """x + f(x), with a LayerNorm: backpack has neither."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + functional.silu(self.inner(self.norm(x))))  # type: ignore[no-any-return]


def test_residual_network_with_layer_norm_is_exact_here_and_an_error_in_backpack() -> None:
    backpack = pytest.importorskip("backpack", reason="needs backpack-for-pytorch (the extra 'peers')")
    from backpack import extensions

    model, x = cases.seeded(Residual()), cases.inputs("perceptron")
    loss_fn, y = cases.LOSSES["cross entropy"]
    z = model(x)
    exact = dense.gauss_newton(loss_fn(z, y), z, dense.trainable(model)).diagonal()
    ours = dense.flat(estimate(GaussNewtonDiagonal(), model, loss_fn, [(x, y)]).diagonal())
    assert dense.relative_error(ours, exact) < 1e-10
    extended = backpack.extend(cases.seeded(Residual()))
    loss = backpack.extend(nn.CrossEntropyLoss())(extended(x), y)
    with backpack.backpack(extensions.DiagGGNExact()), pytest.raises((NotImplementedError, AttributeError)):
        loss.backward()
