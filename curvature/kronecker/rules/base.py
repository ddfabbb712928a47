"""What a layer rule says: how one kind of layer becomes a Kronecker block [W, b] with rows of inputs and gradients.

Legend: a layer computes y_p = W a_p + b at every position p (a sample, a token, a pixel); a_p has d_in entries, y_p
and its gradient g_p have d_out. ``lead`` is the shape of the positions, the sample first. ``groups`` independent
such maps side by side (a grouped convolution) are one batched block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Dims:
    """The size of a block: ``groups`` matrices of (d_out, d_in)."""

    groups: int
    d_out: int
    d_in: int


class LayerRule:
    """How one kind of layer becomes a Kronecker block; the defaults are those of ``torch.nn.Linear``.

    A subclass names its ``layers`` and overrides what differs, then :func:`register_rule` makes it known.

    Attributes:
        layers: the layer classes, or their full names where importing them would cost (``"package.Class"``).
        weight: the name of the weight parameter.
        bias: the name of the bias parameter.
        diagonal_input: whether a aᵀ is diagonal (one-hot inputs); then rows of inputs are *indices*, never vectors.
    """

    layers: ClassVar[tuple[type[nn.Module] | str, ...]] = ()
    weight: ClassVar[str] = "weight"
    bias: ClassVar[str | None] = "bias"
    diagonal_input: ClassVar[bool] = False

    def refuse(self, module: nn.Module) -> str | None:
        """Why this very module cannot be treated, or ``None``; a refused module falls back to the diagonal."""
        return None

    def dims(self, module: nn.Module) -> Dims:
        """groups, d_out and d_in of the weight."""
        weight = getattr(module, self.weight)
        return Dims(1, weight.shape[0], weight[0].numel())

    def input_rows(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """a: the inputs as (groups, lead, d_in), from what the module was called with."""
        return inputs[0].unsqueeze(0)

    def gradient_rows(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """g: the gradient of the output as (groups, lead, d_out)."""
        return gradient.unsqueeze(0)

    def to_matrix(self, weight: Tensor, dims: Dims) -> Tensor:
        """The weight as (groups, d_out, d_in)."""
        return weight.reshape(dims.groups, dims.d_out, dims.d_in)

    def from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`; ``like`` has the weight's shape."""
        return matrix.reshape(like.shape)
