"""Embeddings: a one-hot row times a matrix, so A is the diagonal of token frequencies, never a (V, V) matrix.

With ``sharing="reduce"`` too, tokens are taken one by one: the mean of one-hot rows has no diagonal A.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvature.kronecker.rules.base import Dims, LayerRule
from curvature.kronecker.rules.registry import register_rule


class EmbeddingRule(LayerRule):
    """``torch.nn.Embedding``; tokens at ``padding_idx`` get no gradient and are rows of zeros."""

    layers = (nn.Embedding,)
    bias = None
    diagonal_input = True

    def refuse(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "max_norm changes the weight in the forward pass"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq makes gradients that belong to no loss"
        return None

    def dims(self, module: nn.Module) -> Dims:
        assert isinstance(module, nn.Embedding)
        return Dims(1, module.embedding_dim, module.num_embeddings)

    def input_rows(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(module, nn.Embedding)
        index = inputs[0].long()
        if module.padding_idx is not None:
            index = torch.where(index == module.padding_idx, -1, index)
        return index.unsqueeze(0)

    def to_matrix(self, weight: Tensor, dims: Dims) -> Tensor:
        return weight.mT.unsqueeze(0)

    def from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.squeeze(0).mT.reshape(like.shape)


register_rule(EmbeddingRule())
