"""A model, a loss and batches, held together: what a one-shot estimate is taken of.

Legend: f the loss of all batches as if they were one, f_b the loss of batch b, ω_b its share, so
f = Σ ω_b f_b.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvature import loss_weights, measured_weights
from curvature.loss_graph import LossGraph
from curvature.sample_mixing import refuse_split
from curvature.side_effects import coupled_by_batch_norm


@dataclass
class Evaluation:
    """One batch, evaluated: what went in, what came out, and the living graph of its loss."""

    share: float | Tensor
    inputs: Any
    target: Any
    outputs: Any
    graph: LossGraph


class Problem:
    """f(θ) over batches, at the θ of this moment.

    Args:
        model: ``model(inputs)`` may return a tensor, a dict, a tuple or a dataclass.
        loss_fn: ``loss_fn(model(inputs), target)``, a scalar.
        batches: ``(inputs, target)`` pairs; an iterator is read once and kept.
        weight_fn: ``weight_fn(target)``: the total weight by which the loss of a batch is normalised
            (unmasked tokens, Σ class weights); needed for several batches where the loss does not tell.

    Raises:
        ValueError: for no batches, an empty batch, a buffer that is yielded again and again, a frozen model, complex
            parameters, shares that cannot be known, or several batches through a model that mixes their samples (a
            batch norm in training mode, say), which no split of a batch equals.
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
        self.batches: list[tuple[Any, Any]] = []
        read: list[list[int]] = []
        for i, b in enumerate(batches):
            self.batches.append(checked_batch(b, i))
            read.append(versions(self.batches[-1]))
        for i, (batch, before) in enumerate(zip(self.batches, read, strict=True)):
            if versions(batch) != before:
                raise ValueError(
                    f"batch {i} was written to while later ones were read, and all of them are kept: yield new tensors "
                    "(clone the buffer that is filled anew)"
                )
        if not self.batches:
            raise ValueError(
                "batches must yield at least one (inputs, target), got none: is the iterator used up?"
            )
        if len(self.batches) > 1 and (name := coupled_by_batch_norm(model)) is not None:
            raise ValueError(
                f"batch norm {name!r} is in training mode, where several batches do not equal the "
                "one concatenated batch: call model.eval(), or pass one batch"
            )
        if len(self.batches) > 1:
            refuse_split(model, [inputs for inputs, _ in self.batches[:2]])
        self.params = trainable_parameters(model)
        self.weight_fn = weight_fn
        self.shares: Sequence[float | Tensor] = loss_weights.batch_shares(self, weight_fn)

    def restricted(self, params: Sequence[Tensor]) -> Problem:
        """The same problem as a function of ``params`` alone, some of the problem's own."""
        part = copy.copy(self)
        part.params = list(params)
        return part

    def graph(self, batch: tuple[Any, Any]) -> LossGraph:
        """The graph of one batch's loss f_b."""
        return self._evaluate(1.0, batch).graph

    def _evaluate(self, share: float | Tensor, batch: tuple[Any, Any]) -> Evaluation:
        inputs, target = batch
        with torch.enable_grad():
            outputs = self.model(inputs)
            if len(self.batches) > 1:
                loss_weights.check_broadcast(self.loss_fn, outputs, target)
            loss = self.loss_fn(outputs, target)
        if loss.numel() == 1 and not bool(torch.isfinite(loss)):
            raise ValueError(
                f"the loss of a batch is {float(loss.detach())}, and has no curvature: is every target in it "
                "masked, or did the model diverge?"
            )
        return Evaluation(share, inputs, target, outputs, LossGraph(loss, self.params, outputs))

    def evaluations(self) -> Iterator[Evaluation]:
        """Every batch with its share ω_b > 0; each graph is released before the next is built."""
        for share, batch in zip(self.shares, self.batches, strict=True):
            if float(share) == 0.0:  # a fully masked batch: its own loss is 0/0
                continue
            evaluation = self._evaluate(share, batch)
            try:
                yield evaluation
            finally:
                evaluation.graph.release()

    def graphs(self) -> Iterator[tuple[float | Tensor, LossGraph]]:
        """(ω_b, graph of f_b) for every batch of positive weight, each released before the next is built."""
        for evaluation in self.evaluations():
            yield evaluation.share, evaluation.graph


def versions(batch: Any) -> list[int]:
    """How often the tensors of a batch were written to; one made in inference mode does not count."""
    return [x._version for x in measured_weights.leaves(batch) if not x.is_inference()]


def checked_batch(batch: Any, index: int) -> tuple[Any, Any]:
    """The batch as (inputs, target), refused where it holds no sample."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(
            f"batches must yield (inputs, target) pairs, got {type(batch).__name__} at index {index}"
        )
    for tensor in measured_weights.leaves(tuple(batch)):
        if tensor.dim() > 0 and tensor.shape[0] == 0:
            raise ValueError(f"batch {index} is empty: a tensor in it has shape {tuple(tensor.shape)}")
    return batch[0], batch[1]


def trainable_parameters(model: nn.Module) -> list[Tensor]:
    """``model.parameters()`` that require grad, shared ones once; refuses what has no curvature."""
    params: Sequence[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(
            "the model has no parameter that requires grad: unfreeze what the curvature is wanted for"
        )
    for name, module in model.named_modules():
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        if trained and getattr(module, "scale_grad_by_freq", False):
            raise ValueError(
                f"{name!r} has scale_grad_by_freq=True, so that its gradient belongs to no loss, and has no "
                "curvature: set it to False, or freeze the layer"
            )
        if trained and getattr(module, "sparse", False) is True:
            raise ValueError(
                f"{name!r} has sparse=True, whose sparse gradients no curvature here can take: set it to False, the "
                "gradient is the same"
            )
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_complex():
            raise ValueError(f"parameter {name!r} is complex; view it as real (torch.view_as_real)")
    return list(params)
