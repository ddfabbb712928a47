"""The living autograd graph of one loss, and the products taken on it.

Legend: θ the parameters, f the loss, z the model's outputs, J = ∂z/∂θ, H = ∇²f, H_z = ∂²f/∂z² (the loss's own
curvature in output space). The Gauss-Newton matrix is Jᵀ H_z J.

Everything goes through ``torch.autograd.grad``: ``.grad`` is never written, and no graph outlives this object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvature.beside_outputs import BesideOutputs, refuse_beside_outputs
from curvature.custom_functions import doubtful_nodes, watched
from curvature.outputs import check_outputs, describe, output_tensor, refuse_empty
from curvature.probes import generator

HVP_REMEDY = 'use hvp="finite-difference", or the math attention kernel'
JVP_REMEDY = 'use jvp="finite-difference", or the math attention kernel'
LOSS_REMEDY = (
    "compute the loss by operations that can be differentiated twice, or use curvature that needs gradients only "
    "(EmpiricalFisherDiagonal, Shampoo, SOAP)"
)


class LossGraph:
    """One loss at one θ, while its graph lives.

    Args:
        loss: a real scalar that requires grad.
        params: the parameters to differentiate by; one that is frozen at this moment counts as unused.
        outputs: what the model returned on the way to ``loss``; needed for :meth:`ggn` and sampled labels. A
            tensor, or a dict, tuple or dataclass in which ``output_tensor`` finds one.
        gives_gradient: the caller takes ∇f too, from ``formed``, and needs no graph after the last product, which
            may free it.
        beside_outputs: what a loss does that reaches ``params`` by another way than ``outputs``, where these are asked
            for: ``"refuse"`` is an error, ``"drop"`` leaves that part out of what is taken at the outputs.
    """

    def __init__(
        self,
        loss: Tensor,
        params: Sequence[Tensor],
        outputs: Any = None,
        *,
        gives_gradient: bool = False,
        beside_outputs: BesideOutputs = "refuse",
    ) -> None:
        check_loss(loss)
        self.loss = loss
        self.params = list(params)
        self.gives_gradient = gives_gradient
        self.beside_outputs = beside_outputs
        #: Whether the last product has freed the graph.
        self.spent = False
        #: ∇f as the first product formed it, where it is wanted; ``None`` for a parameter that the loss does not reach.
        self.formed: list[Tensor | None] | None = None
        self.given_outputs = outputs
        self._output: Tensor | None = None
        self._gradient_edges: list[GradientEdge | None] | None = None
        self._output_gradient: Tensor | None = None
        self._pulled: tuple[Tensor, list[Tensor]] | None = None
        self._doubtful: list[Node] | None = None

    @property
    def output(self) -> Tensor:
        """z: the one tensor of the model's outputs through which the loss is computed.

        Raises:
            ValueError: where no such tensor was given, or the loss reaches a parameter by another way.
        """
        if self._output is None:
            if self.given_outputs is None:
                raise ValueError(
                    "this curvature needs the model's outputs: call optimizer.backward(loss, outputs)"
                )
            z = output_tensor(self.given_outputs)
            check_outputs(z)
            if self.beside_outputs == "refuse":
                refuse_beside_outputs(self.loss, z, self.params)
            self._output = z
        return self._output

    @property
    def doubtful(self) -> list[Node]:
        """The nodes that may have no second derivative."""
        return self._walked()

    def gradient(self) -> list[Tensor]:
        """∇f, detached, zeros for a parameter that the loss does not reach."""
        return [g.detach() for g in self._grad(self.loss, retain_graph=True)]

    def differentiable_gradient(self) -> list[Tensor]:
        """∇f with a graph, to be held by the caller; :meth:`hvp` keeps the graph alone."""
        with explain_missing_derivative(), watched(self.doubtful, for_hessian=True):
            found = derivatives([self.loss], self.params, None, retain_graph=True, create_graph=True)
            gradient = filled(found, self.params)
            refuse_cut_graph(gradient)
        if self.gives_gradient:
            self.formed = found
        return gradient

    def hvp(self, v: Sequence[Tensor], *, last: bool = False) -> list[Tensor]:
        """H v, reverse over reverse: about two gradients a product, after one for the first.

        Args:
            v: one tensor a parameter.
            last: free the graph on the way, which takes less memory; no product can follow.

        Raises:
            RuntimeError: where the model has no double backward; the message names the remedy.
        """
        if self._gradient_edges is None:
            # Edges stand for the gradient in the graph, so that its values need not be kept.
            self._gradient_edges = [
                get_gradient_edge(g) if g.requires_grad else None for g in self.differentiable_gradient()
            ]
        pairs = [
            (e, x, p) for e, x, p in zip(self._gradient_edges, v, self.params, strict=True) if e is not None
        ]
        if not pairs:  # a loss that is linear in θ
            return [torch.zeros_like(p) for p in self.params]
        with explain_missing_derivative():
            products = differentiate(
                [e for e, _, _ in pairs],
                self.params,
                [x.to(p.dtype) for _, x, p in pairs],
                retain_graph=not last,
            )
        self.spent = last
        return [p.detach() for p in products]

    def output_gradient(self) -> Tensor:
        """∂f/∂z with a graph, so that :meth:`loss_hvp` can differentiate it again."""
        if self._output_gradient is None:
            doubtful = doubtful_nodes(self.loss.grad_fn, self.output.grad_fn) if self.doubtful else []
            with explain_missing_derivative(LOSS_REMEDY, "loss"), watched(doubtful, for_hessian=True):
                (gradient,) = torch.autograd.grad(
                    self.loss, self.output, create_graph=True, allow_unused=True
                )
                if gradient is None:
                    raise ValueError(
                        "the loss does not depend on outputs: pass what the loss was computed from"
                    )
                refuse_cut_graph([gradient])
            self._output_gradient = gradient
        return self._output_gradient

    def loss_hvp(self, v: Tensor) -> Tensor:
        """H_z v, for v shaped like z; exact for any reduction, weighting, masking or smoothing of the loss."""
        gradient = self.output_gradient()
        if not gradient.requires_grad:
            return torch.zeros_like(self.output)
        with explain_missing_derivative(LOSS_REMEDY, "loss"):
            (product,) = torch.autograd.grad(
                gradient,
                self.output,
                v.to(gradient.dtype),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return product.detach()

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """J v, by the double-backward trick: u ↦ Jᵀu is linear, so its derivative is the same at any u.

        The graph of Jᵀu is kept from product to product.
        """
        if self._pulled is None:
            # not zero, at which a function that cuts itself off could not be told from one that does not
            g = generator(0x7E5, 0, self.output.device)
            u = torch.randn(self.output.shape, generator=g, device=self.output.device)
            u = u.to(self.output.dtype).requires_grad_()
            doubtful = doubtful_nodes(self.output.grad_fn) if self.doubtful else []
            with explain_missing_derivative(JVP_REMEDY), watched(doubtful, for_hessian=False):
                self._pulled = (u, self._grad(self.output, u, create_graph=True))
                refuse_cut_graph(self._pulled[1])
        u, pulled = self._pulled
        pairs = [(g, x) for g, x in zip(pulled, v, strict=True) if g.requires_grad]
        if not pairs:  # the outputs do not depend on θ
            return torch.zeros_like(self.output)
        with explain_missing_derivative(JVP_REMEDY):
            (product,) = torch.autograd.grad(
                [g for g, _ in pairs],
                u,
                [x.to(g.dtype) for g, x in pairs],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return product.detach()

    def vjp(self, u: Tensor) -> list[Tensor]:
        """Jᵀ u."""
        return [g.detach() for g in self._grad(self.output, u, retain_graph=True)]

    def ggn(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Jᵀ H_z J v."""
        return self.vjp(self.loss_hvp(self.jvp(v)))

    def restricted(self, indices: Sequence[int]) -> LossGraph:
        """The same loss as a function of some of its parameters."""
        some = [self.params[i] for i in indices]
        return LossGraph(self.loss, some, self.given_outputs, beside_outputs=self.beside_outputs)

    def release(self) -> None:
        """Drop what holds the graph alive."""
        self._gradient_edges = None
        self._output_gradient = None
        self._pulled = None
        self.formed = None
        self._doubtful = None

    def _walked(self) -> list[Node]:
        if self._doubtful is None:
            self._doubtful = doubtful_nodes(self.loss.grad_fn)
        return self._doubtful

    def _grad(
        self,
        of: Tensor,
        seed: Tensor | None = None,
        *,
        retain_graph: bool = False,
        create_graph: bool = False,
    ) -> list[Tensor]:
        self._walked()  # a reentrant checkpoint is refused before it hides parameters
        seeds = None if seed is None else [seed]
        return differentiate(
            [of], self.params, seeds, retain_graph=retain_graph or create_graph, create_graph=create_graph
        )


