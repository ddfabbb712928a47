"""The gradient that a Hessian product had to form anyway, taken for the step's gradient: one backward pass less.

A product Hz differentiates ∇f once more, so ∇f is formed with a graph of its own. A second ``loss.backward()`` would
only repeat its values. It is spared where nothing can tell the difference: see ``may_share``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def may_share(loss: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether ``loss.backward()`` would do nothing but add ∇f to the ``.grad`` of ``params``.

    Not where the loss reaches a leaf that is none of ``params``; not where a leaf has hooks, which a backward pass
    runs; and not among several processes, whose reducers are hooks of the accumulation that Python cannot see. A node
    that may hide leaves (reentrant checkpointing) has no second derivative, so that the product refuses it.

    Cost: a walk of the loss's graph, no tensors.
    """
    if distributed.is_available() and distributed.is_initialized():
        return False
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in params):
        return False
    known = {id(p) for p in params}
    pending = [loss.grad_fn]
    visited = set(pending)
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if hasattr(node, "variable") and id(node.variable) not in known:
            return False
        for following, _ in node.next_functions:
            if following not in visited:
                visited.add(following)
                pending.append(following)
    return True


@torch.no_grad()
def accumulate_(params: Sequence[Tensor], gradient: Sequence[Tensor | None]) -> None:
    """Add to every ``.grad`` what the loss's gradient by it is; ``None`` leaves it as it is.

    A ``.grad`` that is new takes the tensor itself only where that has memory and layout of its own: a sum's
    gradient is one number expanded, and two parameters may be given the same tensor.
    """
    taken: set[int] = set()
    for p, g in zip(params, gradient, strict=True):
        if g is None:
            continue
        if p.grad is not None:
            p.grad.add_(g)
            continue
        storage = g.untyped_storage()
        own = (
            g.grad_fn is not None  # a constant may be anybody's
            and g.stride() == p.stride()
            and storage.nbytes() == g.numel() * g.element_size()
            and storage.data_ptr() not in taken
        )
        taken.add(storage.data_ptr())
        p.grad = g.detach() if own else torch.empty_like(p).copy_(g)
