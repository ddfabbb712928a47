"""Models that mix the samples of a batch: refused where a claim fails, exact elsewhere; no other model is refused."""

from __future__ import annotations

import copy
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
    GaussNewton,
    GaussNewtonDiagonal,
    Hessian,
    HessianDiagonal,
    estimate,
)
from curvature.loss_graph import LossGraph
from curvature.sample_mixing import samples_mixed
from optimizers import SecondOrder
from tests.curvature import dense
from tests.curvature.cases import Call, classes, reals, seeded
from trust_region import FixedRadius, TrustRegion, Unbounded

N = 6
X, Y = reals(N, 4), classes(N)
CE = nn.CrossEntropyLoss()


def two(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Two linear layers a, b put together by ``forward``."""
    return seeded(Call(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3)))


def standardised(h: Tensor) -> Tensor:
    return (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-3).sqrt()


def attended(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.T, 1) @ x


MIXING: dict[str, Callable[[], nn.Module]] = {
    "centred inputs": lambda: two(lambda m, x: m.b(m.a(x - x.mean(0)).tanh())),
    "batch statistics": lambda: two(lambda m, x: m.b(standardised(m.a(x)).tanh())),
    "centred outputs": lambda: two(lambda m, x: (lambda z: z - z.mean(0))(m.b(m.a(x).tanh()))),
    "attention over the batch": lambda: two(lambda m, x: m.b(attended(m.a(x)).tanh())),
    "scaled by the largest norm": lambda: two(lambda m, x: m.b(m.a(x / x.norm(dim=1).max()).tanh())),
    "the next sample": lambda: two(lambda m, x: m.b(m.a(x - 0.1 * x.roll(1, 0)).tanh())),
    "the first sample": lambda: two(lambda m, x: m.b(m.a(x * (1 + x[:1])).tanh())),
    "pairs": lambda: two(lambda m, x: m.b((m.a(x) + m.a(x.view(-1, 2, 4).flip(1).reshape(-1, 4))).tanh())),
    "dropout beside it": lambda: two(lambda m, x: m.b(functional.dropout(standardised(m.a(x)), 0.5))),
}


class Router(nn.Module):
    """Every row goes to one of two experts by the sign of its first number; their counts depend on the data."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        z = x.new_zeros(len(x), 3)
        left = x[:, 0] > 0
        z[left], z[~left] = self.left(x[left]), self.right(x[~left])
        return z


class Latent(nn.Module):
    """A learned query that attends to each sample: computed once for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.project, self.head = (
            nn.Parameter(torch.ones(2, 4)),
            nn.Linear(4, 4),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        keys = x.unsqueeze(1) * x.new_tensor([1.0, -0.5, 2.0]).view(1, 3, 1)
        weights = torch.softmax(self.project(self.query) @ keys.mT, -1)
        return self.head((weights @ keys).flatten(1))


class Masked(nn.Module):
    """Tokens behind a padding mask, cut to the longest sequence of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(4, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        longest = int(batch["mask"].sum(1).max())
        h = self.norm(self.embed(batch["tokens"][:, :longest]))
        mask = batch["mask"][:, :longest].unsqueeze(-1)
        return self.head((h * mask).sum(1) / mask.sum(1))


class TimeFirst(nn.Module):
    """(T, N, d) to (T, N, C), as ``nn.LSTM`` has it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class ToTimeFirst(TimeFirst):
    """(N, T, d) to (T, N, C), as CTC wants it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1))


def tokens() -> dict[str, Tensor]:
    lengths = torch.tensor([1, 3, 5, 2, 4, 4])
    mask = torch.arange(5) < lengths.unsqueeze(1)
    return {"tokens": (1 + classes(N, 5)) * mask, "mask": mask.double()}


