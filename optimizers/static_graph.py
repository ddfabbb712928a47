"""``DistributedDataParallel(static_graph=True)``, whose first backward pass is not the first that curvature takes.

In its first iteration DDP does not reduce gradients as they come: a node behind the model's outputs asks for one
reduction when "the" backward pass ends. A measurement sends vectors back through the same node before there is a
gradient, and the reduction would be spent on nothing: every rank would then step by its own gradient, without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

NODE = "_DDPSinkBackward"
ASKED = "_static_graph_delay_allreduce_enqueued"


@contextmanager
def not_the_backward_pass(loss: Tensor) -> Iterator[None]:
    """Inside, passes through the loss's graph leave DDP's one reduction to the backward pass that comes.

    Raises:
        RuntimeError: where DDP waits for its first backward pass in a way that this version does not know.
    """
    waiting = []
    for node in behind(loss):
        module = node.ddp_weakref() if hasattr(node, "ddp_weakref") else None
        if not getattr(module, "static_graph", False):
            continue
        if not hasattr(module, ASKED):
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) counts the first backward pass, and curvature takes one "
                "before it: leave static_graph out"
            )
        if not getattr(module, ASKED):
            waiting.append(module)
    for module in waiting:
        setattr(module, ASKED, True)
    try:
        yield
    finally:
        for module in waiting:
            setattr(module, ASKED, False)


def behind(loss: Tensor) -> list[Any]:
    """DDP's nodes between the loss and the models that it wraps."""
    found, seen, stack = [], set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == NODE:
            found.append(node)
            continue
        stack += [edge for edge, _ in node.next_functions]
    return found
