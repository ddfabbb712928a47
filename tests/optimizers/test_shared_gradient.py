"""The gradient that a Hessian product forms is the step's gradient, and is taken only where nobody could tell."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvature import AdaHessianDiagonal, HutchinsonDiagonal, PerParameter
from optimizers import AdaHessian, SecondOrder, SophiaH, observing


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)).double()
    return model, torch.randn(8, 4).double(), torch.randint(0, 3, (8,))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("probes", [1, 2])
def test_it_is_the_gradient_of_a_backward_pass_also_over_two_micro_batches(probes: int) -> None:
    model, x, y = network()
    other = copy.deepcopy(model)
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = AdaHessian([*model.parameters(), unused], probes=probes)
    for part in (slice(0, 3), slice(3, 8)):
        optimizer.backward(loss_of(model, x[part], y[part]))
        loss_of(other, x[part], y[part]).backward()
    torch.testing.assert_close(gradients(model), gradients(other), rtol=1e-12, atol=1e-15)
    assert unused.grad is None
    assert all(not p.grad.requires_grad for p in model.parameters() if p.grad is not None)


def test_it_saves_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for shares in (True, False):
        model, x, y = network()
        optimizer = SophiaH(model.parameters())
        if not shares:
            monkeypatch.setattr(observing, "may_share", lambda *_: False)
        loss = loss_of(model, x, y)
        with Products() as products:
            optimizer.backward(loss)
        counts.append(products.count)
    assert counts[1] - counts[0] == 3  # dW of two layers, dx of the second


def test_its_graph_is_freed_as_a_backward_pass_frees_it() -> None:
    model, x, y = network()
    loss = loss_of(model, x, y)
    AdaHessian(model.parameters()).backward(loss)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_with_retain_graph_the_graph_lives_on() -> None:
    model, x, y = network()
    loss = loss_of(model, x, y)
    AdaHessian(model.parameters()).backward(loss, retain_graph=True)
    loss.backward()


def test_two_parameters_of_one_gradient_own_their_memory() -> None:
    a, b = (nn.Parameter(torch.full((3,), x)) for x in (1.0, 2.0))
    AdaHessian([a, b]).backward((a + b).square().sum())
    assert a.grad is not None
    assert b.grad is not None
    a.grad.zero_()
    assert b.grad.tolist() == [6.0, 6.0, 6.0]


def test_a_constant_gradient_is_a_tensor_of_its_own() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    AdaHessian([a, b]).backward(a.sum() + b.square().sum())
    assert a.grad is not None
    a.grad[0] = 5.0  # an expanded number would refuse, or change everywhere
    assert a.grad.tolist() == [5.0, 1.0, 1.0]


def test_parameters_of_nobody_get_their_gradient() -> None:
    model, x, y = network()
    AdaHessian(model[0].parameters()).backward(loss_of(model, x, y))  # type: ignore[index]
    assert all(p.grad is not None for p in model.parameters())


def test_hooks_of_a_parameter_run_as_in_a_backward_pass() -> None:
    model, x, y = network()
    called: list[str] = []
    weight = next(model.parameters())
    weight.register_post_accumulate_grad_hook(lambda _: called.append("accumulated"))
    AdaHessian(model.parameters()).backward(loss_of(model, x, y))
    assert called == ["accumulated"]


def test_curvature_of_a_part_of_the_parameters_leaves_the_gradient_to_a_backward_pass() -> None:
    model, x, y = network()
    other = copy.deepcopy(model)
    rules = [(lambda _, p, __: p.dim() == 2, AdaHessianDiagonal()), ("*", HutchinsonDiagonal())]
    mixed = PerParameter(rules, model=model)
    SecondOrder(model.parameters(), curvature=mixed).backward(loss_of(model, x, y))
    loss_of(other, x, y).backward()
    torch.testing.assert_close(gradients(model), gradients(other), rtol=1e-12, atol=1e-15)
