"""The Gauss-Newton diagonal, exactly.

Legend: z the outputs, J = ∂z/∂θ, J_n its rows of sample n; H_z = ∂²f/∂z² = Σ_k S_k diag(±) S_kᵀ, block by block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from curvature import vectors
from curvature.layer_io import Recorder
from curvature.loss_graph import LossGraph
from curvature.measured_diagonal import MeasuredDiagonal
from curvature.output_factor import factor_columns
from curvature.per_sample import PerSample, recorder_for, refuse_coupled
from curvature.probes import probe
from curvature.protocols import CurvatureOperator, Needs, State, Statistics
from curvature.registry import estimators

if TYPE_CHECKING:
    from curvature.problem import Evaluation, Problem


@dataclass(frozen=True)
class GaussNewtonDiagonal(MeasuredDiagonal):
    """diag(Jᵀ H_z J), exact: Σ over samples n and columns k of (J_nᵀ S_kn)², with the sign of the eigenvalue.

    H_z is measured on the loss's own graph, so class weights, masks, label smoothing, both reductions and custom losses
    come out exactly. Where the loss is not convex in the outputs the result keeps its sign.

    Choose it for reference, or for few outputs; :class:`curvature.FisherDiagonal` estimates the same by one backward
    pass a draw.

    Args:
        model: the model, whose layers are watched; needed in an optimizer, known to :func:`curvature.estimate`.
        beta: decay of the running mean over refreshes, in [0, 1).
        interval: steps between refreshes, >= 1.

    Raises:
        ValueError: for a loss that couples the samples' outputs, or a batch norm in training mode.

    >>> import torch
    >>> from curvature import estimate
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> B = estimate(GaussNewtonDiagonal(), model, torch.nn.MSELoss(), [(x, torch.zeros(1, 1))])
    >>> B.diagonal()[0].round(decimals=4)  # H = 2 x xᵀ
    tensor([[2., 8.]])

    Cost: a backward pass for each of a sample's outputs (classes times positions), with the layers' squares.
    References: Schraudolph 2002; Dangel, Kunstner & Hennig 2020, arXiv 1912.10985.
    """

    model: nn.Module | None = field(default=None, repr=False, compare=False)
    beta: float = 0.999
    interval: int = 1
    recorder: Recorder | None = field(default=None, init=False, repr=False, compare=False)

    semidefinite = True

    def __post_init__(self) -> None:
        self.check()
        if self.model is not None:
            object.__setattr__(self, "recorder", recorder_for(self.model))

    @property
    def needs(self) -> Needs:
        """Outputs, and the layers' inputs and output gradients."""
        return Needs.GRAD | Needs.GGN | Needs.LAYER_IO

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """Σ ± (J_nᵀ S_kn)²."""
        if self.model is None or self.recorder is None:
            raise ValueError(
                "GaussNewtonDiagonal needs the model to see its layers: give GaussNewtonDiagonal(model=model)"
            )
        return measured(graph, self.model, self.recorder)

    def estimate(self, problem: Problem) -> CurvatureOperator:
        """The one-shot estimate; the model is the problem's."""
        from curvature.estimate import from_statistics

        recorder = recorder_for(problem.model)

        def measure(state: State, evaluation: Evaluation) -> Statistics:
            return measured(evaluation.graph, problem.model, recorder)

        return from_statistics(self, problem, measure)


def measured(graph: LossGraph, model: nn.Module, recorder: Recorder) -> Statistics:
    """The exact diagonal of one loss."""
    refuse_coupled(model)
    z = graph.output
    count = z.shape[0] if z.dim() else 1
    samples = PerSample(graph, model, recorder, count, z)
    # The rules are proven on a vector that reaches every output; a column may reach one position only.
    samples.squares(torch.ones(count), probe([z], 0x6E, 0, "gaussian")[0].to(z.dtype))
    total: list[Tensor] = vectors.zeros_like(graph.params)
    for column, signs in factor_columns(graph):
        for t, squares in zip(total, samples.squares(signs, column.to(z.dtype)), strict=True):
            t.add_(squares)
    return {"diagonal": total}


estimators.add("gauss-newton-diagonal", GaussNewtonDiagonal)
