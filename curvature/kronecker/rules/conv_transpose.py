"""Transposed convolutions, as the convolutions that they are: over the input with zeros between its pixels.

Legend: stride s, dilation d, kernel k, padding p. y is the convolution, at stride 1 and with the flipped kernel, of x
with s-1 zeros between pixels, padded by d (k-1) - p on each side (and the output padding after). So positions are
output pixels, where the bias acts too, and weight and bias are one block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature.kronecker.rules.base import BlockCall, Dims, LayerRule
from curvature.kronecker.rules.conv import Conv, batched, channel_rows, patch_rows, windows
from curvature.kronecker.rules.registry import register_rule
from curvature.layer_io import Trace


class ConvTransposeRule(LayerRule):
    """``torch.nn.ConvTranspose1d``, ``ConvTranspose2d`` and ``ConvTranspose3d``."""

    layers = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def dims(self, module: nn.Module) -> Dims:
        assert isinstance(module, Conv)
        kernel = module.weight[0, 0].numel()
        inner = module.in_channels // module.groups
        return Dims(module.groups, module.out_channels // module.groups, inner * kernel)

    def input_rows(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(module, Conv)
        dims = len(module.kernel_size)
        x = batched(inputs[0], dims)
        spread = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
        spaced = x.new_zeros(*x.shape[:2], *spread)
        spaced[(slice(None), slice(None), *(slice(None, None, s) for s in module.stride))] = x
        kernel, dilation = module.kernel_size, module.dilation
        padding = cast("tuple[int, ...]", module.padding)
        edge = [d * (k - 1) - p for k, d, p in zip(kernel, dilation, padding, strict=True)]
        after = inputs[1].tolist()
        amounts = [n for e, o in zip(reversed(edge), reversed(after), strict=True) for n in (e, e + o)]
        view = windows(functional.pad(spaced, amounts), kernel, [1] * dims, dilation)
        flipped = view.flip(list(range(2 + dims, 2 + 2 * dims)))
        return patch_rows(flipped, module.groups, dims)

    def gradient_rows(self, module: nn.Module, gradient: Tensor) -> Tensor:
        assert isinstance(module, Conv)
        return channel_rows(batched(gradient, len(module.kernel_size)), module.groups)

    def to_matrix(self, weight: Tensor, dims: Dims) -> Tensor:
        # (in, out/groups, *kernel) → (groups, out/groups, in/groups · kernel)
        split = weight.reshape(dims.groups, -1, dims.d_out, weight[0, 0].numel())
        return split.transpose(1, 2).reshape(dims.groups, dims.d_out, dims.d_in)

    def from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        groups, d_out = matrix.shape[:2]
        kernel = like[0, 0].numel()
        return matrix.reshape(groups, d_out, -1, kernel).transpose(1, 2).reshape(like.shape)

    def calls(self, name: str, modules: Mapping[str, nn.Module], trace: Trace) -> list[BlockCall]:
        module = cast(nn.ConvTranspose2d, modules[name])
        found = []
        for call in super().calls(name, modules, trace):
            # forward(x, output_size) may ask for more rows at the end than the module's own output_padding.
            x, dims = call.inputs[0], len(module.kernel_size)
            geometry = zip(
                x.shape[-dims:], call.shape[-dims:], *(getattr(module, n) for n in _GEOMETRY), strict=True
            )
            after = [out - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for n, out, s, p, d, k in geometry]
            found.append(dataclasses.replace(call, inputs=(x, torch.tensor(after))))
        return found


_GEOMETRY = ("stride", "padding", "dilation", "kernel_size")

register_rule(ConvTransposeRule())
