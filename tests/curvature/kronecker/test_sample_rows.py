"""A layer's rows are those of the samples they are counted for, or the layer is refused; shapes alone do not tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import EKFAC, KFAC, LossGraph, estimate
from curvature.kronecker import sample_rows
from tests.curvature import dense
from tests.curvature.cases import Call, classes, reals, seeded
from tests.curvature.kronecker.reference import module_gauss_newton

TIGHT = 1e-10
N = 4
WEIGHT = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)
Y = torch.tensor([0, 1, 1, 2])


def loss(weighted: bool) -> nn.Module:
    return nn.CrossEntropyLoss(WEIGHT if weighted else None)


def positions_first(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x.transpose(0, 1)))).mean(0)


def position_by_position(m: Any, x: Tensor) -> Tensor:
    rows = torch.tanh(m.a(x.transpose(0, 1).reshape(-1, 3)))
    return m.b(rows).reshape(-1, N, 3).mean(0)


def layers() -> dict[str, nn.Module]:
    return {"a": nn.Linear(3, 4), "b": nn.Linear(4, 3)}


OPTIONS = [(EKFAC, {}), (EKFAC, {"fisher": "empirical"}), (KFAC, {}), (KFAC, {"sharing": "reduce"})]


def twin_of(model: nn.Module) -> nn.Module:
    """The same function, samples first throughout."""
    twin = Call(lambda m, x: m.b(torch.tanh(m.a(x))).mean(1), **layers())
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("length", [N, 3, 1])
def test_the_samples_may_be_the_second_axis_of_a_layers_positions(
    length: int, weighted: bool, kind: type[KFAC], options: dict[str, Any]
) -> None:
    model, x = Call(positions_first, **layers()), torch.randn(N, length, 3)
    twin = twin_of(model)
    ours = estimate(kind(model, **options), model, loss(weighted), [(x, Y)]).to_dense()
    theirs = estimate(kind(twin, **options), twin, loss(weighted), [(x, Y)]).to_dense()
    assert dense.relative_error(ours, theirs) < TIGHT


@pytest.mark.parametrize("length", [N, 3])
def test_rows_in_another_order_are_refused_where_samples_are_told_apart(length: int) -> None:
    model, x = Call(position_by_position, **layers()), torch.randn(N, length, 3)
    refusal = r"belongs to several samples|keep the samples in dim 0"
    with pytest.raises(ValueError, match=refusal):
        estimate(EKFAC(model), model, loss(False), [(x, Y)])
    with pytest.raises(ValueError, match=refusal):
        estimate(KFAC(model, sharing="reduce"), model, loss(False), [(x, Y)])
    with pytest.raises(ValueError, match=refusal):
        estimate(KFAC(model), model, loss(True), [(x, Y)])
    twin = twin_of(model)  # where all count alike, order is free
    same = estimate(KFAC(twin), twin, loss(False), [(x, Y)]).to_dense()
    assert dense.relative_error(estimate(KFAC(model), model, loss(False), [(x, Y)]).to_dense(), same) < TIGHT


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.parametrize("length", [N, 3])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_norm_of_positions_first_has_its_exact_diagonal(kind: type[KFAC], length: int) -> None:
    model = Call(lambda m, x: m.norm(x.transpose(0, 1)).sin().mean(0), norm=nn.LayerNorm(3))
    x = torch.randn(N, length, 3)
    z = model(x)
    GN = dense.gauss_newton(loss(True)(z, Y), z, dense.trainable(model))
    B = estimate(kind(model), model, loss(True), [(x, Y)])
    assert dense.relative_error(dense.flat(B.diagonal()), GN.diagonal()) < TIGHT


class Positions(nn.Module):
    """Tokens and positions; the positions are looked up once for all samples, or for each."""

    def __init__(self, lookup: str) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(5, 4), nn.Embedding(6, 4)
        self.inner, self.head, self.lookup = nn.Linear(4, 4), nn.Linear(4, 3), lookup

    def forward(self, tokens: Tensor) -> Tensor:
        index = torch.arange(tokens.shape[1])
        if self.lookup == "each":
            index = index.expand(tokens.shape)
        elif self.lookup == "row":
            index = index.unsqueeze(0)
        return self.head(torch.tanh(self.inner(self.tokens(tokens) + self.places(index)))).mean(1)


@pytest.mark.parametrize("lookup", ["once", "row"])
@pytest.mark.parametrize("length", [N, 3, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{}, {"sharing": "reduce"}, {"fisher": "empirical"}], ids=str)
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_positions_looked_up_once_are_those_of_every_sample(
    kind: type[KFAC], options: dict[str, Any], weighted: bool, length: int, lookup: str
) -> None:
    model, twin = Positions(lookup), Positions("each")
    twin.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 5, (N, length))
    ours = estimate(kind(model, **options), model, loss(weighted), [(tokens, Y)]).to_dense()
    theirs = estimate(kind(twin, **options), twin, loss(weighted), [(tokens, Y)]).to_dense()
    assert dense.relative_error(ours, theirs) < TIGHT
    if (
        length == 1 and not options and kind is EKFAC
    ):  # the premise: the embedding's block is right, not only equal
        places = slice(20, 44)
        z = model(tokens)
        GN = module_gauss_newton(model, loss(weighted)(z, Y), z)[places, places]
        assert dense.relative_error(ours[places, places].diagonal(), GN.diagonal()) < TIGHT


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_rows_that_all_samples_share_are_refused_and_may_be_excluded(kind: type[KFAC], fisher: Any) -> None:
    model = Call(lambda m, x: m.b(torch.tanh(x) * m.a(torch.ones(4))), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    x = torch.randn(N, 4)
    with pytest.raises(ValueError, match=r"'a' belongs to several samples.*exclude=\('a',\)"):
        estimate(kind(model, fisher=fisher), model, loss(False), [(x, Y)])
    excluded = kind(model, fisher=fisher, exclude=("a",))
    diagonal = dense.flat(estimate(excluded, model, loss(False), [(x, Y)]).diagonal())[:20]
    z = model(x)
    params = dense.trainable(model)
    if fisher == "type-2":
        exact = dense.gauss_newton(loss(False)(z, Y), z, params)
    else:
        each = [functional.cross_entropy(z[n], Y[n]) for n in range(N)]
        exact = dense.empirical_fisher(each, [1 / N] * N, params)
    assert dense.relative_error(diagonal, exact.diagonal()[:20]) < TIGHT


def test_drawn_labels_let_samples_meet_where_all_count_alike() -> None:
    """Scores of different samples are independent, so their products vanish in the mean: no proof is asked for.

    The shared row is one row, so its block is exact: 4,000 draws, seed 0, leave 1/√4000 = 1.6 % of noise.
    """
    model = Call(lambda m, x: m.b(torch.tanh(x) * m.a(torch.ones(4))), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    x = torch.randn(N, 4)
    found = estimate(KFAC(model, fisher="mc", samples=4000), model, loss(False), [(x, Y)])
    z = model(x)
    exact = dense.gauss_newton(loss(False)(z, Y), z, dense.trainable(model)).diagonal()
    assert dense.relative_error(dense.flat(found.diagonal())[:20], exact[:20]) < 0.08


def test_flattened_outputs_of_positions_that_mix_are_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h = h + h.mean(1, keepdim=True) if m.mixes else h
        return m.b(torch.tanh(h)).reshape(-1, 3)

    model, x, y = Call(forward, **layers()), torch.randn(N, 3, 3), torch.randint(0, 3, (N * 3,))
    model.mixes = True
    with pytest.raises(ValueError, match="'a' belongs to several samples"):
        estimate(KFAC(model), model, loss(False), [(x, y)])
    model.mixes = False
    flat = Call(lambda m, x: m.b(torch.tanh(m.a(x))), **layers())
    flat.load_state_dict(model.state_dict())
    same = estimate(KFAC(flat), flat, loss(True), [(x.reshape(-1, 3), y)]).to_dense()
    assert dense.relative_error(estimate(KFAC(model), model, loss(True), [(x, y)]).to_dense(), same) < TIGHT


def test_any_two_samples_that_meet_are_found() -> None:
    """All pairs of 11 samples, one at a time: the proof is not a matter of chance."""

    class Pair(nn.Module):
        def __init__(self, i: int, j: int) -> None:
            super().__init__()
            self.a, self.b, self.i, self.j = nn.Linear(2, 2), nn.Linear(2, 3), i, j

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.b(
                h
                + torch.zeros(11, 11).index_put(
                    (torch.tensor(self.j), torch.tensor(self.i)), torch.tensor(0.1)
                )
                @ h
            )

    x, y = torch.randn(11, 2), torch.randint(0, 3, (11,))
    for i in range(11):
        for j in range(11):
            model = Pair(i, j)
            if i == j:
                estimate(KFAC(model), model, loss(False), [(x, y)])
            else:
                with pytest.raises(ValueError, match="'a' belongs to several samples"):
                    estimate(KFAC(model), model, loss(False), [(x, y)])


def test_each_use_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = sample_rows.astray

    def counting(graph: LossGraph, found: Any, rows: list[Any], samples: int) -> set[int]:
        seen.append(len(rows))
        return real(graph, found, rows, samples)

    monkeypatch.setattr(sample_rows, "astray", counting)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
    params, kfac = dense.trainable(model), EKFAC(model)
    state = kfac.init(params)
    for size in (6, 6, 4):
        z = model(torch.randn(size, 3))
        kfac.measure(
            state, LossGraph(functional.cross_entropy(z, torch.zeros(size, dtype=torch.long)), params, z)
        )
    assert seen == [3]


class TokenRouter(nn.Module):
    """Tokens of all samples are dealt out to two layers by their values: any number of rows, some by chance N."""

    def __init__(self, by_token: bool) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), nn.Linear(3, 3)
        self.by_token = by_token

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        place = (tokens[:, 0] > 0.3).long()
        out = tokens.new_zeros(tokens.shape)
        for k, expert in enumerate(self.experts):
            out[place == k] = torch.tanh(expert(tokens[place == k]))
        z = self.head(out.view(x.shape))
        return z.transpose(1, 2) if self.by_token else z.mean(1)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("cuts", [(4, 6), (3, 6), (1, 6), (1, 2, 3, 4, 5, 6)], ids=str)
def test_a_router_of_tokens_is_the_same_however_the_batch_is_split(
    by_token: bool, cuts: tuple[int, ...]
) -> None:
    model = seeded(TokenRouter(by_token))
    x, y = reals(6, 4, 3), classes(6, 4) if by_token else classes(6)
    parts = [(x[a:b], y[a:b]) for a, b in zip((0, *cuts), cuts, strict=False)]
    whole = estimate(KFAC(model), model, nn.CrossEntropyLoss(), [(x, y)]).to_dense()
    split = estimate(KFAC(model), model, nn.CrossEntropyLoss(), parts).to_dense()
    torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cuts", [(3, 4), (1, 4), (2, 4)], ids=str)
def test_a_layer_called_sample_by_sample_is_the_layer_called_once(cuts: tuple[int, ...]) -> None:
    def alone(m: Any, x: Tensor) -> Tensor:
        return m.h(torch.stack([m.c(one).flatten(1).mean(1) for one in x]))

    def together(m: Any, x: Tensor) -> Tensor:
        return m.h(m.c(x).flatten(2).mean(2))

    models = [seeded(Call(f, c=nn.Conv2d(2, 2, 2), h=nn.Linear(2, 3))) for f in (alone, together)]
    x, y = reals(4, 2, 3, 3), classes(4)
    parts = [(x[a:b], y[a:b]) for a, b in zip((0, *cuts), cuts, strict=False)]
    found, expected = (estimate(KFAC(m), m, nn.CrossEntropyLoss(), parts).to_dense() for m in models)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
