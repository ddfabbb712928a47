"""Layer inputs and the gradients of layer outputs: who used a parameter, with what, at which node of the graph.

A forward hook leaves a :class:`Record` (module name, detached inputs) in the ``metadata`` of the autograd node that
made the layer's output. That dictionary lives exactly as long as the node, so a loss that is thrown away takes its
records with it, a module called twice leaves two, and several losses never mix.
:meth:`Recorder.trace` finds the records by walking the graph; gradients of layer outputs are
then taken at :class:`torch.autograd.graph.GradientEdge`, which is right under in-place activations too (the node is
the one before the activation) and forms no weight gradient.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

_keys = itertools.count()

#: Nodes between a parameter and its use that only change layout or precision: a use of them is a use of it.
_TRANSPARENT = frozenset({
    "TBackward0", "TransposeBackward0", "ToCopyBackward0", "ViewBackward0", "PermuteBackward0", "AliasBackward0",
    "UnsqueezeBackward0", "DetachBackward0",
})  # fmt: skip

_SPLITS = frozenset({"SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0"})


@dataclass(eq=False)
class Record:
    """One call of one module.

    Args:
        module: its name in the model.
        inputs: its positional tensors, detached.
        keywords: its keyword tensors, detached.
        versions: the version counters of both, to notice a later in-place change.
        shape: the output's shape; the gradient at its node has as many elements.
        output_number: which output of its node it is.
    """

    module: str
    inputs: tuple[Tensor, ...]
    keywords: dict[str, Tensor]
    versions: tuple[int, ...]
    shape: torch.Size
    output_number: int

    def check_unchanged(self) -> None:
        """Refuse inputs that were overwritten after the call."""
        for x, version in zip((*self.inputs, *self.keywords.values()), self.versions, strict=True):
            if x._version != version:
                raise RuntimeError(
                    f"the input of {self.module!r} was modified in place after the call, so its curvature cannot be "
                    "observed: use the out-of-place operation there"
                )

    def argument(self, position: int, name: str) -> Tensor:
        """A tensor argument, however it was passed."""
        return self.inputs[position] if position < len(self.inputs) else self.keywords[name]


@dataclass(frozen=True)
class Call:
    """A record, and the edge at which the gradient of its output is taken.

    They are two objects because the node owns the record: an edge inside it would own the node, a cycle through
    C++ that no garbage collection sees.
    """

    record: Record
    edge: GradientEdge


@dataclass(frozen=True)
class Use:
    """A node that reads a parameter.

    Args:
        node: the node, past changes of layout and precision.
        part: which piece it reads, where the parameter was split first.
        split: the node that split it.
    """

    node: Node
    part: int | None = None
    split: Node | None = None


@dataclass
class Trace:
    """What a walk of one graph found.

    Args:
        calls: every recorded call, by module name, in order.
        uses: for each parameter (by ``id``), what reads it, in order.
        opaque: names of nodes that hide what happens inside them (reentrant checkpoints, compiled graphs).
        readers: for each node but the topmost, which nodes read which of its outputs.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    uses: dict[int, list[Use]] = field(default_factory=dict)
    opaque: list[str] = field(default_factory=list)
    readers: dict[Node, list[tuple[Node, int]]] = field(default_factory=dict)

    def broadcast(self, call: Call, count: int) -> GradientEdge | None:
        """Where a call's output, one for all samples, is added to what has samples: there it has a gradient for each.

        Args:
            call: a recorded call.
            count: N; the sum must have one axis more than the output, in front, of this length.

        Returns:
            the sum's edge; ``None`` where the output goes anywhere else.
        """
        found = self.sum_with_samples(call.edge, tuple(call.record.shape), count)
        return None if found is None else found[0]

    def sum_with_samples(
        self, edge: GradientEdge, output: tuple[int, ...], count: int
    ) -> tuple[GradientEdge, tuple[int, ...]] | None:
        """As :meth:`broadcast`, for the output of a node and its shape; with the shape of the sum."""
        readers = self.readers.get(edge.node, [])
        if len(readers) != 1 or readers[0][0].name() != "AddBackward0":
            return None
        node = readers[0][0]
        shapes = [tuple(given.shape) for given in node._input_metadata]
        fits = shapes == [(count, *output)] or (output[:1] == (1,) and shapes == [(count, *output[1:])])
        # x + α y: only with α = 1 is the gradient of either summand that of the sum
        return (GradientEdge(node, 0), shapes[0]) if fits and node._saved_alpha == 1 else None  # type: ignore[attr-defined]


