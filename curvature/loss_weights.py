"""By how much a batch, and a sample in it, counts: the weights that a loss divides by.

Legend: ω_b the share of batch b in the loss of all batches as if they were one, f = Σ ω_b f_b; w the weight
of one element of the target (an unmasked token, a class weight), W_b = Σ w over batch b; c_n the weight of
sample n in its batch's loss, f_b = Σ c_n ℓ_n with ℓ_n the sample's own loss.

A weight is known in one of three ways: ``weight_fn`` gives it, the loss is one of PyTorch's and says so, or
it is measured (:mod:`curvature.measured_weights`) and the measurement proves itself.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import measured_weights

if TYPE_CHECKING:
    from curvature.problem import Problem


@dataclass(frozen=True)
class Reduction:
    """How a loss combines the elements of a target.

    Args:
        kind: ``"mean"`` divides by the sum of ``weights``, ``"sum"`` by nothing.
        weights: w of every element, with the samples along dim 0.
    """

    kind: Literal["mean", "sum"]
    weights: Tensor

    def total(self) -> float:
        """W."""
        return float(self.weights.sum())

    def per_sample(self, count: int | None = None) -> Tensor:
        """c_n, one a sample; ``count`` samples where a sequence's positions were flattened into dim 0.

        For a mean, the sample's part of W. For a sum, a sample's own loss is the sum over its elements, and
        c_n the mean weight of those that count: 1 unless there are class weights.
        """
        w = self.weights.reshape(count or self.weights.shape[0], -1)
        if self.kind == "mean":
            return w.sum(1) / w.sum()
        return w.sum(1) / (w != 0).sum(1).clamp(min=1)


def batch_shares(problem: Problem, weight_fn: Callable[[Any], Any] | None) -> Sequence[float]:
    """ω_b for every batch of ``problem``: W_b / Σ W for a weighted mean, 1 for a sum.

    A batch of total weight 0 (everything masked) has the share 0.

    Raises:
        ValueError: where the loss does not tell its weight and ``weight_fn`` was not given, or contradicts
            it, or where the loss of two batches as one is not the mean of theirs.
    """
    known = [known_reduction(problem.loss_fn, target) for _, target in problem.batches]
    if weight_fn is not None:
        weights = [given_weight(weight_fn, target) for _, target in problem.batches]
        check_given(weights, known)
        shares = normalised(weights)
        if known[0] is None:
            measured_weights.check_shares(problem, shares)
        return shares
    if len(problem.batches) == 1:
        if known[0] is not None and known[0].kind == "mean" and known[0].total() == 0:
            raise ValueError("the total weight of the batch is 0: every target in it is masked")
        return [1.0]
    found = [k for k in known if k is not None]
    if len(found) == len(known):
        if found[0].kind == "sum":
            return [1.0] * len(known)
        return normalised([k.total() for k in found])
    return measured_weights.shares(problem)


def given_weight(weight_fn: Callable[[Any], Any], target: Any) -> float:
    """W_b as the caller gives it: a number, or a tensor of weights to sum."""
    given = weight_fn(target)
    weight = float(given.sum()) if isinstance(given, Tensor) else float(given)
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight_fn must give a finite weight >= 0, got {weight}")
    return weight


def check_given(weights: Sequence[float], known: Sequence[Reduction | None]) -> None:
    """Refuse a ``weight_fn`` that contradicts what PyTorch's own loss divides by."""
    if any(k is None for k in known) or len(known) == 1:
        return
    found = [k for k in known if k is not None]
    if found[0].kind == "sum":
        raise ValueError(
            "weight_fn must be left out for a loss with reduction='sum': it divides by no weight"
        )
    for ours, theirs in zip(normalised([k.total() for k in found]), normalised(weights), strict=True):
        if not math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=1e-12):
            raise ValueError(
                f"weight_fn gives a batch the share {theirs:.6g}, but this loss divides by weights "
                f"that give it {ours:.6g}: leave weight_fn out, this loss is known"
            )


def normalised(weights: Sequence[float]) -> list[float]:
    """W_b / Σ W."""
    total = sum(weights)
    if not 0 < total < math.inf:
        raise ValueError(
            f"the total weight over all batches must be > 0, got {total}: is every target masked?"
        )
    return [w / total for w in weights]


def sample_weights(
    loss_fn: Callable[[Any, Any], Tensor],
    outputs: Any,
    target: Any,
    weight_fn: Callable[[Any], Any] | None = None,
    count: int | None = None,
) -> Tensor:
    """c_n of every sample in the loss of this batch; 0 for a masked one.

    Args:
        loss_fn: ``loss_fn(outputs, target)``.
        outputs: of the model.
        target: the batch's.
        weight_fn: the weight of a target, for a mean that is not known.
        count: N, where the target holds a whole number of rows a sample (positions flattened into dim 0).

    Raises:
        ValueError: where the loss is neither known nor a weighted sum of the samples' own losses.
    """
    known = known_reduction(loss_fn, target)
    if known is not None:
        return known.per_sample(count)
    if weight_fn is not None:
        size = measured_weights.batch_size(target)
        weights = [given_weight(weight_fn, measured_weights.rows(target, n, size)) for n in range(size)]
        c = torch.tensor(normalised(weights), dtype=torch.float64)
        measured_weights.check_samples(loss_fn, outputs, target, c)
    else:
        c = measured_weights.per_sample(loss_fn, outputs, target)
    if count is None or count == c.numel():
        return c
    if abs(float(c.sum()) - 1) > 1e-6:
        raise ValueError(
            "a sum over positions that are flattened into dim 0 has no known sample: keep the samples in dim 0"
        )
    return c.reshape(count, -1).sum(1)


