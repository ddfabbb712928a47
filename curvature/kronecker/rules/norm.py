"""Norm layers: y = scale ∘ x̂ + shift, one exact diagonal entry a parameter."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional

from curvature.kronecker.rules.base import ScaleRule
from curvature.kronecker.rules.registry import register_rule


class LayerNormRule(ScaleRule):
    """``torch.nn.LayerNorm``: the parameters' axes are the last ones."""

    layers: ClassVar[tuple[type[nn.Module] | str, ...]] = (nn.LayerNorm,)

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        norm = cast(nn.LayerNorm, module)
        return functional.layer_norm(x, norm.normalized_shape, None, None, norm.eps)

    def terms(self, module: nn.Module, product: Tensor) -> Tensor:
        return product


class RMSNormRule(LayerNormRule):
    """``torch.nn.RMSNorm``."""

    layers = (nn.RMSNorm,)

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        norm = cast(nn.RMSNorm, module)
        return functional.rms_norm(x, norm.normalized_shape, None, norm.eps)


class ChannelNormRule(ScaleRule):
    """Norms whose parameters belong to the channels, axis 1."""

    def terms(self, module: nn.Module, product: Tensor) -> Tensor:
        return product.movedim(1, -1)


class GroupNormRule(ChannelNormRule):
    """``torch.nn.GroupNorm``."""

    layers = (nn.GroupNorm,)

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        norm = cast(nn.GroupNorm, module)
        return functional.group_norm(x, norm.num_groups, None, None, norm.eps)


class InstanceNormRule(ChannelNormRule):
    """``torch.nn.InstanceNorm1d``, ``InstanceNorm2d`` and ``InstanceNorm3d``, on batched inputs."""

    layers = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        norm = cast(nn.modules.instancenorm._InstanceNorm, module)
        own = norm.training or not norm.track_running_stats
        mean, var = (None, None) if own else (norm.running_mean, norm.running_var)
        return functional.instance_norm(x, mean, var, None, None, own, 0.0, norm.eps)


class BatchNormRule(ChannelNormRule):
    """``torch.nn.BatchNorm1d``, ``BatchNorm2d`` and ``BatchNorm3d``, with frozen statistics or the batch's."""

    layers = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        norm = cast(nn.modules.batchnorm._BatchNorm, module)
        own = norm.training or (norm.running_mean is None and norm.running_var is None)
        mean, var = (None, None) if own else (norm.running_mean, norm.running_var)
        return functional.batch_norm(x, mean, var, None, None, own, 0.0, norm.eps)


for rule in (LayerNormRule(), RMSNormRule(), GroupNormRule(), InstanceNormRule(), BatchNormRule()):
    register_rule(rule)
