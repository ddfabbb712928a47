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
    Fisher,
    FisherDiagonal,
    GaussNewton,
    GaussNewtonDiagonal,
    Hessian,
    HessianDiagonal,
    LowRank,
    estimate,
)
from curvature.loss_graph import LossGraph
from curvature.sample_mixing import samples_mixed
from optimizers import SecondOrder
from tests.curvature import dense
from tests.curvature.cases import Call, classes, reals, seeded
from trust_region import FixedRadius, L2Ball, SteihaugCG, TrustRegion, Unbounded

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


@pytest.mark.parametrize("kind", ["matrix", "diagonal", "kfac", "ekfac"])
def test_an_optimizer_refuses_per_sample_curvature_of_a_mixing_model(kind: str) -> None:
    model = MIXING["centred inputs"]()
    estimator = IN_TRAINING[f"empirical, {kind}"](model)
    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        training(estimator, model)
    copied = copy.deepcopy(estimator)  # watches the model's copy
    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        training(copied, copied.model)


def test_an_optimizer_finds_batch_norm_in_the_graph_at_every_step() -> None:
    """The model is tried once, and may change its mode later."""

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


# -- every estimator over every mixing model, in training -------------------------------------------------------------

#: Those that claim the curvature of the whole batch's loss, to a tolerance.
EXACT: dict[str, tuple[Callable[[nn.Module], Any], float]] = {
    "hessian": (lambda m: Hessian(), 1e-12),
    "hessian diagonal": (lambda m: HessianDiagonal(), 1e-12),
    "gauss-newton": (lambda m: GaussNewton(), 1e-12),
    "gauss-newton diagonal": (lambda m: GaussNewtonDiagonal(m), 1e-12),
    "fisher": (lambda m: Fisher("categorical"), 1e-12),
    "low rank": (lambda m: LowRank(rank=1000, interval=1), 1e-6),
    # by seed 0 and that many labels a sample; relative errors of squares fall as their root
    "fisher, drawn": (lambda m: Fisher("categorical", samples=4000), 0.1),
    "fisher diagonal": (lambda m: FisherDiagonal("categorical", samples=2000), 0.2),
}
#: Those that claim the curvature of each sample, or of each sample's row of a layer.
IN_TRAINING: dict[str, Callable[[nn.Module], Any]] = {
    "empirical, matrix": lambda m: EmpiricalFisher("categorical", model=m),
    "empirical, diagonal": lambda m: EmpiricalFisherDiagonal(
        samples="per_sample", model=m, likelihood="categorical"
    ),
    "empirical, kfac": lambda m: KFAC(m, fisher="empirical", likelihood="categorical"),
    "empirical, ekfac": lambda m: EKFAC(m, fisher="empirical", likelihood="categorical"),
}
BY_ROWS: dict[str, Callable[[nn.Module], Any]] = {
    "kfac, type-2": lambda m: KFAC(m, fisher="type-2"),
    "kfac, mc": lambda m: KFAC(m, fisher="mc"),
    "kfac, forward-only": lambda m: KFAC(m, fisher="forward-only"),
    "kfac, reduce": lambda m: KFAC(m, fisher="mc", sharing="reduce"),
    "ekfac, type-2": lambda m: EKFAC(m, fisher="type-2"),
    "ekfac, mc": lambda m: EKFAC(m, fisher="mc"),
}
#: The models that mix samples before their first parameter alone: the rest of each, and what it is given.
AFTER_MIXING: dict[str, tuple[Callable[[Any, Tensor], Tensor], Tensor]] = {
    "centred inputs": (lambda m, x: m.b(m.a(x).tanh()), X - X.mean(0)),
    "scaled by the largest norm": (lambda m, x: m.b(m.a(x).tanh()), X / X.norm(dim=1).max()),
    "the next sample": (lambda m, x: m.b(m.a(x).tanh()), X - 0.1 * X.roll(1, 0)),
    "the first sample": (lambda m, x: m.b(m.a(x).tanh()), X * (1 + X[:1])),
    "pairs": (
        lambda m, x: m.b((m.a(x[:, 0]) + m.a(x[:, 1])).tanh()),
        torch.stack([X, X.view(-1, 2, 4).flip(1).reshape(-1, 4)], 1),
    ),
}
MODELS = {k: v for k, v in MIXING.items() if k != "dropout beside it"} | {
    "batch norm": lambda: seeded(
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    ),
    "softmax over the batch": lambda: two(lambda m, x: m.b(m.a(x).softmax(0))),
    "groups over the batch": lambda: two(lambda m, x: m.b(functional.layer_norm(m.a(x).T, [N]).T)),
}


