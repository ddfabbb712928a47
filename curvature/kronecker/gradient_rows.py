"""The gradient of a linear layer as the product of rows that it is: seen in the very backward pass that forms it.

Legend: X (R, d_in) the rows of a layer's input, Y (R, d_out) those of the gradient at its output, n the size of A.
The gradient of [W, b] is Yᵀ [X, 1]. Where R is small, preconditioning the rows is cheaper than the product:
G⁻¹ (Yᵀ [X, 1]) A⁻¹ = (Y G⁻¹)ᵀ ([X, 1] A⁻¹) takes R (d_out² + n² + d_out n) multiplications for d_out n (d_out + n).

That the gradient is this product is proven by the graph: W and b are read once each, by one matrix product, whose other
factor has the shape of the recorded input; once for every layer the product is compared with what autograd formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, distributed
from torch.autograd.graph import Node, get_gradient_edge

from curvature.kronecker.layout import Block, Layout
from curvature.kronecker.row_proof import equal
from curvature.kronecker.rules.linear import LinearRule
from curvature.layer_io import Call, Record, Recorder, Trace

#: Rows are taken where they spare half of the multiplications: narrow products run at a lower rate than square ones.
WORTH = 0.5


@dataclass(frozen=True)
class GradientRows:
    """One block's gradient as rows.

    Args:
        X: (R, d_in).
        Y: (R, d_out).
        gradients: the ``.grad`` of the block's members that is their product.
        versions: the version counters of all of these, to notice a change.
    """

    X: Tensor
    Y: Tensor
    gradients: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def hold(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether the members' gradients are still the product of these rows: the same tensors, with no write since."""
        same = all(g is own for g, own in zip(gradients, self.gradients, strict=True))
        return same and versions_of(self.X, self.Y, *self.gradients) == self.versions


def versions_of(*tensors: Tensor) -> tuple[int, ...]:
    """The version counters."""
    return tuple(x._version for x in tensors)


def most_rows(block: Block) -> float:
    """The largest R for which rows are worth taking; 0 for a block that is no plain linear layer with one use."""
    plain = type(block.rule) is LinearRule and len(block.modules) == 1 and block.weight is not None
    if not plain or block.transposed is not None or block.is_transposed or block.dims.groups != 1:
        return 0.0
    d, n = float(block.dims.d_out), float(block.size_in)
    return WORTH * d * n * (d + n) / (d * d + n * n + d * n)


@dataclass
class Proven:
    """Which layers' products were compared with the gradient: by module, those that agree and those that do not."""

    same: set[tuple[str, bool]] = field(default_factory=set)
    other: set[tuple[str, bool]] = field(default_factory=set)

    def holds(self, block: Block, X: Tensor, Y: Tensor, gradients: Sequence[Tensor]) -> bool:
        """Whether Yᵀ [X, 1] is the gradient; looked at once a layer."""
        key = (block.modules[0], block.bias is not None)
        if key not in self.same | self.other:
            power = (Y.square().sum(-1) * (X.square().sum(-1) + 1)).sum()
            alike = equal(Y.mT @ X, gradients[0], power, torch.finfo(Y.dtype).eps)
            if block.bias is not None:
                alike = alike and equal(Y.sum(0), gradients[1], power, torch.finfo(Y.dtype).eps)
            (self.same if alike else self.other).add(key)
        return key in self.same


