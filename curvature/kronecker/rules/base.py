"""What a layer rule says: how one kind of layer becomes a Kronecker block [W, b] with rows of inputs and gradients.

Legend: a layer computes y_p = W a_p + b at every position p (a sample, a token, a pixel); a_p has d_in entries, y_p
and its gradient g_p have d_out. ``lead`` is the shape of the positions, the sample first. ``groups`` independent
such maps side by side (a grouped convolution) are one batched block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from curvature.layer_io import Trace


@dataclass(frozen=True)
class Dims:
    """The size of a block: ``groups`` matrices of (d_out, d_in)."""

    groups: int
    d_out: int
    d_in: int


@dataclass(frozen=True)
class BlockCall:
    """One use of a block's weight.

    Args:
        module: the module, and its name.
        name: see ``module``.
        inputs: what the rule's ``input_rows`` reads.
        edge: where the gradient is taken that the rule's ``gradient_rows`` reads.
        shape: the shape of that gradient.
        groups: which groups of the block take part, from and up to; ``None`` for all.
        sample_axis: which axis of the positions is the samples', where that was found not to be the first.
    """

    module: nn.Module
    name: str
    inputs: tuple[Tensor, ...]
    edge: GradientEdge
    shape: tuple[int, ...]
    groups: tuple[int, int] | None = None
    sample_axis: int = 0

    @property
    def at(self) -> slice:
        """The groups as an index."""
        return slice(None) if self.groups is None else slice(*self.groups)

    def input_rows(self, rule: LayerRule) -> Tensor:
        """a, (groups, lead, d_in), the samples first."""
        return samples_first(rule.input_rows(self.module, self.inputs), self.sample_axis)

    def gradient_rows(self, rule: LayerRule, gradient: Tensor) -> Tensor:
        """g, (groups, lead, d_out), the samples first, from the gradient at the edge."""
        return samples_first(rule.gradient_rows(self.module, gradient.reshape(self.shape)), self.sample_axis)


def samples_first(rows: Tensor, axis: int) -> Tensor:
    """(groups, lead, …) with the samples' axis of lead in front."""
    return rows.movedim(1 + axis, 1) if axis else rows


class LayerRule:
    """How one kind of layer becomes a Kronecker block; the defaults are those of ``torch.nn.Linear``.

    A subclass names its ``layers`` and overrides what differs, then :func:`register_rule` makes it known.

    Attributes:
        layers: the layer classes, or their full names where importing them would cost (``"package.Class"``).
        weight: the name of the weight parameter.
        bias: the name of the bias parameter.
        diagonal_input: whether a aᵀ is diagonal (one-hot inputs); then rows of inputs are *indices* (groups, lead),
            a negative one a row of zeros.
    """

    layers: ClassVar[tuple[type[nn.Module] | str, ...]] = ()
    weight: ClassVar[str] = "weight"
    bias: ClassVar[str | None] = "bias"
    diagonal_input: ClassVar[bool] = False

    def parts(self, module: nn.Module) -> tuple[LayerRule, ...]:
        """The rules of the module's weights; several where it has several weights, each a block of its own."""
        return (self,)

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

    def watch(self, name: str) -> str:
        """The module whose calls must be recorded: itself, unless its parent uses its weight."""
        return name

    def calls(self, name: str, modules: Mapping[str, nn.Module], trace: Trace) -> list[BlockCall]:
        """The uses of a module's weight in one loss; the default is one a recorded call."""
        found = []
        for call in trace.calls.get(name, ()):
            call.record.check_unchanged()
            inputs = (*call.record.inputs, *call.record.keywords.values())
            found.append(BlockCall(modules[name], name, inputs, call.edge, tuple(call.record.shape)))
        return found


class ScaleRule:
    """A layer y = scale ∘ x̂ + shift, with x̂ free of parameters: its exact diagonal comes from x̂ and the gradient of y.

    Attributes:
        layers: the layer classes, or their full names.
        scale: the name of the parameter that multiplies x̂.
        shift: the name of the parameter that is added.
    """

    layers: ClassVar[tuple[type[nn.Module] | str, ...]] = ()
    scale: ClassVar[str] = "weight"
    shift: ClassVar[str] = "bias"

    def check_call(self, module: nn.Module, name: str) -> None:
        """Raise where the module's present mode makes samples depend on each other."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """x̂, shaped like the output."""
        raise NotImplementedError

    def terms(self, module: nn.Module, product: Tensor) -> Tensor:
        """A tensor shaped like the output with the parameter's axes last, (N, …, parameter's shape)."""
        raise NotImplementedError
