"""The gradients of many layer outputs in one backward pass, each handed over where the pass meets it.

``torch.autograd.grad`` holds all gradients that it is asked for until the pass has ended: those of every layer at
once, as much memory as the forward pass took. Here only the last edges of every path are asked for; what lies on the
way to them is met by hooks before the node runs, can be used while it is in the cache, and is gone before the next
layer's is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Take = Callable[[int, Tensor], None]
"""(k, the gradient at edge k), at most once a pass and edge; never where the gradient does not reach it."""


class Sweep:
    """Passes that give the gradients at some edges of a graph.

    Args:
        edges: where gradients are asked for.
        readers: for each node of the graph, which nodes read its outputs (:class:`curvature.layer_io.Trace`).

    >>> from curvature.layer_io import Recorder
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> recorder = Recorder(model, ["0", "1"])
    >>> y = model(torch.ones(4, 2))
    >>> trace = recorder.trace(y)
    >>> sweep = Sweep([trace.calls["0"][0].edge, trace.calls["1"][0].edge], trace.readers)
    >>> _ = sweep.run(y, torch.ones(4, 1), lambda k, g: print(k, tuple(g.shape)))
    1 (4, 1)
    0 (4, 3)

    Cost: O(nodes) to prepare; one backward pass without weight gradients each.
    """

    def __init__(
        self, edges: Sequence[GradientEdge], readers: Mapping[Node, Sequence[tuple[Node, int]]]
    ) -> None:
        on_the_way: set[Node] = set()  # nodes through which the gradient of some edge must come
        pending = [edge.node for edge in edges]
        while pending:
            for reader, _ in readers.get(pending.pop(), ()):
                if reader not in on_the_way:
                    on_the_way.add(reader)
                    pending.append(reader)
        self._last: list[tuple[int, GradientEdge]] = []
        self._met: dict[Node, list[tuple[int, int]]] = {}
        for k, edge in enumerate(edges):
            if edge.node in on_the_way:
                self._met.setdefault(edge.node, []).append((k, edge.output_nr))
            else:
                self._last.append((k, edge))

    def run(
        self, of: Tensor, seed: Tensor | None, take: Take, leaves: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """One pass from ``of`` with the gradient ``seed``; the graph is kept.

        Args:
            of: a tensor of the graph, above all edges.
            seed: shaped like it; ``None`` for a scalar.
            take: what is done with every gradient; it must not write to it.
            leaves: parameters whose own gradients the same pass is to give.

        Returns:
            The leaves' gradients.
        """
        handles = []
        try:
            for node, places in self._met.items():
                handles.append(node.register_prehook(_handing(places, take)))
            asked: list[Tensor | GradientEdge] = [*(edge for _, edge in self._last), *leaves]
            found = torch.autograd.grad(
                of,
                asked,  # type: ignore[arg-type]
                seed,
                retain_graph=True,
                allow_unused=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        for (k, _), gradient in zip(self._last, found[: len(self._last)], strict=True):
            if gradient is not None:
                take(k, gradient)
        return list(found[len(self._last) :])


def _handing(places: Sequence[tuple[int, int]], take: Take) -> Callable[[tuple[Tensor, ...]], None]:
    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        for k, number in places:
            if (gradient := gradients[number]) is not None:
                take(k, gradient.detach())

    return hook
