"""Rows of inputs and gradients multiply to the weight's own gradient, for every layer and geometry."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import EKFAC, KFAC, estimate
from curvature.kronecker.layout import build_layout
from curvature.kronecker.measurement import block_calls
from curvature.kronecker.operator import gather
from curvature.layer_io import Recorder
from tests.curvature import dense
from tests.curvature.cases import classes, reals, seeded


def gradients_from_rows(
    model: nn.Module, output: Tensor, recorder: Recorder, seed: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(Σ g [a; 1]ᵀ from rows, the gradient by autograd) of every block."""
    params = dense.trainable(model)
    layout = build_layout(model, params)
    used = block_calls(layout, recorder.trace(output), dict(model.named_modules()), params)
    direct = torch.autograd.grad(output, params, seed, retain_graph=True)
    pairs = []
    for calls in used:
        block = calls.block
        total = torch.zeros(block.dims.groups, block.dims.d_out, block.size_in)
        for call in calls.calls:
            (gradient,) = torch.autograd.grad(output, [call.edge], seed, retain_graph=True)
            g = block.rule.gradient_rows(call.module, gradient.reshape(call.shape))
            g = g.reshape(g.shape[0], -1, g.shape[-1])
            a = block.rule.input_rows(call.module, call.inputs)
            if block.diagonal_input:
                flat = a.reshape(-1)
                one_hot = torch.nn.functional.one_hot(flat.clamp(min=0), block.dims.d_in).to(g.dtype)
                a = (one_hot * (flat >= 0)[:, None]).unsqueeze(0)
            else:
                a = a.reshape(a.shape[0], -1, a.shape[-1])
            if block.bias is not None:
                a = torch.cat([a, torch.ones(*a.shape[:-1], 1)], -1)
            total[call.at] += g.mT @ a
        pairs.append((total, gather(block, direct)))
    return pairs


def check(model: nn.Module, *inputs: Tensor, **keywords: Tensor) -> None:
    layout = build_layout(model, dense.trainable(model))
    assert layout.blocks
    assert not layout.diagonal, layout.reasons
    recorder = Recorder(model, layout.watched)
    output = model(*inputs, **keywords)
    output = output[0] if isinstance(output, tuple) else output
    for ours, autograd in gradients_from_rows(model, output, recorder, torch.randn_like(output)):
        assert dense.relative_error(ours, autograd) < 1e-12


GEOMETRY = [
    {"stride": 2},
    {"padding": 1},
    {"dilation": 2},
    {"stride": 2, "padding": 2, "dilation": 2},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "stride": 2},
    {"padding": 1, "padding_mode": "replicate"},
    {"padding": 2, "groups": 2},
    {"groups": 4},
    {"bias": False},
]


@pytest.mark.parametrize("options", GEOMETRY, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int, options: dict[str, object]) -> None:
    kernel = (3, 2, 1)[:dims]
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 8, kernel, **options)
    check(layer, torch.randn(2, 4, *(7, 6, 5)[:dims]))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_even_kernel_with_same_padding_pads_unevenly() -> None:
    check(nn.Conv2d(2, 3, (4, 2), padding="same"), torch.randn(2, 2, 5, 6))


def test_convolution_without_a_batch_axis() -> None:
    check(nn.Conv2d(2, 3, 2), torch.randn(2, 5, 6))


TRANSPOSED = [
    {},
    {"stride": 2},
    {"stride": 3, "output_padding": 2},
    {"padding": 2, "dilation": 2},
    {"stride": 2, "padding": 3, "output_padding": 1, "groups": 2},
    {"groups": 4, "bias": False},
]


@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions(dims: int, options: dict[str, object]) -> None:
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](
        4, 8, (3, 2, 3)[:dims], **options
    )
    check(layer, torch.randn(2, 4, *(5, 4, 4)[:dims]))


def test_transposed_convolution_with_output_size() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=(8, 9))

    check(Sized(), torch.randn(2, 2, 3, 4))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(padding_idx: int | None) -> None:
    check(nn.Embedding(5, 3, padding_idx=padding_idx), torch.tensor([[0, 2, 2], [4, 1, 0]]))


def test_linear_with_many_axes_and_without_any() -> None:
    for bias in (True, False):
        check(nn.Linear(3, 2, bias=bias), torch.randn(2, 4, 5, 3))
        check(nn.Linear(3, 2, bias=bias), torch.randn(3))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "all different", "unbatched", "keywords"])
def test_multihead_attention(batch_first: bool, bias: bool, kind: str) -> None:
    attention = nn.MultiheadAttention(4, 2, bias=bias, batch_first=batch_first)
    if bias:
        nn.init.normal_(attention.in_proj_bias)
    if kind == "unbatched":
        x = torch.randn(5, 4)
        check(attention, x, x, x)
        return
    shape = (2, 5, 4) if batch_first else (5, 2, 4)
    other = (2, 3, 4) if batch_first else (3, 2, 4)
    q, k, v = torch.randn(shape), torch.randn(other), torch.randn(other)
    if kind == "self":
        check(attention, q, q, q)
    elif kind == "cross":
        check(attention, q, k, k)
    elif kind == "keywords":
        check(attention, value=v, query=q, key=k)
    else:
        check(attention, q, k, v)


def test_attention_called_twice_keeps_its_calls_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            y = self.attention(x, x, x)[0]
            return self.attention(y, memory, memory, need_weights=False)[0]

    check(Twice(), torch.randn(2, 5, 4), torch.randn(2, 3, 4))


def test_in_place_activation_on_a_view_of_the_output() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), nn.SiLU(inplace=True))
    check(model, torch.randn(2, 5, 3))  # with three axes and a bias, a linear layer returns a view
    check(nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(inplace=True)), torch.randn(2, 2, 5))


def replaced_forward(layer: nn.Module) -> None:
    before = layer.forward
    layer.forward = lambda x: 2 * before(x)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [lambda layer: layer.register_forward_hook(lambda m, x, out: 2 * out), replaced_forward],
    ids=["a hook", "a replaced forward"],
)
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(3, 3)], ids=lambda m: type(m).__name__
)
def test_a_layer_that_computes_something_else_is_refused(
    layer: nn.Module, kind: type[KFAC | EKFAC], change: Any
) -> None:
    model = seeded(nn.Sequential(copy.deepcopy(layer), nn.Tanh(), nn.Linear(3, 3)))
    x = classes(4) if isinstance(layer, nn.Embedding) else reals(4, 3)
    batches = [(x, classes(4))]
    estimate(kind(model), model, nn.CrossEntropyLoss(), batches)
    change(model[0])
    exclude = ("0",)
    if isinstance(layer, nn.LayerNorm):
        exclude = ()  # its diagonal needs no rule
    else:
        with pytest.raises(
            RuntimeError, match=r"'0' does not compute what its layer rule says.*exclude=\('0',\)"
        ):
            estimate(kind(model), model, nn.CrossEntropyLoss(), batches)
    params = list(model.parameters())
    z = model(x)
    G = dense.gauss_newton(nn.CrossEntropyLoss()(z, batches[0][1]), z, params).diagonal()
    excluded = estimate(kind(model, exclude=exclude), model, nn.CrossEntropyLoss(), batches).diagonal()
    size = sum(p.numel() for p in model[0].parameters())
    torch.testing.assert_close(dense.flat(excluded)[:size], G[:size])
