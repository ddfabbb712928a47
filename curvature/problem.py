"""A model, a loss and batches, held together: what a one-shot estimate is taken of.

Legend: f the loss of all batches as if they were one, f_b the loss of batch b, ω_b its share, so f = Σ ω_b f_b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from curvature.loss_graph import LossGraph
from curvature.loss_weights import batch_shares


class Problem:
    """f(θ) over batches, at the θ of this moment.

    Args:
        model: ``model(inputs)`` may return a tensor, a dict, a tuple or a dataclass.
        loss_fn: ``loss_fn(model(inputs), target)``, a scalar.
        batches: ``(inputs, target)`` pairs; an iterator is read once and kept.
        weight_fn: ``weight_fn(target)``: the total weight by which the loss of a batch is normalised (unmasked
            tokens, Σ class weights); needed for several batches where the loss does not tell.

    Raises:
        ValueError: for no batches, a frozen model, complex parameters, or shares that cannot be known.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Iterable[tuple[Any, Any]],
        weight_fn: Callable[[Any], Any] | None = None,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.batches: list[tuple[Any, Any]] = list(batches)
        if not self.batches:
            raise ValueError("batches must yield at least one (inputs, target), got none: is the iterator used up?")
        self.params = trainable_parameters(model)
        self.weight_fn = weight_fn
        self.shares = batch_shares(self, weight_fn)

    def graph(self, batch: tuple[Any, Any]) -> LossGraph:
        """The graph of one batch's loss f_b."""
        inputs, target = batch
        outputs = self.model(inputs)
        return LossGraph(self.loss_fn(outputs, target), self.params, outputs)

    def graphs(self) -> Iterator[tuple[float | Tensor, LossGraph]]:
        """(ω_b, graph of f_b) for every batch; each graph is released before the next is built."""
        for share, batch in zip(self.shares, self.batches, strict=True):
            graph = self.graph(batch)
            try:
                yield share, graph
            finally:
                graph.release()


def trainable_parameters(model: nn.Module) -> list[Tensor]:
    """``model.parameters()`` that require grad, shared ones once; refuses what has no curvature."""
    params: Sequence[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("the model has no parameter that requires grad: unfreeze what the curvature is wanted for")
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_complex():
            raise ValueError(f"parameter {name!r} is complex; view it as real (torch.view_as_real)")
    return list(params)