def differentiate(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    params: Sequence[Tensor],
    seeds: Sequence[Tensor] | None,
    *,
    retain_graph: bool,
    create_graph: bool = False,
) -> list[Tensor]:
    """``torch.autograd.grad`` with zeros for parameters that are unused, or frozen at this moment."""
    return filled(
        derivatives(outputs, params, seeds, retain_graph=retain_graph, create_graph=create_graph), params
    )


def derivatives(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    params: Sequence[Tensor],
    seeds: Sequence[Tensor] | None,
    *,
    retain_graph: bool,
    create_graph: bool,
) -> list[Tensor | None]:
    """``torch.autograd.grad`` with ``None`` for parameters that are unused, or frozen at this moment."""
    found = iter(
        torch.autograd.grad(
            outputs,
            [p for p in params if p.requires_grad],
            seeds,
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if p.requires_grad else None for p in params]


def filled(found: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in the place of ``None``."""
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]


def refuse_cut_graph(gradients: Sequence[Tensor]) -> None:
    """Raise where a backward that can be differentiated only once has cut the gradients off from the parameters.

    Such a node (``once_differentiable``) raises only when it is reached, but it has no edge to the parameters, so
    that a product would skip it and silently lack its part.
    """
    pending = [g.grad_fn for g in gradients if g.grad_fn is not None]
    visited = set(pending)
    while pending:
        node = pending.pop()
        if node.name().rpartition("::")[2] in ("Error", "DelayedError"):
            raise RuntimeError("no double backward: a node of the graph is marked once_differentiable")
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                pending.append(following)


@contextmanager
def explain_missing_derivative(remedy: str = HVP_REMEDY, what: str = "model") -> Iterator[None]:
    """Turn autograd's message about a missing second or forward derivative into one that names the remedy."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        signs = (
            "derivative for",
            "double backward",
            "does not support",
            "forward AD",
            "forward mode AD",
            "once_differentiable",
        )
        if any(sign in text for sign in signs):
            causes = {"model": "a compiled graph, flash attention, sharding or a custom autograd.Function"}
            raise RuntimeError(
                f"this {what} has no derivative of its derivative here "
                f"({causes.get(what, 'a custom autograd.Function')}): {remedy}; autograd said: "
                + text.split("\n")[0]
            ) from error
        raise


def check_loss(loss: object, outputs: object = None) -> None:
    """Refuse what is no real scalar with a graph, and the loss of an empty batch.

    >>> check_loss(torch.ones(2, requires_grad=True))
    Traceback (most recent call last):
    ValueError: loss must be a scalar tensor, got a tensor of shape (2,); reduce it with .mean() or .sum()
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"loss must be a scalar tensor, got {describe(loss)}; reduce it with .mean() or .sum()"
        )
    if loss.is_complex():
        raise ValueError("loss must be real, got a complex tensor: take its real part or its absolute value")
    if not loss.requires_grad:
        raise ValueError(
            "loss must require grad: was it computed under torch.no_grad, or from a frozen model?"
        )
    if isinstance(outputs, Tensor):
        refuse_empty(outputs)
