"""The empirical Fisher matrix by its products.

Legend: f = Σ_n c_n ℓ_n over samples n, g_n = ∇ℓ_n; r_n = ∂f/∂z_n at sample n's rows of the outputs, so that
c_n g_n = J_nᵀ r_n and Σ_n c_n g_n g_nᵀ v = Σ_n J_nᵀ r_n ⟨r_n, J_n v⟩ / c_n: no sample's gradient is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from curvature import loss_weights
from curvature.empirical_fisher import reciprocal
from curvature.likelihood import Likelihood, check_likelihood, output_likelihood
from curvature.loss_graph import LossGraph
from curvature.matrix_free.estimator import Memory
from curvature.matrix_free.gauss_newton import OutputSpaceEstimator, refuse_other_paths
from curvature.matrix_free.hessian import Mode, check_mode
from curvature.matrix_free.snapshot import Snapshot
from curvature.measured_weights import batch_size
from curvature.problem import Problem
from curvature.protocols import HessianProduct, Observation, State, Statistics
from curvature.registry import estimators
from curvature.sample_mixing import FirstInputs, first_axis_mixed, refuse_batch_statistics, refuse_per_sample
from curvature.side_effects import coupled_by_batch_norm


@dataclass(frozen=True)
class EmpiricalFisher(OutputSpaceEstimator):
    """Σ c_n g_n g_nᵀ, g_n the gradient of sample n's own loss with the label that it has; a sequence is one sample.

    Not a curvature: at a minimum of a model that fits its data it vanishes with the gradients. Choose :class:`Fisher`
    or :class:`GaussNewton` for that; this one serves comparisons and the covariance of gradients.

    Args:
        likelihood: what the loss is the negative logarithm of; in an optimizer, which sees the loss only as a number,
            c_n is read from its curvature (for ``"gaussian"`` a sample's own loss is the mean squared error).
            :func:`curvature.estimate` sees the loss function and needs no likelihood.
        jvp: how J v is computed, see :class:`GaussNewton`.
        model: the model, which is tried for a mixing of samples; needed in an optimizer, known to
            :func:`curvature.estimate`.

    Raises:
        ValueError: where the samples' weights cannot be known, or the model mixes samples, which is tried once on
            four of them; in an optimizer also without ``likelihood`` or ``model``.

    >>> import torch
    >>> from curvature import estimate
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(1.0)
    >>> x = torch.tensor([[1.0], [2.0]])  # g_n = 2 x_n², the residual being x_n
    >>> F = estimate(EmpiricalFisher(), model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
    >>> F.matvec([torch.tensor([[1.0]])])  # (2² + 8²) / 2
    [tensor([[34.]])]

    Cost: a Gauss-Newton product. Reference: Kunstner et al. 2019, arXiv 1905.12558.
    """

    likelihood: Likelihood | None = None
    jvp: Mode = "reverse"
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    first: FirstInputs | None = field(default=None, init=False, repr=False, compare=False)

    semidefinite = True

    def __post_init__(self) -> None:
        check_mode(self.jvp, "jvp")
        if self.likelihood is not None:
            check_likelihood(self.likelihood)
        if self.model is not None:
            object.__setattr__(self, "first", FirstInputs(self.model))

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """Nothing but the proof that each sample has a gradient of its own; products are taken in the step."""
        if self.model is None or self.first is None:
            raise ValueError(
                "EmpiricalFisher needs model= in an optimizer, to try whether it mixes samples: give model=model"
            )
        nothing = super().measure(state, graph)
        refuse_per_sample(self.first.verdict(), self.model)
        return nothing

    def snapshot(self, problem: Problem) -> Snapshot:
        """The problem as the products see it, if every sample has a loss of its own."""
        if (name := coupled_by_batch_norm(problem.model)) is not None:
            raise ValueError(
                f"batch norm {name!r} is in training mode, where a sample has no gradient of its own: call model.eval()"
            )
        snapshot = super().snapshot(problem)
        refuse_other_paths(snapshot)
        refuse_per_sample(first_axis_mixed(problem.model, [problem.batches[0][0]]), problem.model)
        return snapshot

    def memories(self, snapshot: Snapshot) -> list[Memory]:
        """1/c_n of every batch, from what its loss divides by."""
        problem = snapshot.problem
        memories: list[Memory] = []
        for batch in snapshot.batches:
            inputs, target = batch

            def outputs_of(batch: tuple[Any, Any] = batch) -> Any:
                return snapshot.evaluate(batch)[1]

            outputs = snapshot.within(snapshot.leaves(), outputs_of)
            count = samples_of(inputs, target)
            c = loss_weights.sample_weights(problem.loss_fn, outputs, target, problem.weight_fn, count)
            memories.append({"reciprocal": reciprocal(c)})
        return memories

    def loop_product(self, state: State, seen: Observation) -> HessianProduct:
        """Σ of the products of this step's losses."""
        if self.likelihood is None:
            raise ValueError(
                "EmpiricalFisher needs likelihood= in an optimizer, which sees the loss only as a number: give "
                "'categorical', 'bernoulli' or 'gaussian'"
            )
        return super().loop_product(state, seen)

    def middle(self, graph: LossGraph, memory: Memory, u: Tensor) -> Tensor:
        """r_n ⟨r_n, u_n⟩ / c_n at every sample n."""
        r = graph.output_gradient().detach()
        if "reciprocal" not in memory:
            assert self.likelihood is not None  # loop_product has asked for it
            refuse_batch_statistics(graph.output)
            found = output_likelihood(graph, self.likelihood)
            c = found.weights.flatten(1).sum(1) * (0.5 if self.likelihood == "gaussian" else 1.0)
            memory["reciprocal"] = reciprocal(c)
        per_sample: Tensor = memory["reciprocal"]
        count = per_sample.numel()
        if r.shape[0] % count != 0:
            raise ValueError(
                f"outputs must hold the {count} samples along dim 0, each by a whole number of rows, got shape "
                f"{tuple(r.shape)}"
            )
        rows = r.reshape(count, -1)
        along = (rows * u.reshape(count, -1)).sum(1)
        scaled = along * per_sample.to(r.device, r.dtype)
        return (rows * scaled[:, None]).reshape(r.shape)


def samples_of(inputs: Any, target: Any) -> int | None:
    """N by the model's inputs where the target holds a whole number of rows a sample, else by the target."""
    try:
        by_inputs, by_target = batch_size(inputs), batch_size(target)
    except ValueError:
        return None
    return by_inputs if by_target % by_inputs == 0 else None


estimators.add("empirical-fisher", EmpiricalFisher)