def contrastive(z: Tensor, _: Tensor) -> Tensor:
    z = functional.normalize(z, dim=1)
    return functional.cross_entropy(z @ z.T, torch.arange(N).roll(1))


def trained(estimator: Any, model: nn.Module, x: Tensor = X, loss_fn: Any = CE) -> Tensor:
    """B of the first step of an optimizer."""
    optimizer = SecondOrder(
        model.parameters(),
        lr=0.0,
        curvature=estimator,
        trust_region=TrustRegion(
            region=L2Ball(), subproblem=SteihaugCG(max_iterations=1), radius=FixedRadius()
        ),
    )
    operator, seen = estimator.operator, []

    def watched(state: Any) -> Any:
        B = operator(state)
        seen.append(B.to_dense())
        return B

    object.__setattr__(estimator, "operator", watched)
    z = model(x)
    loss = loss_fn(z, Y)
    optimizer.backward(loss, z)
    optimizer.step(loss=loss)
    return seen[0]


@pytest.mark.parametrize("what", [*MODELS, "contrastive loss"])
@pytest.mark.parametrize("name", EXACT)
def test_curvature_of_the_batch_is_exact_in_training_or_refused(name: str, what: str) -> None:
    model = MODELS.get(what, MODELS["pairs"])()
    loss_fn = contrastive if what == "contrastive loss" else CE
    make, tolerance = EXACT[name]
    coupled = what == "contrastive loss" and "hessian" not in name and name != "gauss-newton"
    if coupled or (what, name) == ("batch norm", "gauss-newton diagonal"):
        refusal = (
            "couples the outputs|is not that of likelihood|batch norm '1' is in training|not positive semidef"
        )
        with pytest.raises((ValueError, ArithmeticError), match=refusal):
            trained(make(model), model, loss_fn=loss_fn)
        return
    params, z = dense.trainable(model), model(X)
    loss = loss_fn(z, Y)
    expected = dense.hessian(loss, params) if "hessian" in name else dense.gauss_newton(loss, z, params)
    if "diagonal" in name:
        expected = torch.diag(expected.diagonal())
    assert dense.relative_error(trained(make(model), model, loss_fn=loss_fn), expected) < tolerance


@pytest.mark.parametrize("what", [*MODELS, "contrastive loss"])
@pytest.mark.parametrize("name", IN_TRAINING)
def test_curvature_of_samples_is_refused_in_training(name: str, what: str) -> None:
    model = MODELS.get(what, MODELS["pairs"])()
    loss_fn = contrastive if what == "contrastive loss" else CE
    with pytest.raises(ValueError, match=r"mixes the samples of a batch|batch norm '1' is in training mode"):
        trained(IN_TRAINING[name](model), model, loss_fn=loss_fn)
    apart = two(lambda m, x: m.b(m.a(x).tanh()))
    if what == "contrastive loss":
        with pytest.raises(ValueError, match="is not that of likelihood"):
            trained(IN_TRAINING[name](apart), apart, loss_fn=loss_fn)


