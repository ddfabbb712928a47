"""Kronecker estimators in training: bit-exact resume in every kind, and automatic mixed precision."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import EKFAC, KFAC, estimate
from optimizers import SecondOrder
from tests.curvature import dense
from trust_region import FixedRadius, KLBall, TrustRegion


class Words(nn.Module):
    """An embedding tied to the head, positions, attention, a norm and a convolution: every kind of state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.mix = nn.LayerNorm(4), nn.Conv1d(4, 4, 2, groups=2)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(torch.tanh(self.mix(h.mT).mT)).mean(1)


def made(model: nn.Module, kind: type[KFAC], options: dict[str, Any]) -> SecondOrder:
    return SecondOrder(
        model.parameters(),
        lr=0.1,
        curvature=kind(model, factor_interval=2, inverse_interval=3, seed=4, **options),
        trust_region=TrustRegion(region=KLBall(includes_lr=True), radius=FixedRadius(0.01, damping=0.1)),
        momentum=0.9,
    )


def train(model: nn.Module, optimizer: SecondOrder, steps: range) -> None:
    for t in steps:
        g = torch.Generator().manual_seed(t)
        tokens, y = torch.randint(0, 7, (6, 4), generator=g), torch.randint(0, 7, (6,), generator=g)
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 6)):
            outputs = model(tokens[part])
            loss = functional.cross_entropy(outputs, y[part], reduction="sum") / 6
            optimizer.backward(loss, outputs)
        optimizer.step()


KINDS = [
    (kind, {"fisher": fisher, "sharing": sharing, **({"samples": 2} if fisher == "mc" else {})})
    for kind in (KFAC, EKFAC)
    for fisher in ("type-2", "mc", "empirical", "forward-only")
    for sharing in ("expand", "reduce")
]


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=[f"{k.__name__}-{o['fisher']}-{o['sharing']}" for k, o in KINDS]
)
def test_resume_is_bit_exact(kind: type[KFAC], options: dict[str, Any]) -> None:
    """Through a file, in the middle of both intervals."""
    steps, stop = 6, 3
    torch.manual_seed(0)
    whole = Words()
    first = Words()
    first.load_state_dict(whole.state_dict())
    start = [p.detach().clone() for p in whole.parameters()]
    train(whole, made(whole, kind, options), range(steps))
    optimizer = made(first, kind, options)
    train(first, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Words()
    second.load_state_dict(saved["model"])
    resumed = made(second, kind, options)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(stop, steps))
    for p, q, s in zip(whole.parameters(), second.parameters(), start, strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, s)


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_autocast_changes_curvature_by_its_rounding_alone(kind: type[KFAC], sharing: Any) -> None:
    """bfloat16 has 8 bits: inputs and gradients carry an error of 2^-8 or so each, the factors of a few of it."""
    torch.manual_seed(0)
    model = Words().float()
    tokens, y = torch.randint(0, 7, (6, 4)), torch.randint(0, 7, (6,))

    def loss_fn(z: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(z.float(), y)

    exact = estimate(kind(model, sharing=sharing), model, loss_fn, [(tokens, y)]).to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens).dtype == torch.bfloat16
        B = estimate(kind(model, sharing=sharing), model, loss_fn, [(tokens, y)])
    assert all(b.values.dtype == torch.float32 for b in B.blocks)
    error = float((B.to_dense() - exact).norm() / exact.norm())
    assert 0 < error < 0.05
    full = dense.trainable(model)
    assert all(p.dtype == torch.float32 for p in full)


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_sums_of_products_keep_the_precision_of_the_state_under_autocast(kind: type[KFAC]) -> None:
    """The model itself runs in float32, so nothing may differ but what the estimator does."""

    class Wide(Words):
        def forward(self, tokens: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(tokens)

    torch.manual_seed(0)
    model = Wide().float()
    tokens, y = torch.randint(0, 7, (6, 4)), torch.randint(0, 7, (6,))
    exact = estimate(kind(model), model, functional.cross_entropy, [(tokens, y)]).to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        B = estimate(kind(model), model, functional.cross_entropy, [(tokens, y)])
    assert float((B.to_dense() - exact).norm() / exact.norm()) < 1e-4
