"""The Fisher diagonal by labels that the model draws itself; with one draw, Sophia's Gauss-Newton-Bartlett estimator.

Legend: z the outputs, J = ∂z/∂θ, f = Σ c_n ℓ_n a negative log-likelihood with weights c_n, s_n the score ∂ℓ_n/∂z_n for
a label drawn from the model, σ the vector of √c_n s_n over the batch, K draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from curvature import vectors
from curvature.likelihood import Likelihood, check_likelihood, output_likelihood
from curvature.loss_graph import LossGraph
from curvature.measured_diagonal import MeasuredDiagonal, next_draw
from curvature.protocols import Needs, State, Statistics
from curvature.registry import estimators


@dataclass(frozen=True)
class FisherDiagonal(MeasuredDiagonal):
    """diag(F), F = Σ c_n E_y[∇ℓ_n ∇ℓ_nᵀ] with labels y drawn from the model: an unbiased estimate, never negative.

    One backward pass a draw: (Jᵀσ)² has the expectation diag(Jᵀ E[σσᵀ] J) = diag(F), since the draws of different
    units are independent and have mean zero, so their cross terms vanish in expectation. For the losses of these
    likelihoods F is the Gauss-Newton matrix. With ``samples=1`` this is the estimator of Sophia-G. The weights c_n are
    measured on the loss, so class weights, masks, label smoothing and both reductions need no mention.

    Choose it where products with the Hessian are too dear, or where a curvature that cannot be negative is wanted.

    Args:
        likelihood: what the loss is the negative logarithm of: ``"categorical"`` (softmax of logits), ``"bernoulli"``
            (sigmoid of logits) or ``"gaussian"`` (squared error).
        samples: K >= 1, draws a refresh; the standard error falls as 1/√K.
        seed: of the draws.
        interval: steps between refreshes, >= 1.
        beta: decay of the running mean over refreshes, in [0, 1).

    Raises:
        ValueError: on the first measurement, where the loss's curvature is not that of ``likelihood``.

    >>> import torch
    >>> from curvature import estimate
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> F = estimate(FisherDiagonal("gaussian", samples=4000), model, torch.nn.MSELoss(), [(x, torch.zeros(1, 1))])
    >>> (F.diagonal()[0] / torch.tensor([2.0, 8.0]) - 1).abs().max() < 0.1  # H = 2 x xᵀ
    tensor(True)

    Cost: K backward passes every ``interval`` steps; 4 bytes a float32 parameter of state.
    References: Liu et al. 2023, arXiv 2305.14342, algorithm 2; Kunstner et al. 2019, arXiv 1905.12558.
    """

    likelihood: Likelihood
    samples: int = 1
    seed: int = 0
    interval: int = 1
    beta: float = 0.999

    semidefinite = True

    def __post_init__(self) -> None:
        self.check()
        check_likelihood(self.likelihood)
        if self.samples < 1:
            raise ValueError(f"samples must be >= 1, got {self.samples}")

    @property
    def needs(self) -> Needs:
        """Gradients for drawn labels."""
        return Needs.GRAD | Needs.SAMPLED_LABELS

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """Mean of (Jᵀσ)² over the draws."""
        found = output_likelihood(graph, self.likelihood, verify=cast(int, state["step"]) == 0)
        squares: list[Tensor] = vectors.zeros_like(graph.params)
        for _ in range(self.samples):
            sigma = found.draw(self.seed, next_draw(state)).to(graph.output.dtype)
            for total, g in zip(squares, graph.vjp(sigma), strict=True):
                wide = g.to(total.dtype)
                total.addcmul_(wide, wide, value=1.0 / self.samples)
        return {"diagonal": squares}


estimators.add("fisher-diagonal", FisherDiagonal)
