"""The Fisher matrix by its products, exact or with labels drawn from the model.

Legend: f = Σ_n c_n ℓ_n, ℓ_n = -log p(y_n | z_n), over units n (a sample, a position, an element of the outputs);
J_n = ∂z_n/∂θ; M_n the Fisher matrix of one unit at its outputs; F = Σ_n c_n J_nᵀ M_n J_n; σ_n = √c_n ∂ℓ_n/∂z_n for a
drawn label, E[σ_n σ_nᵀ] = c_n M_n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from curvature.likelihood import Likelihood, OutputLikelihood, check_likelihood, output_likelihood
from curvature.loss_graph import LossGraph
from curvature.matrix_free.estimator import Memory
from curvature.matrix_free.gauss_newton import OutputSpaceEstimator, refuse_other_paths
from curvature.matrix_free.hessian import Mode, check_mode
from curvature.matrix_free.operator import summed
from curvature.matrix_free.snapshot import Snapshot
from curvature.problem import Problem
from curvature.protocols import HessianProduct, Needs, Observation, State
from curvature.registry import estimators
from curvature.vectors import compute_dtype


@dataclass(frozen=True)
class Fisher(OutputSpaceEstimator):
    """F = Σ_n c_n E_y[∇ℓ_n ∇ℓ_nᵀ], labels y from the model's own likelihood; positive semidefinite.

    For natural gradients and KL regions. The exact form is the Gauss-Newton matrix of a loss that is this likelihood's
    negative logarithm, which is checked on the loss itself; the weights c_n (reduction, class weights, masks) are the
    loss's own. With ``samples`` the expectation is the mean over drawn labels: unbiased, of relative error about
    1/√samples in each direction, and the same draws serve all products of one operator.

    Args:
        likelihood: ``"categorical"`` (softmax of logits), ``"bernoulli"`` (sigmoid of logits) or ``"gaussian"``
            (squared error).
        samples: draws K >= 1; ``None`` takes the expectation exactly.
        seed: of the draws.
        jvp: how J v is computed, see :class:`GaussNewton`.

    Raises:
        ValueError: from the first product, where the loss's curvature is not that of ``likelihood``.

    >>> from curvature import estimate
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> F = estimate(Fisher("gaussian"), model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
    >>> F.matvec([torch.tensor([[1.0, 1.0]])])
    [tensor([[1., 4.]])]

    Cost: a Gauss-Newton product; sampled, K passes over the outputs more, never one through the model.
    References: Martens 2020, arXiv 1412.1193; Kunstner et al. 2019, arXiv 1905.12558.
    """

    likelihood: Likelihood
    samples: int | None = None
    seed: int = 0
    jvp: Mode = "reverse"

    def __post_init__(self) -> None:
        check_mode(self.jvp, "jvp")
        check_likelihood(self.likelihood)
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be >= 1, or None for the exact Fisher, got {self.samples}")

    @property
    def needs(self) -> Needs:
        """The graph of the loss and of the outputs, for drawn labels too."""
        return Needs.GRAD | (Needs.GGN if self.samples is None else Needs.GGN | Needs.SAMPLED_LABELS)

    def init(self, params: Sequence[Tensor]) -> State:
        """The count of draws, so that no step repeats another's labels; nothing for the exact form."""
        return {} if self.samples is None else {"draws": 0}

    def loop_product(self, state: State, seen: Observation) -> HessianProduct:
        """Σ of the products of this step's losses, each with draws of its own."""
        if self.samples is None or self.jvp != "reverse" or not seen.graphs:
            return super().loop_product(state, seen)
        first = cast(int, state["draws"])
        state["draws"] = first + len(seen.graphs)
        return summed([self.graph_product(graph, {"index": first + i}) for i, graph in enumerate(seen.graphs)])

    def middle(self, graph: LossGraph, memory: Memory, u: Tensor) -> Tensor:
        """Diag(c_n M_n) u, or its mean over draws."""
        found = self.found(graph, memory)
        if self.samples is None:
            return graph.loss_hvp(u)  # proven to be c_n M_n
        wide = u.to(found.z.dtype)
        total = torch.zeros_like(wide)
        for sigma in self.draws(found, memory):
            along = sigma * wide
            if found.axis is not None:  # a softmax is one unit; elements of other likelihoods are independent
                along = along.sum(found.axis, keepdim=True)
            total.addcmul_(sigma, along, value=1.0 / self.samples)
        return total.to(u.dtype)

    def found(self, graph: LossGraph, memory: Memory) -> OutputLikelihood:
        """The weights c of this loss, measured once; the outputs are the graph's."""
        if "weights" not in memory:
            measured = output_likelihood(graph, self.likelihood)
            memory["axis"], memory["weights"] = measured.axis, measured.weights
        z = graph.output.detach()
        return OutputLikelihood(self.likelihood, memory["axis"], z.to(compute_dtype(z.dtype)), memory["weights"])

    def draws(self, found: OutputLikelihood, memory: Memory) -> Iterator[Tensor]:
        """σ for every draw, the same ones each time this is called."""
        samples = cast(int, self.samples)
        return (found.draw(self.seed, memory["index"] * samples + k) for k in range(samples))

    def snapshot(self, problem: Problem) -> Snapshot:
        """The problem as the products see it, if F is the curvature of all of its loss."""
        snapshot = super().snapshot(problem)
        refuse_other_paths(snapshot)
        return snapshot


estimators.add("fisher", Fisher)