APART: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "a network with layer norm": (
        lambda: seeded(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))),
        X,
    ),
    "dropout": (lambda: seeded(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))), X),
    "a router": (lambda: seeded(Router()), X),
    "a router with dropout": (lambda: seeded(Router(0.5)), X),
    "a learned query": (lambda: seeded(Latent()), X),
    "tokens behind a mask": (lambda: seeded(Masked()), tokens()),
    "batch norm in evaluation": (lambda: seeded(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))).eval(), X),
    "spectral norm": (
        lambda: seeded(
            nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, 3))
        ),
        X,
    ),
    "positions as many as samples": (
        lambda: seeded(
            Call(
                lambda m, x: m.b(m.a(x.unsqueeze(1) + torch.linspace(0, 1, N).view(1, N, 1)).tanh().sum(1)),
                a=nn.Linear(4, 5),
                b=nn.Linear(5, 3),
            )
        ),
        X,
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_found(name: str) -> None:
    assert samples_mixed(MIXING[name](), [X]) == "mixed"


@pytest.mark.parametrize("name", APART)
def test_samples_that_are_kept_apart_are_not_refused(name: str) -> None:
    model, x = APART[name][0](), APART[name][1]
    assert samples_mixed(model, [x]) == "apart"


def test_a_mixing_beyond_the_tried_samples_does_not_hide_in_a_larger_batch() -> None:
    model = two(lambda m, x: m.b(m.a(x - 0.1 * x.roll(len(x) // 2, 0)).tanh()))
    assert samples_mixed(model, [reals(40, 4)]) == "mixed"
    fixed = two(lambda m, x: m.b(standardised(m.a(x).view(2, 20, 5).flatten(0, 1)).tanh()))  # no other size
    assert samples_mixed(fixed, [reals(40, 4)]) == "mixed"


def test_trying_leaves_no_trace() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)))
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    x = X.clone()
    in_place = Call(lambda m, x: m.inner(x.mul_(2.0)), inner=model)
    assert samples_mixed(in_place, [x]) == "mixed"
    assert torch.equal(x, X)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["centred inputs", "batch statistics", "centred outputs"])
def test_one_batch_of_a_mixing_model_has_its_exact_curvature(name: str) -> None:
    model = MIXING[name]()
    params, batches = dense.trainable(model), [(X, Y)]
    z = model(X)
    H, G = dense.hessian(CE(z, Y), params), dense.gauss_newton(CE(z, Y), z, params)
    torch.testing.assert_close(estimate(Hessian(), model, CE, batches).to_dense(), H)
    torch.testing.assert_close(estimate(GaussNewton(), model, CE, batches).to_dense(), G)
    for estimator, diagonal in ((HessianDiagonal(), H.diagonal()), (GaussNewtonDiagonal(), G.diagonal())):
        found = dense.flat(estimate(estimator, model, CE, batches).diagonal())
        torch.testing.assert_close(found, diagonal)


@pytest.mark.parametrize(
    "estimator",
    [
        lambda m: EmpiricalFisher(),
        lambda m: EmpiricalFisherDiagonal(samples="per_sample"),
        lambda m: KFAC(m, fisher="empirical"),
        lambda m: EKFAC(m, fisher="empirical"),
    ],
    ids=["matrix", "diagonal", "kfac", "ekfac"],
)
@pytest.mark.parametrize("name", ["centred inputs", "centred outputs"])
def test_a_sample_without_a_gradient_of_its_own_is_refused(name: str, estimator: Any) -> None:
    model = MIXING[name]()
    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        estimate(estimator(model), model, CE, [(X, Y)])


@pytest.mark.parametrize(
    "estimator", [lambda m: Hessian(), lambda m: GaussNewton(), lambda m: KFAC(m, fisher="mc")]
)
def test_several_batches_of_a_mixing_model_are_refused(estimator: Any) -> None:
    model = MIXING["centred inputs"]()
    with pytest.raises(ValueError, match="several batches do not equal the one concatenated batch: pass one"):
        estimate(estimator(model), model, CE, [(X[:4], Y[:4]), (X[4:], Y[4:])])
    with pytest.raises(ValueError, match="mixes the samples"):  # batches of one sample each
        estimate(estimator(model), model, CE, [(X[n : n + 1], Y[n : n + 1]) for n in range(N)])


@pytest.mark.parametrize("model", [TimeFirst, ToTimeFirst])
def test_samples_along_another_axis_may_be_split(model: type[nn.Module]) -> None:
    net = seeded(model())
    x, y = reals(4, 8, 4), reals(4, 8, 3)
    split, out = (1, 1) if model is TimeFirst else (0, 0)
    if model is ToTimeFirst:
        x, y = reals(8, 4, 4), reals(4, 8, 3)
        out = 1
    parts = [
        (x.narrow(split, a, b).contiguous(), y.narrow(out, a, b).contiguous()) for a, b in ((0, 5), (5, 3))
    ]
    B = estimate(Hessian(), net, nn.MSELoss(), parts)
    whole = estimate(Hessian(), net, nn.MSELoss(), [(x, y)])
    v = [torch.ones_like(p) for p in net.parameters()]
    torch.testing.assert_close(B.matvec(v), whole.matvec(v))


def test_a_model_that_cannot_be_tried_is_said_so() -> None:
    noisy = two(lambda m, x: m.b(m.a(x * (1 + m.a.weight.new_tensor(next(numbers)))).tanh()))
    numbers = iter(float(k) for k in range(10_000))
    with pytest.warns(UserWarning, match="could not be tried for a mixing of samples"):
        estimate(EmpiricalFisherDiagonal(samples="per_sample"), noisy, CE, [(X, Y)])


def training(estimator: Any, model: nn.Module, steps: int = 2) -> None:
    optimizer = SecondOrder(
        model.parameters(),
        lr=0.01,
        curvature=estimator,
        trust_region=TrustRegion(region=Unbounded(), radius=FixedRadius()),
    )
    for _ in range(steps):
        optimizer.zero_grad()
        z = model(X)
        loss = CE(z, Y)
        optimizer.backward(loss, z)
        optimizer.step(loss=loss)


def test_an_optimizer_looks_at_the_model_once() -> None:
    """The forward passes of the first step; a later one has its own alone."""
    calls = []
    inner = nn.Linear(4, 3)
    model = seeded(Call(lambda m, x: (calls.append(len(x)), m.a(x))[1], a=inner))
    estimator = EmpiricalFisherDiagonal(samples="per_sample", model=model, likelihood="categorical")
    training(estimator, model, 1)
    first = len(calls)
    assert first > 1
    training(estimator, model, 3)
    assert len(calls) == first + 3
    assert not model._forward_hooks


@pytest.mark.parametrize("kind", ["diagonal", "kfac"])
def test_an_optimizer_refuses_per_sample_curvature_of_a_mixing_model(kind: str) -> None:
    model = MIXING["centred inputs"]()
    estimator: Any = KFAC(model, fisher="empirical", likelihood="categorical")
    if kind == "diagonal":
        estimator = EmpiricalFisherDiagonal(samples="per_sample", model=model, likelihood="categorical")
    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        training(estimator, model)
    copied = copy.deepcopy(estimator)  # watches the model's copy
    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        training(copied, copied.model)


def test_an_optimizer_finds_batch_norm_in_the_graph() -> None:
    """The matrix sees neither the model nor its inputs."""

    def product(model: nn.Module) -> list[Tensor]:
        z = model(X)
        graph = LossGraph(CE(z, Y), dense.trainable(model), z)
        return EmpiricalFisher("categorical").graph_product(graph, {"index": 0})(graph.params)

    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="batch norm is in training mode"):
        product(model)
    product(model.eval())
    instance = Call(
        lambda m, x: m.b(m.a(x).unsqueeze(0)).squeeze(0), a=nn.Linear(4, 3), b=nn.InstanceNorm1d(N)
    )
    product(seeded(instance))


def test_an_estimate_leaves_a_living_graph_alone() -> None:
    """A graph may have saved buffers: neither a trial nor the estimate writes to them."""
    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))).eval()
    loss = CE(model(X), Y)
    estimate(EmpiricalFisherDiagonal(samples="per_sample"), model, CE, [(X[:4], Y[:4]), (X[4:], Y[4:])])
    loss.backward()


def test_a_model_is_tried_once_a_mode() -> None:
    calls = []

    def forward(m: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        return standardised(m.a(x)) if m.training else m.a(x)

    model = seeded(Call(forward, a=nn.Linear(4, 3))).eval()
    assert samples_mixed(model, [X]) == "apart"
    assert sum(calls) <= 5 * 4
    calls.clear()
    assert samples_mixed(model, [X]) == "apart"
    assert not calls
    assert samples_mixed(model.train(), [X]) == "mixed"
