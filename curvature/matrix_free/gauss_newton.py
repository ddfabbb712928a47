"""The generalised Gauss-Newton matrix by its products, with the loss's own curvature in output space.

Legend: z the outputs, J = ∂z/∂θ, H_z = ∂²f/∂z² of the whole batch loss, G = Jᵀ H_z J.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from curvature import vectors
from curvature.loss_graph import LossGraph, explain_missing_derivative
from curvature.matrix_free.estimator import MatrixFreeEstimator, Memory
from curvature.matrix_free.hessian import Mode, check_mode, refuse_padding
from curvature.matrix_free.snapshot import Snapshot
from curvature.measured_functions import refuse_unproven_loss
from curvature.outputs import output_tensor
from curvature.problem import Problem
from curvature.protocols import HessianProduct, Needs, Observation, State, Statistics
from curvature.registry import estimators


class OutputSpaceEstimator(MatrixFreeEstimator):
    """Jᵀ C J v in three steps: J v, C in output space, Jᵀ; a subclass says what C is, and how J v is computed."""

    jvp: Mode

    @property
    def needs(self) -> Needs:
        """The graph of the loss and of the outputs."""
        return Needs.GRAD | Needs.GGN

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """Nothing but a look at the outputs: what is beside them is refused here, and not in the step."""
        _ = graph.output
        return {}

    def loop_product(self, state: State, seen: Observation) -> HessianProduct:
        """Σ of the products of this step's losses."""
        if self.jvp != "reverse":
            raise ValueError(
                f'jvp="{self.jvp}" runs the model again, which only curvature.estimate can: use jvp="reverse" in an '
                "optimizer"
            )
        return super().loop_product(state, seen)

    def middle(self, graph: LossGraph, memory: Memory, u: Tensor) -> Tensor:
        """C u, for u shaped like the outputs.

        Args:
            graph: of one loss.
            memory: what was measured on this loss for an earlier product.
            u: a direction in output space.
        """
        raise NotImplementedError

    def graph_product(self, graph: LossGraph, memory: Memory) -> HessianProduct:
        """v ↦ Jᵀ C J v on one graph."""

        def product(v: Sequence[Tensor]) -> list[Tensor]:
            return graph.vjp(self.middle(graph, memory, graph.jvp(v)))

        return product

    def snapshot(self, problem: Problem) -> Snapshot:
        """Differences take the model as it is; derivatives of derivatives need the math attention kernel."""
        return Snapshot(problem, math_attention=self.jvp != "finite-difference")

    def snapshot_product(
        self, snapshot: Snapshot, batch: tuple[Any, Any], memory: Memory, v: Sequence[Tensor]
    ) -> list[Tensor]:
        """Jᵀ C J v of one batch."""
        if self.jvp == "reverse":
            return super().snapshot_product(snapshot, batch, memory, v)
        along = (forward_jvp if self.jvp == "forward" else difference_jvp)(snapshot, batch, v)
        return snapshot.on_graph(batch, lambda graph: graph.vjp(self.middle(graph, memory, along)))


@dataclass(frozen=True)
class GaussNewton(OutputSpaceEstimator):
    """G = Jᵀ H_z J: the Hessian without the curvature of the model itself; positive semidefinite for a convex loss.

    For Hessian-free optimization and natural-gradient methods. H_z is taken from the loss, so any reduction, class
    weights, masks and smoothing are exact. For a likelihood of the exponential family in its natural parameters
    (cross-entropy on logits, squared error) G is the Fisher matrix.

    >>> from curvature import estimate
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> G = estimate(GaussNewton(), model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
    >>> G.matvec([torch.tensor([[1.0, 1.0]])])
    [tensor([[1., 4.]])]

    Args:
        jvp: how J v is computed. ``"reverse"``: the derivative of u ↦ Jᵀu, kept from product to product.
            ``"forward"``: dual numbers through the model; only in :func:`curvature.estimate`.
            ``"finite-difference"``: central differences of outputs, for a model without a double backward; relative
            error about u^(2/3), also only in :func:`curvature.estimate`. The step Jᵀ and the loss itself are exact in
            each.

    Raises:
        ValueError: from :func:`curvature.estimate`, where the loss reaches the parameters past the outputs (a
            penalty on weights, a second output): G would silently leave that part out.

    Cost: about two gradients a product. References: Schraudolph 2002; Martens 2010.
    """

    jvp: Mode = "reverse"

    semidefinite = True

    def __post_init__(self) -> None:
        check_mode(self.jvp, "jvp")

    def middle(self, graph: LossGraph, memory: Memory, u: Tensor) -> Tensor:
        """H_z u."""
        return graph.loss_hvp(u)

    def snapshot(self, problem: Problem) -> Snapshot:
        """The problem as the products see it, if G is the curvature of all of its loss."""
        snapshot = super().snapshot(problem)
        refuse_other_paths(snapshot)
        return snapshot


def forward_jvp(snapshot: Snapshot, batch: tuple[Any, Any], v: Sequence[Tensor]) -> Tensor:
    """J v by dual numbers through the model."""
    refuse_padding(snapshot, "jvp")
    tangents: list[Tensor | None] = []

    def read(outputs: Any) -> None:
        tangents.append(forward_ad.unpack_dual(output_tensor(outputs)).tangent)

    with explain_missing_derivative('use jvp="reverse" or jvp="finite-difference"'), forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, x.to(p.dtype)) for p, x in zip(snapshot.leaves(), v, strict=True)]
        _, outputs = snapshot.within(duals, lambda: snapshot.evaluate(batch, read))
        (tangent,) = tangents
        z = output_tensor(outputs)
        return torch.zeros_like(z) if tangent is None else tangent.detach().clone()


def difference_jvp(snapshot: Snapshot, batch: tuple[Any, Any], v: Sequence[Tensor]) -> Tensor:
    """(z(θ + ε v) - z(θ - ε v)) / 2ε, with the step of :func:`curvature.matrix_free.hessian.difference_product`."""
    length = vectors.norm(v)
    unit_roundoff = max(torch.finfo(p.dtype).eps for p in snapshot.params)
    size = unit_roundoff ** (1 / 3) * (1.0 + vectors.norm(snapshot.params))
    step = size / torch.where(length > 0, length, torch.ones_like(length))

    def outputs_at(shift: list[Tensor]) -> Tensor:
        # They require grad, by which the one tensor of several outputs is found.
        moved = [(p + x.to(p.dtype)).requires_grad_() for p, x in zip(snapshot.params, shift, strict=True)]
        return output_tensor(snapshot.within(moved, lambda: snapshot.evaluate(batch))[1]).detach()

    ahead, behind = outputs_at(vectors.scale(v, step)), outputs_at(vectors.scale(v, -step))
    (difference,) = vectors.scale([ahead - behind], 0.5 / step)
    return difference


def refuse_other_paths(snapshot: Snapshot) -> None:
    """Raise where a part of the loss would be left out, or differentiated wrongly; looks at the first batch."""
    batch = snapshot.batches[0]

    def check(graph: LossGraph) -> None:
        _ = graph.output  # which refuses a loss with a part beside it
        refuse_unproven_loss(snapshot.problem, graph, batch[1])

    snapshot.on_graph(batch, check)


estimators.add("gauss-newton", GaussNewton)