class LayerHook:
    """The forward hook; it holds its recorder weakly, and a copied or unpickled one does nothing."""

    def __init__(self, recorder: Recorder | None = None, name: str = "") -> None:
        self._recorder = None if recorder is None else weakref.ref(recorder)
        self._name = name

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        recorder = None if self._recorder is None else self._recorder()
        if recorder is not None and recorder.enabled and torch.is_grad_enabled():
            recorder.record(self._name, args, kwargs, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerHook:
        return LayerHook()

    def __reduce__(self) -> tuple[Callable[..., LayerHook], tuple[()]]:
        return LayerHook, ()


class Recorder:
    """Records the calls of some modules of a model, for as long as this object lives.

    Args:
        model: the model whose submodules are watched.
        names: the watched modules, as in ``model.named_modules()``.

    The model stays picklable and can be copied: its hooks are inert in the copy. A copied or unpickled recorder
    watches the copy of its model.

    Cost: one short Python call a module and forward pass; the inputs are the tensors that autograd keeps anyway.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self.names = tuple(names)
        self.key = f"soaa.layer_io.{next(_keys)}"
        self.enabled = True
        modules = dict(model.named_modules())
        handles = [
            modules[name].register_forward_hook(LayerHook(self, name), with_kwargs=True)
            for name in self.names
        ]
        weakref.finalize(self, _remove, handles)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return Recorder(copy.deepcopy(self.model, memo), self.names)

    def __reduce__(self) -> tuple[type[Recorder], tuple[nn.Module, tuple[str, ...]]]:
        return Recorder, (self.model, self.names)

    def record(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Leave a record at the node of ``output``."""
        out = output if isinstance(output, Tensor) else next((o for o in _tensors(output)), None)
        if out is None or out.grad_fn is None:
            return
        inputs = tuple(x.detach() for x in _tensors(args))
        keywords = {k: x.detach() for k, x in kwargs.items() if isinstance(x, Tensor)}
        versions = tuple(x._version for x in (*inputs, *keywords.values()))
        node, number = out.grad_fn, out.output_nr
        base = out._base if out._is_view() else None
        if (
            base is not None
            and base.grad_fn is not None
            and base.numel() == out.numel()
            and base.is_contiguous()
            and out.is_contiguous()
        ):
            # An in-place operation on a view replaces the view's node; that of its base stays in the graph.
            node, number = base.grad_fn, base.output_nr
        record = Record(name, inputs, keywords, versions, out.shape, number)
        _metadata(node).setdefault(self.key, []).append(record)

    def trace(self, output: Tensor) -> Trace:
        """Walk the graph below ``output``: O(nodes)."""
        found = Trace()
        if output.grad_fn is None:
            return found
        calls: list[tuple[int, Call]] = []
        parents = found.readers
        leaves: dict[Node, int] = {}
        stack, seen = [output.grad_fn], {output.grad_fn}
        while stack:
            node = stack.pop()
            name = node.name()
            if "CheckpointFunction" in name or "CompiledFunction" in name:
                found.opaque.append(name)
            variable = getattr(node, "variable", None)
            if variable is not None:
                leaves[node] = id(variable)
                continue
            calls.extend(
                (node._sequence_nr(), Call(record, GradientEdge(node, record.output_number)))
                for record in _metadata(node).get(self.key, ())
            )
            for child, number in node.next_functions:
                if child is None:
                    continue
                parents.setdefault(child, []).append((node, number))
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
        for _, call in sorted(calls, key=lambda numbered: numbered[0]):
            found.calls.setdefault(call.record.module, []).append(call)
        for leaf, identity in leaves.items():
            uses = _readers(leaf, parents)
            found.uses[identity] = sorted(uses, key=lambda use: use.node._sequence_nr())
        return found


def _metadata(node: Node) -> dict[str, list[Record]]:
    return cast("dict[str, list[Record]]", node.metadata)  # a property, whatever its stub says


def _readers(
    node: Node,
    parents: Mapping[Node, list[tuple[Node, int]]],
    part: int | None = None,
    split: Node | None = None,
) -> list[Use]:
    """What reads ``node``, looking through changes of layout and precision, and through splits."""
    readers: list[Use] = []
    for parent, number in parents.get(node, ()):
        above = (number, node) if node.name() in _SPLITS else (part, split)
        beyond = _readers(parent, parents, *above) if parent.name() in _TRANSPARENT | _SPLITS else []
        readers.extend(beyond or [Use(parent, *above)])
    return readers


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor)]


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
