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

    Cost: a Gauss-Newton product; sampled, once K passes over the outputs, never one more through the model.
    References: Martens 2020, arXiv 1412.1193; Kunstner et al. 2019, arXiv 1905.12558.
    """

    likelihood: Likelihood
    samples: int | None = None
    seed: int = 0
    jvp: Mode = "reverse"

    semidefinite = True

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
        """Σ of the products of this step's losses; a sample draws by its number in the step's whole batch."""
        if self.samples is None or self.jvp != "reverse" or not seen.graphs:
            return super().loop_product(state, seen)
        index, first, products = cast(int, state["draws"]), 0, []
        state["draws"] = index + 1
        for graph in seen.graphs:
            products.append(self.graph_product(graph, {"index": index, "first": first}))
            first += graph.output.shape[0] if graph.output.dim() else 1
        return summed(products)

    def middle(self, graph: LossGraph, memory: Memory, u: Tensor) -> Tensor:
        """Diag(c_n M_n) u, with the mean over draws in the place of M_n where it is sampled."""
        if self.samples is None:
            if "proven" not in memory:
                output_likelihood(graph, self.likelihood)
                memory["proven"] = True
            return graph.loss_hvp(u)
        if "sampled" not in memory:
            found = output_likelihood(graph, self.likelihood)
            first = memory["index"] * self.samples
            number = memory.get("first", 0)
            draws = (found.draw(self.seed, first + k, number) for k in range(self.samples))
            memory["sampled"] = SampledOutputFisher.from_draws(found, draws, self.samples)
        sampled: SampledOutputFisher = memory["sampled"]
        return sampled.product(u.to(sampled.moment.dtype)).to(u.dtype)

    def snapshot(self, problem: Problem) -> Snapshot:
        """The problem as the products see it, if F is the curvature of all of its loss."""
        snapshot = super().snapshot(problem)
        refuse_other_paths(snapshot)
        return snapshot


@dataclass(frozen=True)
class SampledOutputFisher:
    """c_n times the mean of s sᵀ over draws of one unit's score s, in memory of the size of the outputs.

    A softmax is one unit: s = p - e_y, so the mean of s sᵀ is known from how often each label was drawn. Elements of
    the other likelihoods are units of their own, and need the mean of s².

    Args:
        axis: of the classes, or ``None``.
        probabilities: p, shaped like z; nothing where ``axis`` is ``None``.
        moment: the frequencies q of the labels, or the mean of s², shaped like z.
        weights: c, of size 1 along ``axis``.
    """

    axis: int | None
    probabilities: Tensor | None
    moment: Tensor
    weights: Tensor

    @classmethod
    def from_draws(
        cls, found: OutputLikelihood, draws: Iterator[Tensor], samples: int
    ) -> SampledOutputFisher:
        """From σ = √c s of every draw; where c = 0 it does not matter."""
        floor = torch.finfo(found.weights.dtype).tiny
        inverse_root = torch.where(found.weights > 0, found.weights.clamp(min=floor).rsqrt(), 0.0)
        moment = torch.zeros_like(found.z)
        for sigma in draws:
            score = sigma * inverse_root
            moment.add_(score if found.axis is not None else score.square(), alpha=1.0 / samples)
        if found.axis is None:
            return cls(None, None, moment, found.weights)
        p = torch.softmax(found.z, found.axis)
        return cls(found.axis, p, p - moment, found.weights)

    def product(self, u: Tensor) -> Tensor:
        """c (p pᵀ - p qᵀ - q pᵀ + diag(q)) u, or c s² u."""
        if self.axis is None or self.probabilities is None:
            return self.weights * self.moment * u
        p, q = self.probabilities, self.moment
        by_p, by_q = (p * u).sum(self.axis, keepdim=True), (q * u).sum(self.axis, keepdim=True)
        return self.weights * (p * (by_p - by_q) - q * by_p + q * u)


estimators.add("fisher", Fisher)
