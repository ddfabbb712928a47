"""Both loops, accumulation, and what is said when a signal is missing."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from curvature import HutchinsonDiagonal
from optimizers import SOAA, SecondOrder, build
from trust_region import FixedRadius, RmsBox, TrustRegion


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)).double()


def batch(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 6, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (n,), generator=generator),
    )


def adahessian_like(model: torch.nn.Module) -> SecondOrder:
    return SecondOrder(
        model.parameters(),
        lr=1e-2,
        curvature=HutchinsonDiagonal(interval=2, beta=0.9),
        trust_region=TrustRegion(region=RmsBox(), radius=FixedRadius(1.0)),
        momentum=0.9,
    )


@pytest.mark.parametrize("make", [lambda m: SOAA(m.parameters(), lr=1e-2, total_steps=20), adahessian_like])
def test_flat_loop_and_closure_loop_agree_bitwise(make) -> None:
    flat, closed = network(), network()
    a, b = make(flat), make(closed)
    x, y = batch()

    def closure() -> torch.Tensor:
        b.zero_grad()
        loss = torch.nn.functional.cross_entropy(closed(x), y)
        b.backward(loss)
        return loss

    for _ in range(10):
        a.zero_grad()
        loss = torch.nn.functional.cross_entropy(flat(x), y)
        a.backward(loss)
        assert a.step() is None
        assert float(b.step(closure).detach()) == float(loss.detach())
    for p, q in zip(flat.parameters(), closed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("make", [lambda m: SOAA(m.parameters(), lr=1e-2, total_steps=20), adahessian_like])
def test_micro_batches_equal_one_batch(make) -> None:
    whole, split = network(), network()
    a, b = make(whole), make(split)
    x, y = batch()
    for _ in range(10):
        a.zero_grad()
        a.backward(torch.nn.functional.cross_entropy(whole(x), y))
        a.step()
        b.zero_grad()
        for part_x, part_y in zip(x.split(4), y.split(4), strict=True):
            b.backward(torch.nn.functional.cross_entropy(split(part_x), part_y) / 3)
        b.step()
        assert float(a.step_info.loss) == pytest.approx(float(b.step_info.loss), rel=1e-12)
        assert float(a.step_info.radius) == pytest.approx(float(b.step_info.radius), rel=1e-6)
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_curvature_that_needs_a_graph_says_how_to_give_it() -> None:
    model = network()
    optimizer = adahessian_like(model)
    x, y = batch()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(
        RuntimeError, match=r"Hessian-vector products.*optimizer.backward\(loss\) in place of"
    ):
        optimizer.step()


def test_observations_of_a_cleared_gradient_are_discarded() -> None:
    model, x, y = network(), *batch()
    optimizer = adahessian_like(model)
    optimizer.backward(5.0 * torch.nn.functional.cross_entropy(model(x), y))
    model.zero_grad()  # behind the optimizer's back
    optimizer.backward(torch.nn.functional.cross_entropy(model(x), y))
    expected = copy.deepcopy(model)
    other = adahessian_like(expected)
    other.zero_grad()
    other.backward(torch.nn.functional.cross_entropy(expected(x), y))
    optimizer.step()
    other.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


def test_step_leaves_gradients_as_they_are() -> None:
    model, x, y = network(), *batch()
    optimizer = SOAA(model.parameters(), lr=1e-2)
    optimizer.backward(torch.nn.functional.cross_entropy(model(x), y))
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_deepcopy_and_pickle_go_on_where_the_original_was() -> None:
    model, x, y = network(), *batch()
    optimizer = SOAA(model.parameters(), lr=1e-2, total_steps=20)
    for _ in range(5):
        optimizer.zero_grad()
        optimizer.backward(torch.nn.functional.cross_entropy(model(x), y))
        optimizer.step()
    copied_model, copied = copy.deepcopy((model, optimizer))
    stream = io.BytesIO()
    torch.save((model, optimizer), stream)
    stream.seek(0)
    pickled_model, pickled = torch.load(stream, weights_only=False)
    for m, o in ((model, optimizer), (copied_model, copied), (pickled_model, pickled)):
        for _ in range(5):
            o.zero_grad()
            o.backward(torch.nn.functional.cross_entropy(m(x), y))
            o.step()
    for p, q, r in zip(
        model.parameters(), copied_model.parameters(), pickled_model.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    assert float(copied.step_info.radius) == float(optimizer.step_info.radius) != 1.0


def test_unknown_names_and_options_name_the_nearest() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"unknown optimizer 'soa': did you mean .*'soaa'"):
        build(model, "soa")
    with pytest.raises(
        ValueError, match="unknown curvature 'hutchinson-diagnal': did you mean 'hutchinson-diagonal'"
    ):
        build(model, curvature="hutchinson-diagnal")
    with pytest.raises(TypeError, match="no part takes an option 'intervall': did you mean 'interval'"):
        build(model, curvature="hutchinson-diagonal", intervall=3)
    with pytest.raises(TypeError, match="no part takes an option 'gama': did you mean 'gamma'"):
        build(model, "soaa", gama=0.1)
    with pytest.raises(TypeError, match="not both"):
        build(model, "soaa", curvature="identity")
