"""Nodes of a graph whose second derivative autograd would give without being able to: they are found and refused.

Legend: φ a node's function, x its inputs, u the gradient of its outputs, p = φ'(x)ᵀ u what its backward returns. A
second backward pass needs p as a function of u (its Jacobian products need no more) and of x (a Hessian needs both).

A custom ``torch.autograd.Function`` is differentiated twice through the operations of its ``backward``. Where these
were cut off (``detach``, ``no_grad``, values stored on ``ctx`` that were computed from the inputs), autograd takes the
missing part for zero. That p does not depend on u can be read from the graph. That it does not depend on x is right
for a piecewise linear φ and wrong for any other, so it is measured where the loss can be evaluated again
(:mod:`curvature.measured_functions`), and said aloud where it cannot.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

#: Nodes of the functions that were measured and found right, so that nothing need be said of them.
proven: weakref.WeakSet[type] = weakref.WeakSet()


def doubtful_nodes(root: Node | None, stop: Node | None = None) -> list[Node]:
    """Custom functions, and nodes of torch whose second derivative is wrong, in the order of their calls.

    Args:
        root: the walk begins here.
        stop: what lies below this node is left out.

    Raises:
        RuntimeError: for a reentrant checkpoint, through which ``torch.autograd.grad`` finds no parameter: it would
            take the derivatives of all within it for zero.

    Cost: O(nodes).
    """
    found: list[Node] = []
    pending, visited = [root] if root is not None else [], {root, stop}
    while pending:
        node = pending.pop()
        if is_custom(node):
            refuse_reentrant(node.name())
            if not node.name().startswith("CompiledFunction"):  # it refuses by itself what it cannot do
                found.append(node)
        elif node.name() == "WeightNormInterfaceBackward0" and weight_norm_is_wrong():
            found.append(node)
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                pending.append(following)
    return sorted(found, key=lambda node: node._sequence_nr())


@functools.cache
def weight_norm_is_wrong() -> bool:
    """Whether the second derivative of ``torch._weight_norm`` lacks that of the norms, as in torch 2.13 on the CPU."""
    with torch.enable_grad():
        v = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(torch._weight_norm(v, v.new_ones(1, 1), 0)[0, 0], v, create_graph=True)
        (second,) = torch.autograd.grad(first[0, 0], v)
    # ∂²(v₁/‖v‖)/∂v₁² = -3 v₁ v₂² / ‖v‖⁵
    return abs(float(second[0, 0]) + 3 * 3 * 16 / 5**5) > 1e-12


def refuse_reentrant(*names: str) -> None:
    """Raise where one of the nodes is a reentrant checkpoint.

    >>> refuse_reentrant("AddmmBackward0", "CheckpointFunctionBackward")
    Traceback (most recent call last):
    RuntimeError: the graph hides its layers behind CheckpointFunctionBackward: use ... use_reentrant=False
    """
    for name in names:
        if name.startswith("CheckpointFunction"):
            raise RuntimeError(
                f"the graph hides its layers behind {name}: use activation checkpointing with use_reentrant=False"
            )


def is_custom(node: Node) -> bool:
    """Whether the node is that of a Python ``autograd.Function``."""
    return issubclass(type(node), BackwardCFunction)


def label(node: Node) -> str:
    """What the user calls the node's function."""
    name = node.name().rpartition("::")[2]
    return "torch's weight_norm" if name == "WeightNormInterfaceBackward0" else name.removesuffix("Backward")


@contextmanager
def watched(nodes: Sequence[Node], *, for_hessian: bool) -> Iterator[None]:
    """Inside, a backward pass with ``create_graph=True`` refuses what cuts itself off.

    Args:
        nodes: as :func:`doubtful_nodes` finds them.
        for_hessian: whether p is differentiated by x as well; then it is said aloud where p does not depend on x.

    Raises:
        RuntimeError: from the backward pass, naming the function.
    """
    seen: set[str] = set()
    handles = []
    try:
        for node in nodes:
            if not is_custom(node):
                if for_hessian:
                    raise missing(
                        node, "its second derivative in this version of torch lacks that of the norms"
                    )
                continue
            handles.append(node.register_hook(_watch(node, for_hessian, seen)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def missing(node: Node, why: str) -> RuntimeError:
    """The error for a node without a second derivative."""
    return RuntimeError(f"no double backward: {label(node)}: {why}")


def _watch(node: Node, for_hessian: bool, seen: set[str]) -> Callable[[Any, Any], None]:
    name, inputs = label(node), [following for following, _ in node.next_functions if following is not None]

    def hook(p: Sequence[Tensor | None], u: Sequence[Tensor | None]) -> None:
        if name in seen:
            return
        seen.add(name)
        above = {g.grad_fn for g in u if g is not None and g.requires_grad}
        given = [g for g in p if isinstance(g, Tensor) and bool((g != 0).any())]
        for g in given:
            if above and not reaches(g, above):
                raise missing(node, "its backward detaches the gradient that it is given")
        if (
            for_hessian
            and type(node) not in proven
            and not any(reaches(g, set(inputs), above) for g in given)
        ):
            warnings.warn(
                f"the backward of the custom autograd.Function {name} does not depend on its inputs, so its second "
                "derivative counts as zero, which is right only for a piecewise linear function: where it is another, "
                'save the inputs themselves for the backward, or use hvp="finite-difference"',
                stacklevel=2,
            )

    return hook


def reaches(tensor: Tensor, wanted: set[Node | None], stop: set[Node | None] | None = None) -> bool:
    """Whether a way through the graph of ``tensor`` meets one of the wanted nodes before one of those to stop at."""
    if tensor.grad_fn is None:
        return tensor.requires_grad and None in wanted
    stop = stop or set()
    pending, visited = [tensor.grad_fn], {tensor.grad_fn}
    while pending:
        node = pending.pop()
        if node in wanted:
            return True
        if node in stop:
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                pending.append(following)
    return False
