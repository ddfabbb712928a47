"""Convolutions: every output pixel is a position, its input patch the row (Grosse & Martens 2016, arXiv 1602.01407)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from curvature.kronecker.rules.base import Dims, LayerRule
from curvature.kronecker.rules.registry import register_rule

Conv = nn.modules.conv._ConvNd


def windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """All windows of x, (N, C, *out, *kernel), a view: no copy.

    Args:
        x: (N, C, *spatial), already padded.
        kernel: the kernel's extents.
        stride: steps between windows.
        dilation: steps within a window.
    """
    dims = len(kernel)
    shape, strides = list(x.shape[:2]), list(x.stride()[:2])
    out = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    shape += out + list(kernel)
    steps = x.stride()[2:]
    strides += [steps[i] * stride[i] for i in range(dims)] + [steps[i] * dilation[i] for i in range(dims)]
    return x.as_strided(shape, strides, x.storage_offset())


def patch_rows(view: Tensor, groups: int, dims: int) -> Tensor:
    """Windows (N, C, *out, *kernel) as rows (groups, N, *out, C/groups · Π kernel)."""
    N, C = view.shape[:2]
    out, kernel = view.shape[2 : 2 + dims], view.shape[2 + dims :]
    split = view.reshape(N, groups, C // groups, *out, *kernel)
    order = [1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    return split.permute(order).reshape(groups, N, *out, -1)


def channel_rows(g: Tensor, groups: int) -> Tensor:
    """(N, C, *out) as (groups, N, *out, C/groups)."""
    N, C = g.shape[:2]
    return g.reshape(N, groups, C // groups, *g.shape[2:]).movedim(1, 0).movedim(2, -1)


def batched(x: Tensor, dims: int) -> Tensor:
    """With the sample axis that an unbatched call leaves out."""
    return x if x.dim() == dims + 2 else x.unsqueeze(0)


class ConvRule(LayerRule):
    """``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``, with any stride, padding, dilation, groups and padding mode."""

    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def dims(self, module: nn.Module) -> Dims:
        assert isinstance(module, Conv)
        return Dims(module.groups, module.out_channels // module.groups, module.weight[0].numel())

    def input_rows(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(module, Conv)
        dims = len(module.kernel_size)
        x = batched(inputs[0], dims)
        # The amounts before and after each axis, last axis first, for strings ('same') and numbers alike.
        padding = module._reversed_padding_repeated_twice
        if any(padding):
            if module.padding_mode == "zeros":
                x = functional.pad(x, padding)
            else:
                x = functional.pad(x, padding, mode=module.padding_mode)
        return patch_rows(windows(x, module.kernel_size, module.stride, module.dilation), module.groups, dims)

    def gradient_rows(self, module: nn.Module, gradient: Tensor) -> Tensor:
        assert isinstance(module, Conv)
        return channel_rows(batched(gradient, len(module.kernel_size)), module.groups)


register_rule(ConvRule())
