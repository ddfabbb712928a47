"""Graphs of every shape: modules called twice, tied weights, checkpoints, micro-batches; no side effects, no leaks."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from curvature import EKFAC, KFAC, LossGraph, Observation, estimate
from curvature.estimate import add_statistics
from tests.curvature import dense
from tests.curvature.kronecker.reference import block_diagonal, module_blocks

TIGHT = 1e-10


def observed(kfac: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return estimate(kfac, model, nn.CrossEntropyLoss(), [(x, y)]).to_dense()


class Siamese(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3, bias=False)
        self.second = nn.Linear(4, 3, bias=False) if tied else self.first
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(x[:, 0]), self.second(x[:, 1])], 1)


@pytest.mark.parametrize("tied", [False, True])
def test_calls_and_tied_weights_are_positions_that_sum(tied: bool) -> None:
    model, x, y = Siamese(tied), torch.randn(5, 2, 4), torch.randn(5, 2, 3)
    B = estimate(KFAC(model), model, nn.MSELoss(), [(x, y)]).to_dense()
    z = model(x)
    GN = dense.gauss_newton(functional.mse_loss(z, y), z, dense.trainable(model))
    assert dense.relative_error(B, GN) < TIGHT  # a loss at every position: expand is exact


def test_reduce_adds_the_calls_of_a_module() -> None:
    class Mean(Siamese):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    model, x, y = Mean(False), torch.randn(5, 2, 4), torch.randn(5, 3)
    B = estimate(KFAC(model, sharing="reduce"), model, nn.MSELoss(), [(x, y)]).to_dense()
    z = model(x)
    GN = dense.gauss_newton(functional.mse_loss(z, y), z, dense.trainable(model))
    assert dense.relative_error(B, GN) < TIGHT


def test_weights_that_layers_of_different_kinds_share_have_their_exact_diagonal() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.head = (
                nn.Embedding(4, 4),
                nn.Conv1d(4, 4, 1),
                nn.Linear(4, 4, bias=False),
            )
            self.inner.weight = nn.Parameter(torch.randn(4, 4, 1))
            self.head.weight = self.embed.weight
            self.conv = nn.Conv1d(4, 4, 1, groups=2)
            self.second = nn.ConvTranspose1d(4, 2, 1, groups=2, bias=False)
            self.second.weight = nn.Parameter(self.second.weight[:, :1].detach().expand(4, 2, 1).clone())
            self.conv.weight = self.second.weight

        def forward(self, tokens: Tensor) -> Tensor:
            h = torch.tanh(self.embed(tokens)).mT
            return self.second(torch.tanh(self.conv(h))).mT.mean(1)

    model, x, y = Tied(), torch.tensor([[0, 1, 1], [3, 2, 0]]), torch.tensor([3, 1])
    with pytest.warns(UserWarning, match="layers of different kinds share"):
        B = estimate(KFAC(model), model, nn.CrossEntropyLoss(), [(x, y)])
    z = model(x)
    GN = dense.gauss_newton(functional.cross_entropy(z, y), z, dense.trainable(model))
    params, diagonal = dense.trainable(model), B.diagonal()
    place = [p is model.conv.weight for p in params].index(True)
    assert dense.relative_error(diagonal[place], dense.split(GN.diagonal(), params)[place]) < TIGHT


def test_weight_used_outside_its_module_is_refused_and_may_be_excluded() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) @ self.inner.weight

    model, x, y = Leaky(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(RuntimeError, match=r"'inner.weight' is used 2 times.*exclude=\('inner',\)"):
        observed(KFAC(model), model, x, y)
    B = estimate(KFAC(model, exclude=("inner",)), model, nn.CrossEntropyLoss(), [(x, y)])
    z = model(x)
    GN = dense.gauss_newton(functional.cross_entropy(z, y), z, dense.trainable(model))
    assert dense.relative_error(dense.flat(B.diagonal()), GN.diagonal()) < TIGHT


def test_activation_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
            self.head, self.reentrant = nn.Linear(4, 2), reentrant

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_() if self.reentrant else x
            return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))

    model, x, y = Checkpointed(False), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    plain = nn.Sequential(*model.body, model.head)
    ours = observed(KFAC(model), model, x, y)
    assert dense.relative_error(ours, observed(KFAC(plain), plain, x, y)) < TIGHT
    model.reentrant = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        observed(KFAC(model), model, x, y)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_any_split_of_the_data_gives_the_same(kind: type, fisher: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    w = torch.tensor([0.3, 2.0, 1.0])
    x, y = torch.randn(7, 4), torch.tensor([0, 2, 1, 1, -100, 2, 0])
    loss_fn = nn.CrossEntropyLoss(w)
    whole = estimate(kind(model, fisher=fisher), model, loss_fn, [(x, y)]).to_dense()
    parts = [(x[:4], y[:4]), (x[4:6], y[4:6]), (x[6:], y[6:])]
    split = estimate(kind(model, fisher=fisher), model, loss_fn, parts).to_dense()
    assert dense.relative_error(split, whole) < TIGHT


def test_micro_batches_of_one_step_add_up_to_the_large_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    params, kfac = dense.trainable(model), KFAC(model)
    state, statistics = kfac.init(params), {}
    for part in (slice(0, 2), slice(2, 6)):
        z = model(x[part])
        graph = LossGraph(functional.cross_entropy(z, y[part], reduction="sum") / 6, params, z)
        add_statistics(statistics, kfac.measure(state, graph))
    kfac.update(state, Observation(params, statistics=statistics, parameters=params))
    assert dense.relative_error(kfac.operator(state).to_dense(), observed(KFAC(model), model, x, y)) < TIGHT


def test_estimate_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    grads = [torch.randn_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.clone()
    random = torch.get_rng_state()
    observed(KFAC(model, fisher="mc"), model, x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    gc.collect()
    assert not any(m._forward_hooks for m in model.modules())


def test_copies_of_model_and_estimator_work_on_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    kfac = KFAC(model)
    kfac.init(dense.trainable(model))
    assert isinstance(pickle.loads(pickle.dumps(model)), nn.Module)
    twin_model, twin = copy.deepcopy((model, kfac))
    assert twin.model is twin_model
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    for m, k in ((model, kfac), (twin_model, twin), pickle.loads(pickle.dumps((model, kfac)))):
        params, z = dense.trainable(m), m(x)
        state = k.init(params)
        z = m(x)
        graph = LossGraph(functional.cross_entropy(z, y), params, z)
        k.update(state, Observation(params, statistics=k.measure(state, graph), parameters=params))
        assert dense.relative_error(k.operator(state).to_dense(), observed(KFAC(model), model, x, y)) < TIGHT


def test_records_die_with_their_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    kfac = KFAC(model)
    kfac.init(dense.trainable(model))
    x = torch.randn(6, 4)
    z = model(x)
    (record,) = z.grad_fn.metadata[kfac._live.recorder.key]
    alive = weakref.ref(record)
    del record
    assert alive() is not None
    del z  # thrown away without a backward pass
    assert alive() is None


def test_no_tensor_is_left_behind_over_a_thousand_steps() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    params, kfac = dense.trainable(model), KFAC(model, inverse_interval=10)
    state, x, y = kfac.init(params), torch.randn(4, 2), torch.randn(4, 2)
    counts = []
    gc.disable()  # what only the collector frees would be a leak on an accelerator
    try:
        for step in range(1000):
            z = model(x)
            graph = LossGraph(functional.mse_loss(z, y), params, z)
            seen = Observation(params, statistics=kfac.measure(state, graph), parameters=params)
            kfac.update(state, seen)
            graph.release()
            if step in (10, 999):
                counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[1] <= counts[0] + 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "exact"}, "fisher must be one of"),
        ({"sharing": "none"}, "sharing must be"),
        ({"samples": 0}, "samples must be an integer >= 1, got 0"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\)"),
        ({"factor_interval": 0}, "factor_interval"),
        ({"inverse_interval": 1.5}, "inverse_interval"),
        ({"likelihood": "poisson"}, "likelihood must be one of"),
        ({"damping_kind": "none"}, "damping_kind must be"),
        ({"max_dim": 0}, "max_dim must be"),
    ],
)
def test_bad_arguments_are_refused_when_built(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(nn.Linear(2, 2), **options)
    with pytest.raises(TypeError, match=r"model must be the torch.nn.Module"):
        KFAC([torch.zeros(2)])


def test_parameters_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="is not one of the model's"):
        KFAC(nn.Linear(2, 2)).init([nn.Parameter(torch.zeros(2))])


def test_running_mean_and_blocks_reference() -> None:
    """The premise of the reference: block_diagonal keeps blocks and nothing else."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    kept = block_diagonal(torch.ones(5, 5), module_blocks(model))
    assert kept.sum() == 9 + 4