# PyTorch's losses by what their mean divides by: every element, every row, or the weights of the classes.
BY_ELEMENT: dict[Any, Callable[..., Tensor]] = {
    nn.MSELoss: functional.mse_loss,
    nn.L1Loss: functional.l1_loss,
    nn.SmoothL1Loss: functional.smooth_l1_loss,
    nn.HuberLoss: functional.huber_loss,
    nn.BCELoss: functional.binary_cross_entropy,
    nn.BCEWithLogitsLoss: functional.binary_cross_entropy_with_logits,
    nn.PoissonNLLLoss: functional.poisson_nll_loss,
    nn.KLDivLoss: functional.kl_div,
    nn.SoftMarginLoss: functional.soft_margin_loss,
}
BY_ROW: dict[Any, Callable[..., Tensor]] = {
    nn.MultiMarginLoss: functional.multi_margin_loss,
    nn.MultiLabelSoftMarginLoss: functional.multilabel_soft_margin_loss,
    nn.MultiLabelMarginLoss: functional.multilabel_margin_loss,
}
BY_CLASS: dict[Any, Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: functional.cross_entropy,
    nn.NLLLoss: functional.nll_loss,
}
KNOWN = BY_ELEMENT | BY_ROW | BY_CLASS


def known_loss(loss_fn: Any) -> tuple[Callable[..., Tensor], dict[str, Any]] | None:
    """(function, options) of a loss that is PyTorch's own: a module, a function, or a partial of one.

    >>> known_loss(nn.CrossEntropyLoss(ignore_index=0))[1]["ignore_index"]
    0
    >>> known_loss(lambda outputs, target: outputs.sum()) is None
    True
    """
    if type(loss_fn) in KNOWN:  # not a subclass: its forward may be anything
        names = ("weight", "ignore_index", "reduction")
        return KNOWN[type(loss_fn)], {k: getattr(loss_fn, k) for k in names if hasattr(loss_fn, k)}
    function: Any = loss_fn
    args: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    if isinstance(loss_fn, functools.partial):
        function, args, keywords = loss_fn.func, loss_fn.args, loss_fn.keywords
        if type(function) in KNOWN:
            return known_loss(function) if not args and not keywords else None
    if args or not any(function is f for f in KNOWN.values()):
        return None
    bound = inspect.signature(function).bind_partial(**keywords)
    bound.apply_defaults()
    options = dict(bound.arguments)
    if options.get("size_average") is not None or options.get("reduce") is not None:
        return None
    return function, options


def known_reduction(loss_fn: Any, target: Any) -> Reduction | None:
    """The weights of the elements of ``target`` under a loss that is PyTorch's own, or None."""
    known = known_loss(loss_fn)
    if known is None or not isinstance(target, Tensor):
        return None
    function, options = known
    kind = options["reduction"]
    if any(function is f for f in BY_ELEMENT.values()):
        if kind == "batchmean":
            return Reduction("mean", torch.ones(target.shape[:1], dtype=torch.float64))
        weights = torch.ones((), dtype=torch.float64, device=target.device).expand(target.shape)
    elif any(function is f for f in BY_ROW.values()):
        weights = torch.ones(target.shape[:1], dtype=torch.float64, device=target.device)
    elif target.is_floating_point():  # class probabilities, (N, C, …): the mean is over positions, unweighted
        shape = target.shape[:1] + target.shape[2:] if target.dim() > 1 else torch.Size([1])
        weights = torch.ones(shape, dtype=torch.float64, device=target.device)
    else:
        counted = target != options["ignore_index"]
        weights = counted.to(torch.float64)
        if options.get("weight") is not None:
            weight = options["weight"].to(torch.float64)
            weights = weights * weight[torch.where(counted, target, 0)]
    if kind not in ("mean", "sum"):
        return None
    return Reduction(kind, weights.reshape(1) if weights.dim() == 0 else weights)


def check_broadcast(loss_fn: Any, outputs: Any, target: Any) -> None:
    """Refuse outputs and target that an elementwise loss would broadcast: the weights are then unknown."""
    known = known_loss(loss_fn)
    if known is None or not any(known[0] is f for f in BY_ELEMENT.values()):
        return
    if isinstance(outputs, Tensor) and isinstance(target, Tensor) and outputs.shape != target.shape:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} and target of shape {tuple(target.shape)} would "
            "broadcast in this loss: give both the same shape"
        )
