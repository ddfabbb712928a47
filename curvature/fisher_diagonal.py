"""The Fisher diagonal by labels that the model draws itself; with one draw, Sophia's Gauss-Newton-Bartlett estimator.

Legend: z the outputs, J = ∂z/∂θ, f = Σ c_n ℓ_n a negative log-likelihood with weights c_n, s_n the score ∂ℓ_n/∂z_n for
a label drawn from the model, σ the vector of √c_n s_n over the batch, K draws, R ranks.

A square is not additive, what is squared is: Jᵀσ = Σ_n √c_n J_nᵀs_n. So a measurement returns Jᵀσ of every draw, with
labels that belong to samples, and the square is taken once a step, of the sum over micro-batches and ranks. Ranks are
averaged, and a rank's own loss gives a sample R times the weight that it has in the mean of all: (1/R) Σ_r √R Jᵀσ_r is
the Jᵀσ of that mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.estimate import from_statistics
from curvature.likelihood import Likelihood, check_likelihood, output_likelihood
from curvature.loss_graph import LossGraph
from curvature.measured_diagonal import MeasuredDiagonal
from curvature.problem import Evaluation, Problem
from curvature.protocols import TRANSIENT, CurvatureOperator, Needs, Observation, State, Statistics
from curvature.registry import estimators
from curvature.shared_work import team


@dataclass(frozen=True)
class FisherDiagonal(MeasuredDiagonal):
    """diag(F), F = Σ c_n E_y[∇ℓ_n ∇ℓ_nᵀ] with labels y drawn from the model: an unbiased estimate, never negative.

    One backward pass a draw: (Jᵀσ)² has the expectation diag(Jᵀ E[σσᵀ] J) = diag(F), since the draws of different
    units are independent and have mean zero, so their cross terms vanish in expectation. For the losses of these
    likelihoods F is the Gauss-Newton matrix. With ``samples=1`` this is the estimator of Sophia-G. The weights c_n are
    measured on the loss, so class weights, masks, label smoothing and both reductions need no mention.

    In an optimizer labels belong to samples and the square is taken of a step's whole sum, so that micro-batches and
    ranks, even or not, give the diagonal that one process gives with the one large batch. A sample is a row of the
    outputs. :func:`curvature.estimate` squares every batch by itself, which has the same mean and, over B batches, 1/B
    of the variance.

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

    Cost: K backward passes every ``interval`` steps; 4 bytes a float32 parameter of state, and 4K more in a step that
    refreshes, which ranks also send.
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
        """√R Jᵀσ of every draw, (K, …) a parameter: what adds up over micro-batches, and over ranks as their mean."""
        ranks = team()
        root = 1.0 if ranks is None else math.sqrt(ranks.size)
        pulled = [
            torch.empty((self.samples, *p.shape), dtype=vectors.compute_dtype(p.dtype), device=p.device)
            for p in graph.params
        ]
        for k, draw in enumerate(self._drawn(state, graph)):
            for into, g in zip(pulled, draw, strict=True):
                into[k].copy_(g).mul_(root)
        return {"pulled": pulled}

    def _drawn(self, state: State, graph: LossGraph) -> Iterator[list[Tensor]]:
        """Jᵀσ, draw by draw; a sample draws by its number in the step's whole batch."""
        found = output_likelihood(graph, self.likelihood, verify=cast(int, state["step"]) == 0)
        first = cast(int, state.get(TRANSIENT, 0))
        state[TRANSIENT] = first + (found.z.shape[0] if found.z.dim() else 1)
        draws = cast(int, state["draws"])  # state, so that a resumed run goes on where it stopped
        for k in range(self.samples):
            yield graph.vjp(found.draw(self.seed, draws + k, first).to(graph.output.dtype))

    def estimate(self, problem: Problem) -> CurvatureOperator:
        """One shot over batches, each squared by itself."""

        def measure(state: State, evaluation: Evaluation) -> Statistics:
            squares: list[Tensor] = vectors.zeros_like(problem.params)
            for draw in self._drawn(state, evaluation.graph):
                for total, g in zip(squares, draw, strict=True):
                    wide = g.to(total.dtype)
                    total.addcmul_(wide, wide, value=1.0 / self.samples)
            return {"diagonal": squares}

        return from_statistics(self, problem, measure)

    def update(self, state: State, seen: Observation) -> None:
        """Square what all micro-batches and ranks gave, and take the mean over draws into h."""
        if state.pop(TRANSIENT, None) is not None:
            state["draws"] = cast(int, state["draws"]) + self.samples
        pulled = seen.statistics.get("pulled")
        if pulled is not None:
            squares = [x.square().mean(0) for x in cast("Sequence[Tensor]", pulled)]
            seen = replace(seen, statistics={"diagonal": squares})
        super().update(state, seen)


estimators.add("fisher-diagonal", FisherDiagonal)
