"""One-shot use: the curvature of a model over batches, without an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from curvature.measured_functions import refuse_unproven_loss, refuse_unproven_model
from curvature.problem import Evaluation, Problem
from curvature.protocols import CurvatureEstimator, CurvatureOperator, Needs, Observation, State, Statistics
from curvature.side_effects import preserved


def estimate(
    estimator: CurvatureEstimator,
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    *,
    weight_fn: Callable[[Any], Any] | None = None,
) -> CurvatureOperator:
    """The curvature of ``loss_fn(model(inputs), target)`` at the present parameters, over ``batches``.

    Several batches give what the one concatenated batch would give, normalised by the loss's own total
    weight. No running mean: each batch counts by its share. ``.grad``, buffers, the training mode and the
    global random state are left as they are.

    Args:
        estimator: any curvature estimator; see :func:`optimizers.available`.
        model: called as ``model(inputs)``.
        loss_fn: called as ``loss_fn(outputs, target)``, gives a scalar.
        batches: ``(inputs, target)`` pairs: a list, a DataLoader, a generator.
        weight_fn: the total weight of a batch from its target, where the loss itself does not tell.

    Returns:
        B at the θ of this call; vectors follow ``model.parameters()`` that require grad, shared ones once.

    Raises:
        ValueError: for no batches, a frozen model, batches whose weights cannot be known, or a loss that reaches the
            parameters past the outputs where the curvature is taken at the outputs.

    >>> import torch
    >>> from curvature import HutchinsonDiagonal
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> B = estimate(HutchinsonDiagonal(), model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
    >>> B.diagonal()
    [tensor([[1., 4.]])]

    Cost: one forward pass and the estimator's ``measure`` a batch.
    """
    with preserved(model):
        return run(estimator, Problem(model, loss_fn, batches, weight_fn))


def run(estimator: CurvatureEstimator, problem: Problem) -> CurvatureOperator:
    """The estimator's own way to a one-shot estimate (``estimator.estimate``), or else the common one."""
    own = getattr(estimator, "estimate", None)
    if own is not None:  # matrix-free curvature keeps the problem itself in place of statistics
        operator: CurvatureOperator = own(problem)
        return operator
    return from_statistics(estimator, problem)


def from_statistics(
    estimator: CurvatureEstimator,
    problem: Problem,
    measure: Callable[[State, Evaluation], Statistics] | None = None,
) -> CurvatureOperator:
    """Sum the statistics of all batches, take them in one update, and ask for the operator.

    Args:
        estimator: gives ``init``, ``measure``, ``update`` and ``operator``.
        problem: the batches and their shares.
        measure: in place of the estimator's own, for one that uses the model, the inputs or the target.
    """
    state = estimator.init(problem.params)
    own = getattr(estimator, "measure", None)
    wants_gradient = measure is None and Needs.GRAD in estimator.needs
    statistics: Statistics = {}
    gradient: list[Tensor] | None = None
    loss: Tensor | None = None
    for number, evaluation in enumerate(problem.evaluations()):
        share, graph = evaluation.share, evaluation.graph
        if number == 0:
            check_derivatives(estimator, problem, evaluation)
        if wants_gradient:
            part = [share * g for g in graph.gradient()]
            gradient = part if gradient is None else [a.add_(g) for a, g in zip(gradient, part, strict=True)]
        if measure is not None:
            add_statistics(statistics, measure(state, evaluation), share)
        elif own is not None and estimator.needs.graph:
            add_statistics(statistics, own(state, graph), share)
        value = share * graph.loss.detach()
        loss = value if loss is None else loss + value
    if gradient is None:
        gradient = [p.new_zeros(()).expand(p.shape) for p in problem.params]
    estimator.update(state, Observation(gradient, loss, None, statistics, (), problem.params))
    return estimator.operator(state)


def check_derivatives(estimator: CurvatureEstimator, problem: Problem, evaluation: Evaluation) -> None:
    """Refuse a loss whose curvature would be another than what is asked for.

    Where it is taken at the outputs, the loss must reach the parameters through them alone; custom functions that are
    differentiated twice must have that derivative.
    """
    graph = evaluation.graph
    if estimator.needs.outputs:
        _ = graph.output  # which refuses a loss with a part beside it
        refuse_unproven_loss(problem, graph, evaluation.target)
    if Needs.HVP in estimator.needs:
        refuse_unproven_model(problem, graph, (evaluation.inputs, evaluation.target))


def add_statistics(into: Statistics, part: Statistics, share: float | Tensor = 1.0) -> None:
    """Take share · part, whose tensors may become the sum's, into a sum: statistics are additive in the loss."""
    whole = not isinstance(share, Tensor) and share == 1.0  # all of it: no copies
    for key, value in part.items():
        if isinstance(value, list):
            scaled: Tensor | list[Tensor] = value if whole else [share * x for x in value]
        else:
            scaled = value if whole else share * value
        held = into.get(key)
        if held is None:
            into[key] = scaled
        elif isinstance(held, list):
            for a, b in zip(held, scaled, strict=True):
                a.add_(b)
        else:
            held.add_(scaled)  # type: ignore[arg-type]
