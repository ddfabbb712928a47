"""The matrix-free Gauss-Newton matrix against the dense one and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from curvature import GaussNewton, LossGraph, Observation, estimate
from tests.curvature import dense
from tests.curvature.matrix_free import cases

MODES = {"reverse": 1e-12, "forward": 1e-12, "finite-difference": 1e-7}
WITH_MODES = pytest.mark.parametrize("mode", MODES)


def reference(case: cases.Case) -> Tensor:
    model, loss_fn, x, y = case
    outputs = model(x)
    z = outputs["logits"] if isinstance(outputs, dict) else outputs
    return dense.gauss_newton(loss_fn(outputs, y), z, dense.trainable(model))


@WITH_MODES
@pytest.mark.parametrize("name", cases.CASES)
def test_operator_equals_dense_gauss_newton(name: str, mode: str) -> None:
    model, loss_fn, x, y = case = cases.CASES[name]()
    G = estimate(GaussNewton(jvp=mode), model, loss_fn, [(x, y)]).to_dense()  # type: ignore[arg-type]
    assert dense.relative_error(G, reference(case)) < MODES[mode]
    assert torch.linalg.eigvalsh((G + G.T) / 2)[0] > -1e-7 * G.abs().max()


@WITH_MODES
def test_split_with_uneven_last_part_equals_one_batch(mode: str) -> None:
    model, loss_fn, x, y = case = cases.classification()
    batches = [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]
    G = estimate(GaussNewton(jvp=mode), model, loss_fn, batches, weight_fn=len)  # type: ignore[arg-type]
    assert dense.relative_error(G.to_dense(), reference(case)) < MODES[mode]


@WITH_MODES
def test_operator_stays_where_it_was_observed(mode: str) -> None:
    model, loss_fn, x, y = case = cases.batch_norm()
    expected = reference(case)
    G = estimate(GaussNewton(jvp=mode), model, loss_fn, [(x, y)])  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    assert dense.relative_error(G.to_dense(), expected) < MODES[mode]


def test_linear_regression_has_its_closed_form() -> None:
    x = torch.randn(9, 4, generator=cases.generator(), dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    G = estimate(GaussNewton(), model, nn.MSELoss(), [(x, torch.zeros(9, 1, dtype=torch.float64))])
    assert dense.relative_error(G.to_dense(), 2 / 9 * x.T @ x) < 1e-14


def test_logistic_regression_has_its_closed_form() -> None:
    _, _, x, y = cases.binary()
    model = cases.randomise(nn.Linear(4, 1, bias=False).double())
    p = torch.sigmoid(model(x)).detach()
    G = estimate(GaussNewton(), model, nn.BCEWithLogitsLoss(), [(x, y)])
    assert dense.relative_error(G.to_dense(), x.T @ (p * (1 - p) * x) / len(x)) < 1e-14


def test_softmax_regression_has_its_closed_form() -> None:
    _, loss_fn, x, y = cases.classification()
    model = cases.randomise(nn.Linear(4, 3, bias=False).double())
    p = model(x).softmax(1).detach()
    H_z = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nab,ni,nj->aibj", H_z, x, x).reshape(12, 12) / len(x)
    G = estimate(GaussNewton(), model, loss_fn, [(x, y)])
    assert dense.relative_error(G.to_dense(), expected) < 1e-14


def test_penalty_on_weights_is_refused() -> None:
    model, loss_fn, x, y = cases.classification()

    def penalised(outputs: Tensor, target: Tensor) -> Tensor:
        return loss_fn(outputs, target) + model[0].weight.square().sum()

    with pytest.raises(ValueError, match="another way than the outputs"):
        estimate(GaussNewton(), model, penalised, [(x, y)])


def test_loss_linear_in_the_outputs_has_no_gauss_newton_curvature() -> None:
    model, _, x, _ = cases.classification()
    G = estimate(GaussNewton(), model, lambda z, _: z.sum(), [(x, None)])
    assert not G.to_dense().any()


def test_losses_of_several_backward_calls_add_up() -> None:
    model, loss_fn, x, y = case = cases.classification()
    params = dense.trainable(model)
    graphs = []
    for a, b, share in ((x[:3], y[:3], 3 / 7), (x[3:], y[3:], 4 / 7)):
        z = model(a)
        graphs.append(LossGraph(share * loss_fn(z, b), params, z))
    estimator = GaussNewton()
    state = estimator.init(params)
    estimator.update(state, Observation(gradient=[None] * len(params), graphs=graphs, parameters=params))
    assert dense.relative_error(estimator.operator(state).to_dense(), reference(case)) < 1e-12


@pytest.mark.parametrize("mode", ["forward", "finite-difference"])
def test_ways_that_run_the_model_again_are_refused_in_an_optimizer(mode: str) -> None:
    model, loss_fn, x, y = cases.classification()
    params, z = dense.trainable(model), model(x)
    seen = Observation([None] * len(params), graphs=[LossGraph(loss_fn(z, y), params, z)], parameters=params)
    with pytest.raises(ValueError, match='jvp="reverse"'):
        GaussNewton(jvp=mode).update({}, seen)  # type: ignore[arg-type]


def test_loss_without_outputs_names_the_remedy() -> None:
    model, loss_fn, x, y = cases.classification()
    params = dense.trainable(model)
    seen = Observation(
        [None] * len(params), graphs=[LossGraph(loss_fn(model(x), y), params)], parameters=params
    )
    estimator, state = GaussNewton(), {}
    estimator.update(state, seen)
    with pytest.raises(ValueError, match=r"optimizer\.backward\(loss, outputs\)"):
        estimator.operator(state).matvec([torch.ones_like(p) for p in params])


@pytest.mark.parametrize("mode", ["reverse", "finite-difference"])
def test_checkpointed_activations_are_run_again_at_the_observed_parameters(mode: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            h = torch.utils.checkpoint.checkpoint(self.inner[:2], x, use_reentrant=False)
            return self.inner[2](h)

    model, loss_fn, x, y = case = cases.classification()
    expected = reference(case)
    G = estimate(GaussNewton(jvp=mode), Checkpointed(model), loss_fn, [(x, y)])  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert dense.relative_error(G.to_dense(), expected) < MODES[mode]