@pytest.mark.parametrize("what", [*MODELS, "contrastive loss"])
@pytest.mark.parametrize("name", BY_ROWS)
def test_kronecker_factors_of_rows_that_meet_are_refused_in_training(name: str, what: str) -> None:
    """Where only inputs are mixed, before the first layer, they are the model's on the mixed inputs."""
    if what in AFTER_MIXING:
        model, (rest, x) = MODELS[what](), AFTER_MIXING[what]
        plain = two(rest)
        B = trained(BY_ROWS[name](model), model)
        assert dense.relative_error(B, trained(BY_ROWS[name](plain), plain, x)) < 1e-10
        return
    model = MODELS.get(what, lambda: two(lambda m, x: m.b(m.a(x).tanh())))()
    if name == "kfac, forward-only" and what not in ("batch norm", "contrastive loss"):
        inputs: list[Tensor] = []  # no gradient enters: A is of the layers' inputs, whatever mixed them
        for layer in (model.a, model.b):
            layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
        B = trained(BY_ROWS[name](model), model)
        rows = [torch.cat([h, torch.ones(N, 1, dtype=h.dtype)], 1) for h in inputs[:2]]
        traces = [float((h.square().sum() / N) * d) for h, d in zip(rows, (5, 3), strict=True)]
        assert float(B.trace()) == pytest.approx(sum(traces))
        return
    loss_fn = contrastive if what == "contrastive loss" else CE
    refusal = (
        "belongs to several samples|batch norm '1' is in training mode|couples the outputs|known likelihood"
    )
    with pytest.raises(ValueError, match=refusal):
        trained(BY_ROWS[name](model), model, loss_fn=loss_fn)


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
def test_kronecker_factors_of_rows_that_serve_all_samples_are_not_refused() -> None:
    """Labels are drawn: a learned query that is projected once meets all samples, and mixes none."""
    model = seeded(Latent())
    assert torch.isfinite(trained(KFAC(model, fisher="mc"), model)).all()


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.parametrize("times", [N, N - 2])
@pytest.mark.parametrize("layout", [TimeFirst, ToTimeFirst])
@pytest.mark.parametrize("name", IN_TRAINING)
def test_time_first_is_told_apart_from_mixing(name: str, layout: type[nn.Module], times: int) -> None:
    """As many times as samples or not: what to do is said, and with the samples first it is exact."""
    model = seeded(layout())
    x = reals(times, N, 4) if layout is TimeFirst else reals(N, times, 4)
    y = classes(times, N)

    def loss_fn(z: Tensor, _: Tensor) -> Tensor:
        return functional.cross_entropy(z.flatten(0, 1), y.flatten())

    with pytest.raises(ValueError, match=r"if it is time first, .* by transpose\(0, 1\)"):
        trained(IN_TRAINING[name](model), model, x, loss_fn)
    if "kfac" in name:
        return
    first = seeded(Call(lambda m, x: m.inner(x).transpose(0, 1), inner=layout()))
    if layout is TimeFirst:
        first.function = lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1)
        x = x.transpose(0, 1)
    params, z = dense.trainable(first), first(x)
    expected = 0
    for n in range(N):
        g = dense.gradient(functional.cross_entropy(z[n], y[:, n]), params)
        expected = expected + torch.outer(g, g) / N
    B = trained(
        IN_TRAINING[name](first),
        first,
        x,
        lambda z, _: functional.cross_entropy(z.flatten(0, 1), y.T.flatten()),
    )
    assert dense.relative_error(B.diagonal(), expected.diagonal()) < 1e-10


def test_the_empirical_fisher_asks_for_the_model_in_training() -> None:
    model = two(lambda m, x: m.b(m.a(x).tanh()))
    with pytest.raises(ValueError, match=r"EmpiricalFisher needs model= in an optimizer.*give model=model"):
        trained(EmpiricalFisher("categorical"), model)
    found = trained(EmpiricalFisher("categorical", model=model), model)
    torch.testing.assert_close(found, estimate(EmpiricalFisher(), model, CE, [(X, Y)]).to_dense())
