"""Factors are allocated without contents: a product that overwrites them needs no zeros, the rest must get some."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import EKFAC, KFAC, LossGraph, estimate
from curvature.kronecker import factors
from tests.curvature import dense


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that whatever reads it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert bool(torch.empty(3).isnan().all())  # the premise
    yield
    torch.use_deterministic_algorithms(before)


class Mixed(nn.Module):
    """Layers of every way to write a factor: once, twice, in groups, in panels, and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 6)
        self.twice = nn.Linear(6, 6)
        self.grouped = nn.Conv1d(6, 4, 2, groups=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.wide = nn.Linear(4, 300)
        self.bias_of_frozen = nn.Linear(300, 3)
        self.bias_of_frozen.weight.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(torch.tanh(self.twice(self.tokens(x))))
        h = self.grouped(h.mT).mT
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.bias_of_frozen(torch.tanh(self.wide(h))).mean(1))


def model() -> Mixed:
    g = torch.Generator().manual_seed(3)
    made = Mixed().double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return made


def measured(estimator: Any, made: nn.Module) -> dict[str, list[Tensor]]:
    g = torch.Generator().manual_seed(4)
    x, y = torch.randint(0, 5, (7, 4), generator=g), torch.randint(0, 3, (7,), generator=g)
    params = dense.trainable(made)
    state = estimator.init(params)
    z = made(x)
    return estimator.measure(state, LossGraph(nn.functional.cross_entropy(z, y), params, z))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical", "forward-only"])
@pytest.mark.usefixtures("poisoned")
def test_no_statistic_holds_what_lay_in_memory(fisher: Any, sharing: Any, kind: Any) -> None:
    made = model()
    found = measured(kind(made, fisher=fisher, sharing=sharing), made)
    values = [x for held in found.values() for x in held]
    if fisher != "forward-only":
        assert sum(x.numel() for x in values) > 90_000  # the wide layer's panels are among them
    assert all(bool(x.isfinite().all()) for x in values)
    i = [name for name, p in made.named_parameters() if p.requires_grad].index("unused.weight")
    assert found["A"][i].shape == (1, 3, 3)
    assert not bool(found["A"][i].any())  # nothing was written to it


def step(kfac: KFAC, made: nn.Module, state: Any) -> dict[str, list[Tensor]]:
    g = torch.Generator().manual_seed(state["step"])
    x, y = torch.randint(0, 5, (7, 4), generator=g), torch.randint(0, 3, (7,), generator=g)
    z = made(x)
    state["step"] += 1
    return kfac.measure(state, LossGraph(nn.functional.cross_entropy(z, y), dense.trainable(made), z))  # type: ignore[no-any-return]


@pytest.mark.parametrize("hold", [lambda x: x, lambda x: x[0][0], lambda x: x.detach(), lambda x: x.numpy()])
def test_statistics_that_somebody_holds_are_never_overwritten(hold: Any) -> None:
    made = model()
    kfac = KFAC(made)
    state = kfac.init(dense.trainable(made))
    found = step(kfac, made, state)
    kept = [hold(x) for key in ("A", "G") for x in found[key] if x.numel()]
    before = [torch.as_tensor(x).clone() for x in kept]
    del found
    for _ in range(3):
        step(kfac, made, state)
    assert all(torch.equal(torch.as_tensor(x), y) for x, y in zip(kept, before, strict=True))


def test_memory_of_a_step_is_that_of_the_next_where_nobody_holds_it() -> None:
    made = model()
    kfac = KFAC(made)
    state = kfac.init(dense.trainable(made))
    places = [x.data_ptr() for key in ("A", "G") for x in step(kfac, made, state)[key] if x.numel()]
    taken = [torch.empty(300, 300) for _ in range(9)]  # what is given back to the system goes to others
    assert places == [x.data_ptr() for key in ("A", "G") for x in step(kfac, made, state)[key] if x.numel()]
    assert len(taken) == 9
    seldom = KFAC(made, factor_interval=2)
    step(seldom, made, seldom.init(dense.trainable(made)))
    assert not seldom._live.spare._held


def test_no_memory_is_kept_after_one_shot_use_or_in_a_copy() -> None:
    made = model()
    kfac = KFAC(made)
    g = torch.Generator().manual_seed(4)
    x, y = torch.randint(0, 5, (7, 4), generator=g), torch.randint(0, 3, (7,), generator=g)
    estimate(kfac, made, nn.CrossEntropyLoss(), [(x, y)])
    assert not kfac._live.spare._held
    step(kfac, made, kfac.init(dense.trainable(made)))
    assert kfac._live.spare._held
    assert not copy.deepcopy(kfac)._live.spare._held
    assert not pickle.loads(pickle.dumps(kfac._live.spare))._held


@pytest.mark.parametrize("d", [383, 384, 385, 386, 387, 513])
@pytest.mark.parametrize("empty", [True, False])
def test_a_product_in_panels_is_the_whole_product(d: int, empty: bool) -> None:
    """Widths about the one from which there are panels, whatever four of them leave; in a part of a larger matrix."""
    g = torch.Generator().manual_seed(d)
    a, w = (
        torch.randn(1, 3, d, generator=g, dtype=torch.float64),
        torch.rand(3, generator=g, dtype=torch.float64),
    )
    held = torch.randn(d + 1, d + 1, generator=g, dtype=torch.float64)
    held = held + held.T
    into = held.clone().unsqueeze(0)
    if empty:
        into[:, :d, :d] = torch.nan
    factors.add_gram_(into[:, :d, :d], a * w.unsqueeze(-1), a, empty)
    expected = torch.einsum("m,mi,mj->ij", w, a[0], a[0]) + (0 if empty else held[:d, :d])
    torch.testing.assert_close(into[0, :d, :d], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(into[0, d], held[d])
    assert torch.equal(into[0, :, d], held[:, d])
