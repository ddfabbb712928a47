"""Whether autograd's second derivative of the custom functions in a loss is that of the functions: measured.

Legend: φ, x, u and p = φ'(x)ᵀ u as in :mod:`curvature.custom_functions`; θ leaves, d a random direction among them.

A fixed random u is given to each φ in place of the gradient that comes to it, so that its p depends on θ by x alone.
Some elements of ∂p/∂θ · d by autograd must then equal the central difference of p along d. Elements at which two steps
of the difference disagree are left out: there a kink lies within the step.

Cost: one gradient and some backward passes, then four gradients at shifted leaves; nothing in a graph without custom
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from curvature import vectors
from curvature.custom_functions import doubtful_nodes, label, missing, proven
from curvature.frame import Frame
from curvature.loss_graph import HVP_REMEDY, LOSS_REMEDY, LossGraph, explain_missing_derivative
from curvature.measured_weights import tree_map
from curvature.probes import generator, probe
from curvature.side_effects import same_random_numbers

if TYPE_CHECKING:
    from curvature.problem import Problem

T = TypeVar("T")

#: Elements of a function's p that are compared: the largest differences, and as many at random.
ELEMENTS = 4
#: Largest relative error of a right derivative, with room for what is left of a difference's own.
TOLERANCE = 0.05
#: Calls of one function that are looked at.
CALLS = 8

Loss: TypeAlias = Callable[[Sequence[Tensor], Callable[[Tensor], Any]], Any]
"""(leaves, then) ↦ then(the loss at these leaves), called while they stand in the model: a checkpoint runs it again."""


def refuse_unproven_model(problem: Problem, graph: LossGraph, batch: tuple[Any, Any]) -> None:
    """Raise where the model or the loss holds a function whose Hessian autograd would get wrong.

    Args:
        problem: model and loss.
        graph: of the batch's loss, to see whether there is any such function.
        batch: ``(inputs, target)``.

    Raises:
        RuntimeError: naming the function and the remedy.
    """
    if not graph.doubtful:
        return
    frame = Frame(problem.model)
    names = {id(p): name for name, p in frame.named_parameters()}
    buffers = dict(frame.named_buffers())

    def loss(leaves: Sequence[Tensor], then: Callable[[Tensor], T]) -> T:
        tensors = {names[id(p)]: x for p, x in zip(problem.params, leaves, strict=True)}
        tensors.update({name: b.detach().clone() for name, b in buffers.items()})

        def run() -> T:
            inputs, target = batch
            return then(problem.loss_fn(problem.model(inputs), target))

        with same_random_numbers(problem.model):
            result: T = torch.func.functional_call(frame, tensors, (run,))
        return result

    prove_hessian(loss, problem.params)


def prove_hessian(loss: Loss, at: Sequence[Tensor]) -> None:
    """:func:`prove`, with the remedies of a Hessian-vector product."""
    with explain_missing_derivative(HVP_REMEDY):
        prove(loss, [p.detach() for p in at])


def refuse_unproven_loss(problem: Problem, graph: LossGraph, target: Any) -> None:
    """Raise where the loss, as a function of the outputs, holds a function whose Hessian autograd would get wrong.

    Args:
        problem: the loss.
        graph: of the batch's loss.
        target: the batch's.

    Raises:
        RuntimeError: naming the function and the remedy.
    """
    z = graph.output
    if not graph.doubtful or not doubtful_nodes(graph.loss.grad_fn, z.grad_fn):
        return

    def loss(leaves: Sequence[Tensor], then: Callable[[Tensor], T]) -> T:
        outputs = tree_map(lambda x: leaves[0] if x is z else x, graph.given_outputs)
        with same_random_numbers(problem.model):
            return then(problem.loss_fn(outputs, target))

    with explain_missing_derivative(LOSS_REMEDY, "loss"):
        prove(loss, [z.detach()])


def prove(loss: Loss, at: Sequence[Tensor]) -> None:
    """Compare the derivative of every doubtful function's p with its difference.

    Args:
        loss: of leaves.
        at: θ.

    Raises:
        RuntimeError: where one is wrong.
    """
    unit_roundoff = max(torch.finfo(x.dtype).eps for x in at)
    if unit_roundoff > 1e-5:  # a difference in half precision tells nothing
        return
    d = [x.to(p.dtype) for x, p in zip(probe(at, 0xCF, 0, "gaussian"), at, strict=True)]
    step = float(unit_roundoff ** (1 / 3) * (1 + vectors.norm(at)) / vectors.norm(d))

    def leaves(size: float) -> list[Tensor]:
        return [(x + size * step * s).requires_grad_() for x, s in zip(at, d, strict=True)]

    def at_shift(size: float) -> list[tuple[Node, Tensor]]:
        shifted = leaves(size)
        return loss(shifted, lambda value: pulled_back(value, shifted))  # type: ignore[no-any-return]

    with torch.enable_grad():
        values = [at_shift(size) for size in (1.0, -1.0, 0.5, -0.5)]
        here = leaves(0.0)

        def compare(value: Tensor) -> None:
            for k, (node, p) in enumerate(pulled_back(value, here, create_graph=True)):
                if any(len(v) <= k or v[k][1].shape != p.shape for v in values):
                    return  # another number of calls: the graph depends on values
                wide, near = (
                    (values[i][k][1] - values[i + 1][k][1]) / (w * step) for i, w in ((0, 2.0), (2, 1.0))
                )
                noise = 100 * unit_roundoff ** (2 / 3) * float(p.detach().abs().max()) if p.numel() else 0.0
                check(node, p, near, (wide - near).abs() <= TOLERANCE * near.abs() + noise, noise)

        def check(node: Node, p: Tensor, difference: Tensor, smooth: Tensor, noise: float) -> None:
            for i in compared(difference, smooth):
                exact, measured = along(p[i], here, d), float(difference[i])
                if not abs(exact - measured) <= 2 * TOLERANCE * max(abs(exact), abs(measured)) + noise:
                    raise missing(
                        node,
                        f"the derivative of its backward by its inputs is {measured:.3g} by differences and "
                        f"{exact:.3g} by autograd: a value that depends on them was detached, or kept without its "
                        "graph",
                    )
            proven.add(type(node))

        loss(here, compare)


def compared(difference: Tensor, smooth: Tensor) -> list[int]:
    """Indices of the smooth elements with the largest differences, and of some others."""
    places = smooth.nonzero().reshape(-1)
    largest = places[difference[places].abs().argsort(descending=True)[:ELEMENTS]]
    g = generator(0xCF, 1, torch.device("cpu"))
    others = places[torch.randperm(len(places), generator=g)[:ELEMENTS].to(places.device)]
    return sorted({*largest.tolist(), *others.tolist()})


def along(element: Tensor, leaves: Sequence[Tensor], d: Sequence[Tensor]) -> float:
    """∂element/∂θ · d by autograd."""
    if not element.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(
        element, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return float(torch.stack([(g.detach() * x).sum() for g, x in zip(gradients, d, strict=True)]).sum())


def pulled_back(
    value: Tensor, leaves: Sequence[Tensor], create_graph: bool = False
) -> list[tuple[Node, Tensor]]:
    """(node, p) of the doubtful functions in a loss, p flattened, for the same u in every call.

    Args:
        value: the loss.
        leaves: what it is differentiated by.
        create_graph: whether p is to be differentiated.
    """
    chosen: list[Node] = []
    calls: dict[str, int] = {}
    for node in doubtful_nodes(value.grad_fn):
        calls[label(node)] = calls.get(label(node), 0) + 1
        if calls[label(node)] <= CALLS:
            chosen.append(node)
    found: dict[int, Tensor] = {}
    handles: list[Any] = []

    def inject(k: int) -> Callable[[Any], Any]:
        def prehook(u: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
            return tuple(None if g is None else probe([g], 0xCF, 2 + k, "gaussian")[0].to(g.dtype) for g in u)

        return prehook

    def take(k: int) -> Callable[[Any, Any], None]:
        def hook(p: Sequence[Tensor | None], u: Sequence[Tensor | None]) -> None:
            parts = [g.reshape(-1) for g in p if g is not None and g.is_floating_point()]
            found[k] = torch.cat(parts) if parts else value.new_zeros(0)

        return hook

    try:
        for k, node in enumerate(chosen):
            handles += [node.register_prehook(inject(k)), node.register_hook(take(k))]
        torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return [(node, found[k]) for k, node in enumerate(chosen) if k in found]