class Watch:
    """A backward pass that is watched: use it around the pass, then ask for what was :meth:`found`.

    Args:
        places: the matrix product of each block that can be watched, and its input.
        proven: what is known of the layers; added to.
    """

    def __init__(self, places: Sequence[tuple[Block, Node, Record]], proven: Proven) -> None:
        self._places, self._proven = list(places), proven
        self._Y: dict[int, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for block, node, _ in self._places:
            self._hooks.append(node.register_prehook(self._keeping(block.root)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _keeping(self, root: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None:
                self._Y[root] = gradients[0].detach()

        return hook

    @torch.no_grad()
    def found(self, params: Sequence[Tensor]) -> dict[int, GradientRows]:
        """The rows by the block's root; what could not be proven is left out."""
        rows: dict[int, GradientRows] = {}
        for block, _, record in self._places:
            Y = self._Y.get(block.root)
            X = record.argument(0, "input")
            X = X.reshape(-1, X.shape[-1])
            gradients = tuple(g for i in block.members if (g := params[i].grad) is not None)
            fits = Y is not None and len(gradients) == len(block.members) and Y.shape[0] == X.shape[0]
            if not fits or Y is None or any(x.dtype != Y.dtype for x in (X, *gradients)):
                continue
            if self._proven.holds(block, X, Y, gradients):
                rows[block.root] = GradientRows(X, Y, gradients, versions_of(X, Y, *gradients))
        return rows


@torch.no_grad()
def watch(
    loss: Tensor, layout: Layout, params: Sequence[Tensor], recorder: Recorder, proven: Proven, rows: int
) -> Watch | None:
    """What to watch in the backward pass of ``loss``; ``None`` where no block is worth it.

    Not among several processes, whose reducers change gradients unseen; not for a parameter with hooks, with a gradient
    already, or of another precision than its product; not in a graph that hides a part of itself.

    Args:
        loss: a scalar with a graph.
        layout: the blocks.
        params: the parameters.
        recorder: that saw the forward pass.
        proven: what is known of the layers.
        rows: the fewest that a layer is taken to have: the positions of the model's outputs.

    Cost: a walk of the graph, no tensors.
    """
    blocks = [b for b in layout.blocks if most_rows(b) >= rows and all(_free(params[i]) for i in b.members)]
    if not blocks or (distributed.is_available() and distributed.is_initialized()):
        return None
    trace = recorder.trace(loss)
    if trace.opaque:
        return None
    places = []
    for block in blocks:
        calls = trace.calls.get(block.modules[0], [])
        if len(calls) != 1:
            continue
        node = product_of(trace, calls[0], block, params)
        if node is not None:
            places.append((block, node, calls[0].record))
    return Watch(places, proven) if places else None


def _free(p: Tensor) -> bool:
    """Whether nothing but the backward pass will write the gradient, in full precision."""
    hooked = p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
    plain = type(p) in (Tensor, torch.nn.Parameter) and p.dtype in (torch.float32, torch.float64)
    return plain and p.requires_grad and p.is_leaf and p.grad is None and not hooked


def product_of(trace: Trace, call: Call, block: Block, params: Sequence[Tensor]) -> Node | None:
    """The one matrix product that reads W (and b), if it is that of the recorded call with rows that are few enough."""
    assert block.weight is not None
    turned = _only_reader(trace.readers, get_gradient_edge(params[block.weight]).node)
    node = None if turned is None or turned.name() != "TBackward0" else _only_reader(trace.readers, turned)
    if node is None or turned is None:
        return None
    with_bias = node.name() == "AddmmBackward0"
    if not with_bias and (node.name() != "MmBackward0" or block.bias is not None):
        return None
    read = [given for given, _ in node.next_functions]
    if read[-1] != turned:
        return None
    if with_bias and not node._saved_alpha == node._saved_beta == 1:  # type: ignore[attr-defined]
        return None
    if block.bias is not None:
        bias = get_gradient_edge(params[block.bias]).node
        if read[0] != bias or _only_reader(trace.readers, bias) != node:
            return None
    seen_at, record = call.edge.node, call.record
    if seen_at != node:  # positions with several axes: the product of flat rows, seen as they were
        views = seen_at.name() in ("ViewBackward0", "UnsafeViewBackward0")
        if not views or _only_reader(trace.readers, node) != seen_at:
            return None
    X = record.argument(0, "input")
    sizes = node._saved_mat1_sym_sizes if with_bias else node._saved_self_sym_sizes  # type: ignore[attr-defined]
    flat = (X.numel() // max(X.shape[-1], 1), X.shape[-1])
    unchanged = versions_of(*record.inputs, *record.keywords.values()) == record.versions
    return node if unchanged and tuple(sizes) == flat and flat[0] <= most_rows(block) else None


def _only_reader(readers: Mapping[Node, Sequence[tuple[Node, int]]], node: Node) -> Node | None:
    """What reads ``node``, if that is one node, once."""
    found = readers.get(node, [])
    return found[0][0] if len(found) == 1 else None
