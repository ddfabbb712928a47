"""The layer that GPT-2 of the library ``transformers`` calls Conv1D: a linear layer with the transposed weight."""

from __future__ import annotations

from torch import Tensor, nn

from curvature.kronecker.rules.base import Dims, LayerRule
from curvature.kronecker.rules.registry import register_rule


class TransposedLinearRule(LayerRule):
    """y = x W + b with W (d_in, d_out); named, so that the library need not be installed."""

    layers = ("transformers.pytorch_utils.Conv1D",)

    def dims(self, module: nn.Module) -> Dims:
        weight = module.get_parameter(self.weight)
        return Dims(1, weight.shape[1], weight.shape[0])

    def to_matrix(self, weight: Tensor, dims: Dims) -> Tensor:
        return weight.mT.unsqueeze(0)

    def from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.squeeze(0).mT.reshape(like.shape)


register_rule(TransposedLinearRule())
