"""The Hessian's diagonal, exactly: one backward pass an element, for small problems and for reference.

Legend: g = ∇f, H = ∇²f, P the number of parameters' elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.loss_graph import LossGraph, explain_missing_derivative
from curvature.measured_diagonal import MeasuredDiagonal
from curvature.protocols import Needs, State, Statistics
from curvature.registry import estimators


@dataclass(frozen=True)
class HessianDiagonal(MeasuredDiagonal):
    """diag(H), exact, with its signs: the reference that Hutchinson's estimate approaches.

    Element i is ∂g_i/∂θ_i, by a backward pass through the graph of g that stops at the tensor that holds θ_i.

    Args:
        beta: decay of the running mean over refreshes, in [0, 1).
        interval: steps between refreshes, >= 1.
        max_elements: largest P that is accepted; above it use :class:`curvature.HutchinsonDiagonal`.

    >>> from curvature import estimate
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> estimate(HessianDiagonal(), model, torch.nn.MSELoss(), [(x, torch.zeros(1, 1))]).diagonal()
    [tensor([[2., 8.]])]

    Cost: P + 1 backward passes, O(P) times a gradient.
    """

    beta: float = 0.999
    interval: int = 1
    max_elements: int = 20_000

    semidefinite = False

    def __post_init__(self) -> None:
        self.check()
        if self.max_elements < 1:
            raise ValueError(f"max_elements must be >= 1, got {self.max_elements}")

    @property
    def needs(self) -> Needs:
        """Products with the Hessian."""
        return Needs.GRAD | Needs.HVP

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """∂g_i/∂θ_i for every i."""
        size = vectors.numel(graph.params)
        if size > self.max_elements:
            raise ValueError(
                f"max_elements must be at least the {size} elements of the parameters, got {self.max_elements}: an "
                "exact diagonal takes a backward pass for each; HutchinsonDiagonal estimates it"
            )
        diagonal: list[Tensor] = vectors.zeros_like(graph.params)
        for p, g, h in zip(graph.params, graph.differentiable_gradient(), diagonal, strict=True):
            if not g.requires_grad:
                continue
            flat = torch.zeros(h.shape, dtype=h.dtype, device=h.device).view(-1)  # h may have other strides
            for i, entry in enumerate(g.reshape(-1)):
                with explain_missing_derivative():
                    (row,) = torch.autograd.grad(
                        entry, p, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                flat[i] = row.detach().reshape(-1)[i]
            h.copy_(flat.view(h.shape))
        return {"diagonal": diagonal}


estimators.add("hessian-diagonal", HessianDiagonal)
