"""Public conformance check: does a layer rule read its layer rightly?

Run it over a rule of your own; it raises :class:`AssertionError` with the law that is broken::

    def test_my_rule():
        curvature.kronecker.testing.check_layer_rule(MyLayer(5, 3).double(), torch.randn(4, 5).double())
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curvature.kronecker.layout import Block, build_layout
from curvature.kronecker.measurement import BlockCalls, block_calls
from curvature.kronecker.operator import gather
from curvature.layer_io import Recorder


def check_layer_rule(
    module: nn.Module, *inputs: Tensor, seed: int = 0, tolerance: float = 1e-9, **keywords: Any
) -> None:
    """Check that a layer has a rule, and that the rule's rows multiply to the layer's own gradients.

    For every cotangent of the output Σ_p g_p [a_p; 1]ᵀ must be the gradient at [W, b] that autograd gives: the one
    fact on which both Kronecker factors rest. It is checked for one call and for two calls of the module in one
    loss; and ``from_matrix`` must undo ``to_matrix``.

    Args:
        module: the layer, in float64.
        *inputs: what it is called with, several samples in dim 0.
        seed: of the cotangent.
        tolerance: relative to the largest entry of the gradient.
        **keywords: what it is called with by name.

    Raises:
        AssertionError: naming the law that is broken, and by how much.

    >>> check_layer_rule(nn.Linear(3, 2).double(), torch.ones(4, 3).double())
    >>> check_layer_rule(nn.Bilinear(3, 3, 2).double(), torch.ones(4, 3).double(), torch.ones(4, 3).double())
    Traceback (most recent call last):
    AssertionError: a rule covers the layer: '' has none for 'weight', 'bias' (...)

    Cost: two forward passes and a backward pass a call.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    assert params, "a rule covers the layer: it has no parameter that requires grad"
    assert all(p.dtype == torch.float64 for p in params), (
        "check_layer_rule compares in float64: module.double()"
    )
    layout = build_layout(module, params)
    rest = [layout.names[i] for i in layout.diagonal]
    reasons = (
        "; ".join(layout.reasons.values()) or "a layer of scales and shifts, which has no Kronecker block"
    )
    assert not rest, f"a rule covers the layer: '' has none for {', '.join(map(repr, rest))} ({reasons})"
    for block in layout.blocks:
        _check_matrix(block, params)
    recorder = Recorder(module, layout.watched)
    g = torch.Generator().manual_seed(seed)
    for calls in (1, 2):
        out = [_first(module(*inputs, **keywords)) for _ in range(calls)]
        output = torch.stack([torch.sin((k + 1.0) * z) for k, z in enumerate(out)]).sum(0)
        cotangent = torch.randn(output.shape, generator=g, dtype=output.dtype)
        direct = torch.autograd.grad(output, params, cotangent, retain_graph=True)
        trace = recorder.trace(output)
        for used in block_calls(layout, trace, dict(module.named_modules()), params):
            theirs = gather(used.block, list(direct))
            error = float((product_of_rows(used, output, cotangent) - theirs).abs().max())
            size = float(theirs.abs().max()) or 1.0
            names = ", ".join(repr(layout.names[i]) for i in used.block.members)
            assert error <= tolerance * size, (
                f"rows multiply to the gradient: Σ g [a; 1]ᵀ is off by {error:.3g} at {names}, whose gradient has "
                f"largest entry {size:.3g} ({calls} calls)"
            )


def product_of_rows(used: BlockCalls, output: Tensor, cotangent: Tensor) -> Tensor:
    """Σ_p g_p [a_p; 1]ᵀ over all calls of a block, (groups, d_out, size_in)."""
    block = used.block
    total = output.new_zeros(block.dims.groups, block.dims.d_out, block.size_in)
    for call in used.calls:
        (gradient,) = torch.autograd.grad(output, [call.edge], cotangent, retain_graph=True)
        g = block.rule.gradient_rows(call.module, gradient.reshape(call.shape))
        assert g.dim() >= 2, f"gradient_rows must be (groups, lead, d_out), got {tuple(g.shape)}"
        assert g.shape[-1] == block.dims.d_out, (
            f"gradient_rows must end with d_out = {block.dims.d_out}, got {tuple(g.shape)}"
        )
        a = block.rule.input_rows(call.module, call.inputs)
        if block.diagonal_input:
            index = a.reshape(-1)
            a = torch.eye(block.dims.d_in, dtype=g.dtype, device=g.device)[index.clamp(min=0)]
            a = (a * (index >= 0).unsqueeze(-1)).unsqueeze(0)
        if block.weight is None:
            a = a.new_ones(a.shape[0], a[0, ..., 0].numel(), 1)
        else:
            assert a.shape[-1] == block.dims.d_in, (
                f"input_rows must end with d_in = {block.dims.d_in}, got {tuple(a.shape)}"
            )
            a = a.reshape(a.shape[0], -1, a.shape[-1]).to(g.dtype)
            if block.bias is not None:
                a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
        g = g.reshape(g.shape[0], -1, g.shape[-1])
        assert a.shape[1] == g.shape[1], (
            f"inputs and gradients have the same positions: {a.shape[1]} rows of inputs, {g.shape[1]} of gradients"
        )
        total[call.at] += g.mT @ a
    return total


def _check_matrix(block: Block, params: list[nn.Parameter]) -> None:
    if block.weight is None:
        return
    dims, like = block.dims, params[block.weight]
    weight = torch.arange(like.numel(), dtype=torch.float64, device=like.device).view(like.shape)
    matrix = block.rule.to_matrix(weight, dims)
    shape = (dims.groups, dims.d_out, dims.d_in)
    assert matrix.shape == shape, f"to_matrix must be {shape}, got {tuple(matrix.shape)}"
    assert torch.equal(block.rule.from_matrix(matrix, like), weight), "from_matrix must undo to_matrix"


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else _first(next(iter(output)))
