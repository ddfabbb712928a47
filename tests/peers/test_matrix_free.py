"""Matrix-free curvature against curvlinops 3.0.1 in float64, over batches of which the last is short."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from curvature import EmpiricalFisher, Fisher, GaussNewton, Hessian, estimate, to_scipy
from curvature.likelihood import OutputLikelihood
from curvature.spectrum import hutch_plus_plus, hutchinson_trace, spectral_density, xdiag
from curvature.spectrum.flat import FlatOperator
from curvature.vectors import flatten
from tests.curvature import dense
from tests.peers import cases

curvlinops = pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch (the extra 'peers')")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

NETWORKS = pytest.mark.parametrize("network", ["perceptron", "convolution"])
LIKELIHOODS = {"cross entropy": "categorical", "squared": "gaussian", "binary": "bernoulli"}


def setting(network: str, loss: str) -> tuple[nn.Module, nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    loss_fn, y = cases.LOSSES[loss]
    return cases.NETWORKS[network](), loss_fn, cases.batches(cases.inputs(network), y)


def theirs(kind: Any, model: nn.Module, loss_fn: nn.Module, data: Any, **options: Any) -> torch.Tensor:
    made = kind(model, loss_fn, list(model.parameters()), data, check_deterministic=False, **options)
    return made @ cases.eye(model)  # type: ignore[no-any-return]


@NETWORKS
@pytest.mark.parametrize("loss", cases.LOSSES)
def test_hessian(network: str, loss: str) -> None:
    model, loss_fn, data = setting(network, loss)
    expected = theirs(curvlinops.HessianLinearOperator, model, loss_fn, data)
    for mode in ("reverse", "forward"):
        ours = estimate(Hessian(hvp=mode), model, loss_fn, data)  # type: ignore[arg-type]
        torch.testing.assert_close(ours.to_dense(), expected, rtol=1e-8, atol=1e-10)
        v = cases.reals(len(expected))[:, 0]
        product = flatten(ours.matvec(dense.split(v, dense.trainable(model))))
        torch.testing.assert_close(product, expected @ v, rtol=1e-8, atol=1e-10)
        exported = torch.as_tensor(to_scipy(ours) @ v.numpy())
        torch.testing.assert_close(exported, expected @ v, rtol=1e-8, atol=1e-10)


@NETWORKS
@pytest.mark.parametrize("loss", cases.LOSSES)
def test_gauss_newton_and_the_exact_fisher(network: str, loss: str) -> None:
    model, loss_fn, data = setting(network, loss)
    expected = theirs(curvlinops.GGNLinearOperator, model, loss_fn, data)
    likelihood: Any = LIKELIHOODS[loss.removesuffix(", sum")]
    for estimator in (GaussNewton(), GaussNewton(jvp="forward"), Fisher(likelihood)):
        ours = estimate(estimator, model, loss_fn, data).to_dense()
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


@NETWORKS
@pytest.mark.parametrize("loss", ["cross entropy", "cross entropy, sum"])
def test_empirical_fisher(network: str, loss: str) -> None:
    model, loss_fn, data = setting(network, loss)
    expected = theirs(curvlinops.EFLinearOperator, model, loss_fn, data)
    ours = estimate(EmpiricalFisher(), model, loss_fn, data).to_dense()
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


@NETWORKS
def test_sampled_fisher_with_the_same_labels(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One batch; the peer's vectors at the outputs are replaced by ours, so that both send back the same draws.
    model, loss_fn, _ = setting(network, "cross entropy")
    x, y = cases.inputs(network), cases.classes()
    draws: list[torch.Tensor] = []
    draw = OutputLikelihood.draw

    def kept(self: OutputLikelihood, *args: Any) -> torch.Tensor:
        draws.append(draw(self, *args))
        return draws[-1]

    monkeypatch.setattr(OutputLikelihood, "draw", kept)
    ours = estimate(Fisher("categorical", samples=3, seed=5), model, loss_fn, [(x, y)]).to_dense()
    labels = [(torch.softmax(model(x), 1).detach() - s * len(y) ** 0.5).argmax(1) for s in draws[:3]]
    assert len({tuple(label.tolist()) for label in labels}) > 1
    total = torch.zeros_like(ours)
    for label in labels:  # the empirical Fisher of labels that were drawn is the sampled Fisher of one draw
        total += theirs(curvlinops.EFLinearOperator, model, loss_fn, [(x, label)]) / 3
    torch.testing.assert_close(ours, total, rtol=1e-8, atol=1e-10)


SEED = 3
TRACES: dict[str, tuple[Any, str, Any, int]] = {
    "hutchinson": (
        hutchinson_trace,
        "hutchinson.hutchinson_trace",
        lambda B, k: torch.cat([B.signs(1, SEED * k + i) for i in range(k)], 1),
        12,
    ),
    "hutch++": (
        hutch_plus_plus,
        "meyer2020hutch.hutchpp_trace",
        lambda B, k: torch.cat([B.signs(k // 3, 2 * SEED + i) for i in range(2)], 1),
        12,
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_trace_with_the_same_test_vectors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, path, vectors, products = TRACES[name]
    model, loss_fn, data = setting("perceptron", "cross entropy")
    ours = estimate(Hessian(), model, loss_fn, data)
    drawn = iter(vectors(FlatOperator(ours, None), products).T)
    module = importlib.import_module("curvlinops.trace." + path.partition(".")[0])
    monkeypatch.setattr(module, "random_vector", lambda *_: next(drawn))
    expected = getattr(module, path.partition(".")[2])(ours.to_dense(), products)
    torch.testing.assert_close(trace(ours, products, seed=SEED).value, expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(StopIteration):
        next(drawn)  # the peer took them all


def test_diagonal_with_the_same_test_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn, data = setting("perceptron", "cross entropy")
    ours = estimate(GaussNewton(), model, loss_fn, data)
    drawn = iter(FlatOperator(ours, None).signs(6, SEED).T)
    module = importlib.import_module("curvlinops.diagonal.epperly2024xtrace")
    monkeypatch.setattr(module, "random_vector", lambda *_: next(drawn))
    expected = module.xdiag(ours.to_dense(), 12)
    found = flatten(xdiag(ours, 12, seed=SEED).value)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["class weights", "masked"])
def test_empirical_fisher_counts_a_sample_by_its_weight_where_the_peer_does_not(kind: str) -> None:
    model = cases.perceptron()
    x, y = cases.inputs("perceptron"), cases.classes()
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    if kind == "masked":
        y, weight = y.index_fill(0, torch.tensor([1, 4]), -100), torch.ones_like(weight)
    loss_fn = nn.CrossEntropyLoss(weight=weight)
    c = torch.where(y >= 0, weight[y.clamp(min=0)], 0.0)
    exact = dense.empirical_fisher(
        [loss_fn(model(x[n : n + 1]), y[n : n + 1]) for n in range(len(y)) if c[n] > 0],
        (c / c.sum())[c > 0],
        dense.trainable(model),
    )
    ours = estimate(EmpiricalFisher(), model, loss_fn, [(x, y)]).to_dense()
    assert dense.relative_error(ours, exact) < 1e-12
    peers = theirs(curvlinops.EFLinearOperator, model, loss_fn, [(x, y)])
    assert not dense.relative_error(peers, exact) < 0.01


@pytest.mark.parametrize("network", ["perceptron", "convolution"])
def test_quadrature_of_the_spectrum(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes and weights of one Lanczos process from the same vector, few enough steps that theirs stays orthogonal."""
    model, loss_fn, data = setting(network, "cross entropy")
    params = list(model.parameters())
    B = estimate(GaussNewton(), model, loss_fn, data)
    ours = spectral_density(B, steps=8, probes=1, seed=5)
    start = FlatOperator(B).signs(1, 5)[:, 0]
    module = importlib.import_module("curvlinops.papyan2020traces.spectrum")
    monkeypatch.setattr(module, "randn", lambda *_, **__: start.clone())
    made = curvlinops.GGNLinearOperator(model, loss_fn, params, data, check_deterministic=False)
    nodes, vectors = module.fast_lanczos(made, 8)
    assert (ours.nodes[0] - nodes).abs().max() < 1e-8 * nodes.abs().max()
    assert (ours.weights[0] - vectors[0] ** 2).abs().max() < 1e-8
