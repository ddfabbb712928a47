"""The empirical Fisher diagonal: running means of squared gradients, what Adam and SOAA are built on.

Legend: g the batch gradient, g_n the gradient of sample n's own loss, c_n its weight in the batch loss
(1/N for a mean), u_n = c_n g_n its share of the batch gradient, v the running mean, t the updates seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from curvature import loss_weights, vectors
from curvature.layer_io import Recorder
from curvature.likelihood import Likelihood, check_likelihood, output_likelihood
from curvature.loss_graph import LossGraph
from curvature.measured_weights import batch_size
from curvature.operators import DiagonalOperator
from curvature.per_sample import PerSample, first_sample_alone, recorder_for, refuse_coupled
from curvature.protocols import CurvatureOperator, Estimator, Needs, Observation, State, Statistics
from curvature.registry import estimators
from curvature.running_mean import bias_corrected, check_beta
from curvature.sample_mixing import FirstInputs, first_axis_mixed, refuse_per_sample

if TYPE_CHECKING:
    from curvature.problem import Evaluation, Problem


@dataclass(frozen=True)
class EmpiricalFisherDiagonal(Estimator):
    """diag(E[g gᵀ]) by a running mean of squared gradients, bias-corrected.

    The cheapest curvature there is, and the one of Adam and SOAA. With ``samples="batch"`` the square is taken of
    the batch gradient, which mixes the samples' gradients before squaring; ``samples="per_sample"`` is the empirical
    Fisher proper, Σ c_n g_n² = Σ u_n² / c_n: class weights count once, a masked sample not at all, and a sequence is
    one sample. For a mean, c_n is the sample's part of the total weight; for a sum it is the mean weight of the
    sample's elements (1 without class weights), and the sample's own loss the sum over them.

    Args:
        beta: decay of the running mean, in [0, 1); 0 keeps only the last batch.
        samples: what is squared: the ``"batch"`` gradient, or the ``"per_sample"`` gradients.
        model: the model, whose layers are watched; ``samples="per_sample"`` needs it in an optimizer.
        likelihood: what the loss is the negative logarithm of. In an optimizer, which sees the loss only as a number,
            ``samples="per_sample"`` reads c_n from the loss's curvature: the sum of the weights of the sample's units
            (half of it for ``"gaussian"``, where a sample's own loss is the mean squared error).

    Raises:
        ValueError: per sample, on the first measurement, where the model mixes the samples of a batch (tried once, on
            four of them), or the samples' weights cannot be known.

    >>> estimator = EmpiricalFisherDiagonal(beta=0.9)
    >>> state = estimator.init([torch.zeros(2)])
    >>> estimator.update(state, Observation(gradient=[torch.tensor([1.0, -2.0])]))
    >>> estimator.operator(state).diagonal()
    [tensor([1., 4.])]

    Cost: O(P) time, 4 bytes a float32 parameter of state; per sample, one backward pass more and the layers' squares.
    References: Kingma & Ba 2015, arXiv 1412.6980; Kunstner et al. 2019, arXiv 1905.12558 (its limits).
    """

    beta: float = 0.999
    samples: Literal["batch", "per_sample"] = "batch"

    shardable = True
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    likelihood: Likelihood | None = None
    recorder: Recorder | None = field(default=None, init=False, repr=False, compare=False)
    first: FirstInputs | None = field(default=None, init=False, repr=False, compare=False)

    semidefinite = True

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.samples not in ("batch", "per_sample"):
            raise ValueError(f"samples must be 'batch' or 'per_sample', got {self.samples!r}")
        if self.likelihood is not None:
            check_likelihood(self.likelihood)
        if self.model is not None and self.samples == "per_sample":
            object.__setattr__(self, "recorder", recorder_for(self.model))
            object.__setattr__(self, "first", FirstInputs(self.model))

    @property
    def needs(self) -> Needs:
        """Gradients; of every sample with ``samples="per_sample"``."""
        if self.samples == "batch":
            return Needs.GRAD
        return Needs.GRAD | Needs.PER_SAMPLE_GRAD | Needs.LAYER_IO | Needs.GGN

    @property
    def tracks_second_moment(self) -> bool:  # type: ignore[override]
        """The batch form is the second moment itself."""
        return self.samples == "batch"

    def init(self, params: Sequence[Tensor]) -> State:
        """v = 0 and t = 0 for every parameter."""
        return {
            "second_moment": vectors.zeros_like(params),
            "count": [vectors.scalar_like([p]) for p in params],
        }

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """Σ u_n² / c_n, with c_n read from the loss's curvature."""
        if self.samples == "batch":
            return {}
        for name, value in (("model", self.model), ("likelihood", self.likelihood)):
            if value is None:
                raise ValueError(
                    f"EmpiricalFisherDiagonal(samples='per_sample') needs {name}= in an optimizer, which sees "
                    "neither the layers nor the samples' weights: give model=model and likelihood='categorical', "
                    "'bernoulli' or 'gaussian'"
                )
        model, likelihood = cast(nn.Module, self.model), cast(Likelihood, self.likelihood)
        refuse_coupled(model)
        refuse_per_sample(cast(FirstInputs, self.first).verdict(), model)
        found = output_likelihood(graph, likelihood, verify=False)
        c = found.weights.flatten(1).sum(1) * (0.5 if likelihood == "gaussian" else 1.0)
        count = found.z.shape[0]
        samples = PerSample(graph, model, cast(Recorder, self.recorder), count, graph.loss)
        return {"squares": samples.squares(reciprocal(c))}

    def estimate(self, problem: Problem) -> CurvatureOperator:
        """The one-shot estimate: the model is the problem's, and c_n what its loss divides by."""
        from curvature.estimate import from_statistics

        if self.samples == "batch":
            return from_statistics(self, problem)
        refuse_coupled(problem.model)
        recorder = recorder_for(problem.model)
        total: list[Tensor] | None = None
        for seen in problem.evaluations():
            if total is None:
                _ = seen.graph.output  # which refuses a loss with a part beside it
                refuse_per_sample(first_axis_mixed(problem.model, [seen.inputs]), problem.model)
            count = samples_of(seen)
            c = loss_weights.sample_weights(
                problem.loss_fn, seen.outputs, seen.target, problem.weight_fn, count
            )
            recorder.enabled = False
            alone = first_sample_alone(problem.model, seen.inputs, seen.outputs, c.numel())
            recorder.enabled = True
            samples = PerSample(seen.graph, problem.model, recorder, c.numel(), seen.graph.loss, alone)
            squares = samples.squares(reciprocal(c))
            total = accumulated(total, squares, float(seen.share))
        assert total is not None  # a problem has at least one batch of positive weight
        return DiagonalOperator(total)

    def update(self, state: State, seen: Observation) -> None:
        """v ← β v + (1-β) g²."""
        second_moment = cast("list[Tensor]", state["second_moment"])
        count = cast("list[Tensor]", state["count"])
        live = [i for i, g in enumerate(seen.gradient) if g is not None]
        if self.samples == "per_sample":
            squares = cast("list[Tensor]", seen.statistics["squares"])
            torch._foreach_lerp_(
                [second_moment[i] for i in live], [squares[i] for i in live], 1.0 - self.beta
            )
        else:
            v = [second_moment[i] for i in live]
            g = [cast(Tensor, seen.gradient[i]).to(second_moment[i].dtype) for i in live]
            torch._foreach_mul_(v, self.beta)
            torch._foreach_addcmul_(v, g, g, 1.0 - self.beta)
        if live:
            torch._foreach_add_([count[i] for i in live], 1.0)

    def operator(self, state: State) -> DiagonalOperator:
        """diag(v / (1 - βᵗ))."""
        return DiagonalOperator(bias_corrected(state["second_moment"], state["count"], self.beta))  # type: ignore[arg-type]


def accumulated(total: list[Tensor] | None, part: list[Tensor], share: float) -> list[Tensor]:
    """Total + share · part, in place of ``part``'s or ``total``'s memory."""
    if total is None:
        return part if share == 1.0 else [x.mul_(share) for x in part]
    return [t.add_(x, alpha=share) for t, x in zip(total, part, strict=True)]


def reciprocal(c: Tensor) -> Tensor:
    """1/c, and 0 where c = 0: a masked sample has no share that could be divided."""
    if bool((c < 0).any()):
        raise ValueError(
            "the loss gives some sample a negative weight, so Σ c_n g_n g_nᵀ is no Fisher matrix"
        )
    return torch.where(c > 0, 1.0 / c.clamp(min=torch.finfo(c.dtype).tiny), 0.0)


def samples_of(seen: Evaluation) -> int | None:
    """N by the model's inputs where the target holds a whole number of rows a sample, else by the target."""
    try:
        by_inputs, by_target = batch_size(seen.inputs), batch_size(seen.target)
    except ValueError:
        return None
    return by_inputs if by_target % by_inputs == 0 else None


estimators.add("empirical-fisher-diagonal", EmpiricalFisherDiagonal)
