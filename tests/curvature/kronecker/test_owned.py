"""K-FAC and EK-FAC with ``inverses="owner"`` in one process, which owns all: the same operator, in another place. See
also ``tests/distributed/inverses.py``."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import EKFAC, KFAC, PerParameter, estimate
from curvature.kronecker import moments
from curvature.protocols import CACHE
from curvature.testing import check_estimator
from optimizers import SecondOrder, build


class Tied(nn.Module):
    """An embedding whose matrix is the head's, a convolution, a norm: every kind of block, and a diagonal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        h = h + self.mix(h.mT).mT
        return self.head(self.norm(h))


X = torch.randint(0, 7, (5, 6), generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 7, (5, 6), generator=torch.Generator().manual_seed(2))


def loss_fn(z: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(z.flatten(0, 1), y.flatten())


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.parametrize("fisher", ["type-2", "forward-only"])
@pytest.mark.parametrize("damping_kind", ["exact", "factored", None])
def test_operator_is_the_same_wherever_its_bases_are(fisher: Any, damping_kind: Any) -> None:
    model = Tied()

    def make(place: Any) -> KFAC | EKFAC:
        if damping_kind is None:
            return EKFAC(model, fisher=fisher, inverses=place)
        return KFAC(model, fisher=fisher, damping_kind=damping_kind, inverses=place)

    here, there = (estimate(make(place), model, loss_fn, [(X, Y)]) for place in ("everywhere", "owner"))
    generator = torch.Generator().manual_seed(3)
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    for a, b in (
        (here.matvec(v), there.matvec(v)),
        (here.solve(v, 0.1), there.solve(v, 0.1)),
        (here.diagonal(), there.diagonal()),
    ):
        for x, y in zip(a, b, strict=True):
            if damping_kind != "factored":
                assert torch.equal(x, y)
            else:  # formed inverses here, eigenbases there
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(here.to_dense(), there.to_dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_estimator_keeps_the_laws(kind: Any) -> None:
    check_estimator(lambda model: kind(model, inverses="owner"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(model: nn.Module, optimizer: SecondOrder, steps: range) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(10, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (10,), generator=generator)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, y)
            optimizer.backward(loss, outputs)
            return loss

        optimizer.step(closure)


def kfac(model: nn.Module, inverses: Any, interval: int = 1, preset: str = "kfac") -> SecondOrder:
    return build(model, preset, inverses=inverses, inverse_interval=interval, damping_kind="exact")


PRESETS = pytest.mark.parametrize("preset", ["kfac", "ekfac"])


@PRESETS
@pytest.mark.parametrize("interval", [1, 3])
def test_training_is_the_same_bit_for_bit(interval: int, preset: str) -> None:
    a, b = network(), network()
    everywhere, owner = kfac(a, "everywhere", interval, preset), kfac(b, "owner", interval, preset)
    train(a, everywhere, range(8))
    train(b, owner, range(8))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert owner.state_bytes() == everywhere.state_bytes()  # one process owns all
    assert not any("vectors" in name or CACHE in name for entries in owner.state.values() for name in entries)


def test_bases_are_decomposed_again_after_a_load_and_a_copy() -> None:
    """A state of other factors than those that the cache belongs to must not be used with it."""
    model, other = network(), network()
    optimizer, resumed = kfac(model, "owner"), kfac(other, "owner")
    train(model, optimizer, range(4))
    train(other, resumed, range(10, 13))  # its own bases, which the load makes worthless
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert CACHE not in resumed._curvature_state
    twin_model, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, resumed), (twin_model, twin)):
        train(m, o, range(4, 8))
    for p, q, r in zip(model.parameters(), other.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@PRESETS
@pytest.mark.parametrize("place", ["owner", "everywhere"])
def test_resumes_bit_for_bit_between_refreshes(place: str, preset: str) -> None:
    """From a state with the bases; they are neither of the factors at hand nor of the last ones measured."""
    model, other = network(), network()
    optimizer, resumed = kfac(model, "owner", 4, preset), kfac(other, place, 4, preset)
    train(model, optimizer, range(7))
    if place == "owner":
        train(other, resumed, range(10, 13))  # its own bases, which the load must replace
    file = io.BytesIO()
    torch.save(optimizer.gathered_state_dict(), file)
    file.seek(0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    twin_model, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, resumed), (twin_model, twin)):
        train(m, o, range(7, 10))
    for p, q, r in zip(model.parameters(), other.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    divided = ("vectors", "moments")
    assert not any(d in name for entries in optimizer.state.values() for name in entries for d in divided)


def test_a_state_that_would_go_on_otherwise_is_refused_and_changes_nothing() -> None:
    model, other = network(), network()
    optimizer, resumed = kfac(model, "owner", 4), kfac(other, "owner", 4)
    kfac(network(), "owner", 4).load_state_dict(
        optimizer.state_dict()
    )  # before any basis there is none to lack
    train(model, optimizer, range(3))
    train(other, resumed, range(2))
    before = copy.deepcopy(resumed.gathered_state_dict())
    some, wrong = optimizer.gathered_state_dict(), optimizer.gathered_state_dict()
    del some["state"][0]["curvature/A_vectors"]
    wrong["state"][0]["curvature/G_vectors"] = torch.zeros(2, 2)
    for bad, told in (
        (optimizer.state_dict(), "gathered_state_dict"),
        (some, "for every parameter or for none"),
        (wrong, "must have shape"),
    ):
        with pytest.raises(ValueError, match=told):
            resumed.load_state_dict(bad)
    after = resumed.gathered_state_dict()
    for i, entries in before["state"].items():
        for name, value in entries.items():
            torch.testing.assert_close(after["state"][i][name], value, rtol=0, atol=0, equal_nan=True)
    for part in (KFAC(model, inverses="owner", inverse_interval=2), EKFAC(model, inverses="owner")):
        with pytest.raises(ValueError, match="PerParameter cannot save"):
            PerParameter([("*", part)], model).init(list(model.parameters()))
    measured, empty = kfac(network(), "owner", 1, "ekfac"), kfac(network(), "owner", 1, "ekfac")
    train(measured.curvature.model, measured, range(1))
    with pytest.raises(ValueError, match="gathered_state_dict"):  # S is a running mean, whatever the interval
        empty.load_state_dict(measured.state_dict())


@pytest.mark.parametrize("way", ["unfrozen", "added"])
@PRESETS
def test_a_layer_that_joins_later_is_treated_as_everywhere(preset: str, way: str) -> None:
    found = []
    for place in ("everywhere", "owner"):
        model = network()
        first = list(model[0].parameters())
        for p in first:
            p.requires_grad_(False)
        optimizer = build(
            model,
            preset,
            params=list(model[2].parameters()) if way == "added" else list(model.parameters()),
            inverses=place,
            inverse_interval=5,
            damping="fixed",
            radius=1.0,
            damping_kind="exact",
        )
        train(model, optimizer, range(2))
        for p in first:
            p.requires_grad_(True)
        if way == "added":
            optimizer.add_param_group({"params": first})
        before = model[0].weight.detach().clone()
        train(model, optimizer, range(2, 6))
        assert not torch.equal(before, model[0].weight)
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_what_is_too_large_to_hold_is_looked_at_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = network(), network()
    everywhere, owner = kfac(a, "everywhere", 2, "ekfac"), kfac(b, "owner", 2, "ekfac")
    train(a, everywhere, range(1))
    train(b, owner, range(1))
    monkeypatch.setattr(moments, "HELD", 10)
    train(a, everywhere, range(1, 5))
    train(b, owner, range(1, 5))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_wrong_places_are_refused() -> None:
    with pytest.raises(ValueError, match="inverses must be 'everywhere' or 'owner', got 'elsewhere'"):
        KFAC(network(), inverses="elsewhere")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inverses must be 'everywhere' or 'owner', got 'nowhere'"):
        EKFAC(network(), inverses="nowhere")  # type: ignore[arg-type]
