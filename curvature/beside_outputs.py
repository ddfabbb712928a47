"""Ways from a loss to parameters that do not go through the model's outputs.

Legend: f the loss, z the outputs, θ the parameters. Curvature that is taken at the outputs (Gauss-Newton, Fisher,
Kronecker factors) is Jᵀ C J with J = ∂z/∂θ: of f = ℓ(z(θ)) + r(θ) it holds nothing of r, a penalty on weights, on
hidden activations or on a second output. The gradient holds it, so that a step would follow two different losses.
Which parameters r reaches can be read from the graph, whatever its size at this θ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

BesideOutputs = Literal["refuse", "drop"]

#: The node of a tensor that a graph ends in.
LEAF = "torch::autograd::AccumulateGrad"


def check_beside_outputs(value: object) -> None:
    """Refuse an unknown name.

    >>> check_beside_outputs("ignore")
    Traceback (most recent call last):
    ValueError: beside_outputs must be 'refuse' or 'drop', got 'ignore'
    """
    if value not in get_args(BesideOutputs):
        raise ValueError(f"beside_outputs must be 'refuse' or 'drop', got {value!r}")


def refuse_beside_outputs(loss: Tensor, z: Tensor, params: Sequence[Tensor]) -> None:
    """Raise where a part of ∂f/∂θ does not come through z.

    Args:
        loss: f.
        z: the outputs.
        params: θ.

    Raises:
        ValueError: for such a part, or where f does not depend on z.

    Cost: a walk of the nodes between f and z, without a wait for the device. Only where it meets one of ``params``, a
    backward pass and a look at its result: a part that is multiplied by zero (what data-parallel scripts add so that no
    parameter is unused) is none.
    """
    reached = beside(loss, z, params)
    if not reached:
        return
    for i, g in zip(reached, _without(loss, z, [params[i] for i in reached]), strict=True):
        values = None if g is None else g.coalesce().values() if g.is_sparse else g
        if values is not None and bool((values != 0).any()):
            raise ValueError(
                f"the loss reaches parameter {i} of shape {tuple(params[i].shape)} by another way than the outputs (a "
                "penalty on weights or activations, a second output), which curvature that is taken at the outputs "
                "leaves out: give the loss without it (a decay of weights is the optimizer's weight_decay=), let the "
                "outputs be one tensor that holds all of it, use Hessian, or leave it out by name: the optimizer's "
                "beside_outputs='drop'"
            )


def beside(loss: Tensor, z: Tensor, params: Sequence[Tensor]) -> list[int]:
    """The indices of the parameters that some way from f reaches without z.

    Raises:
        ValueError: where no way from f reaches z.
    """
    start, end = get_gradient_edge(loss), get_gradient_edge(z)
    if start.node is end.node and start.output_nr == end.output_nr:
        return []
    position = {id(p): i for i, p in enumerate(params) if p.requires_grad}
    stop, number = end.node, end.output_nr
    found: list[int] = []
    met = False
    pending, visited = [start.node], {start.node}
    while pending:
        node = pending.pop()
        if node.name() == LEAF:
            i = position.get(id(node.variable))  # type: ignore[attr-defined]
            if i is not None:
                found.append(i)
            continue
        for following, at in node.next_functions:
            if following is stop and at == number:
                met = True
            elif following is not None and following not in visited:
                visited.add(following)
                pending.append(following)
    if not met:
        raise ValueError("the loss does not depend on outputs: pass what the loss was computed from")
    return sorted(found)


def _without(loss: Tensor, z: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """∂f/∂θ with z held constant."""
    handle = z.register_hook(torch.zeros_like)
    try:
        return torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    finally:
        handle.remove()
