"""The weights of a loss that does not say them, measured in the space of its outputs.

Legend: z_a, z_b the outputs of two batches, f(a), f(b) their losses, f(ab) the loss of the two
concatenated. If f is a mean with weights W, then ∂f(ab)/∂z_a = r ∂f(a)/∂z_a with one number r = W_a / (W_a
+ W_b) for all elements, and f(ab) = r f(a) + (1-r) f(b). If it is a sum, then r = 1 and f(ab) = f(a) +
f(b). Anything else is refused, so what is accepted is known, and not assumed. Only the loss is evaluated;
the model runs once a batch.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from curvature.problem import Problem

#: Elements of outputs and targets that a vectorised loss is given at a time.
SAMPLE_ELEMENTS = 1 << 22

REMEDY = "pass weight_fn(target), the total weight of a batch (unmasked tokens, or the sum of class weights)"


def tree_map(function: Callable[..., Any], *trees: Any) -> Any:
    """Apply ``function`` to the leaves of equally shaped dicts, lists, tuples and dataclasses."""
    first = trees[0]
    if isinstance(first, Mapping):
        mapped = {k: tree_map(function, *(t[k] for t in trees)) for k in first}
        return mapped if type(first) is dict else type(first)(**mapped)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(tree_map(function, *parts) for parts in zip(*trees, strict=True)))
    if isinstance(first, (list, tuple)):
        return type(first)(tree_map(function, *parts) for parts in zip(*trees, strict=True))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [f.name for f in dataclasses.fields(first)]
        return dataclasses.replace(
            first, **{k: tree_map(function, *(getattr(t, k) for t in trees)) for k in names}
        )
    return function(*trees)


def leaves(tree: Any) -> Iterator[Tensor]:
    """All tensors in a nest of dicts, lists, tuples and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for f in dataclasses.fields(tree):
            yield from leaves(getattr(tree, f.name))


def batch_size(tree: Any) -> int:
    """The common length of dim 0 of all tensors.

    >>> batch_size({"tokens": torch.zeros(4, 3), "mask": torch.zeros(4, 3)})
    4
    """
    sizes = {x.shape[0] for x in leaves(tree) if x.dim() > 0}
    if len(sizes) != 1:
        raise ValueError(
            f"the tensors of a batch must agree in dim 0, the samples; got the sizes {sorted(sizes)}"
        )
    return sizes.pop()


def rows(tree: Any, n: int, count: int) -> Any:
    """Sample ``n`` as a batch of one."""
    return tree_map(
        lambda x: x[n : n + 1] if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == count else x, tree
    )


def joined(a: Any, b: Any) -> Any:
    """Two batches as one: tensors concatenated along dim 0, everything else taken from the first."""

    def join(x: Any, y: Any) -> Any:
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() > 0:
            return torch.cat([x, y])
        return x

    return tree_map(join, a, b)


def leaf_copy(outputs: Any) -> Any:
    """The outputs cut from the model's graph; floating-point tensors in float32 or wider, requiring grad."""

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach()
        if not x.is_floating_point():
            return x
        return x.to(torch.promote_types(x.dtype, torch.float32), copy=True).requires_grad_()

    return tree_map(cut, outputs)


def value_and_gradient(
    loss_fn: Callable[[Any, Any], Tensor], outputs: Any, target: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss f and ∂f/∂z for every floating-point tensor of the outputs, in float64."""
    inputs = [x for x in leaves(outputs) if x.requires_grad]
    with torch.enable_grad():
        loss = loss_fn(outputs, target)
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on the model's outputs")
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return loss.detach().to(torch.float64), [g.to(torch.float64) for g in gradients]


def ratio(whole: Sequence[Tensor], own: Sequence[Tensor], tolerance: float) -> float:
    """The number r with whole = r · own in every element; NaN where own = 0 or is not finite.

    Raises:
        ValueError: where there is no such number.
    """
    x, y = torch.cat([a.reshape(-1) for a in whole]), torch.cat([b.reshape(-1) for b in own])
    square = float(y @ y)
    if not 0 < square < math.inf:
        return math.nan
    r = float(x @ y) / square
    if not float((x - r * y).abs().max()) <= tolerance * max(abs(r), 1e-30) * float(y.abs().max()):
        raise ValueError("not one ratio")
    return r


def tolerance_of(outputs: Any) -> float:
    """A thousand roundings of the coarsest dtype in which the loss is evaluated."""
    return 1e3 * max(torch.finfo(x.dtype).eps for x in leaves(outputs) if x.is_floating_point())


def refuse(why: str) -> ValueError:
    """The error that names ``weight_fn``."""
    return ValueError(
        f"the weight of this loss is not known, so several batches cannot be combined ({why}): {REMEDY}"
    )


def shares(problem: Problem) -> list[float]:
    """ω_b by comparing every batch with one reference batch.

    Raises:
        ValueError: naming ``weight_fn``, where the weights are not proven.
    """
    loss_fn = problem.loss_fn
    outputs, targets = [], [target for _, target in problem.batches]
    with torch.no_grad():
        for inputs, _ in problem.batches:
            outputs.append(problem.model(inputs))
    outputs = [leaf_copy(z) for z in outputs]
    tolerance = tolerance_of(outputs[0])
    alone = [value_and_gradient(loss_fn, z, y) for z, y in zip(outputs, targets, strict=True)]
    sizes = [
        sum(float(g.square().sum()) for g in gradients) if bool(torch.isfinite(value)) else -1.0
        for value, gradients in alone
    ]
    sizes = [s if math.isfinite(s) else -1.0 for s in sizes]
    a = max(range(len(sizes)), key=sizes.__getitem__)
    if sizes[a] <= 0:
        raise refuse("no batch has a gradient")
    relative = [1.0] * len(outputs)
    kinds = set()
    for b in range(len(outputs)):
        if b == a:
            continue
        try:
            whole = leaf_copy(joined(outputs[a], outputs[b]))
            value, gradients = value_and_gradient(loss_fn, whole, joined(targets[a], targets[b]))
        except (RuntimeError, ValueError, TypeError) as error:
            raise refuse(f"the loss of two batches as one failed: {error}") from error
        first = [g[: own.shape[0]] for g, own in zip(gradients, alone[a][1], strict=True)]
        second = [g[own.shape[0] :] for g, own in zip(gradients, alone[a][1], strict=True)]
        try:
            r_a, r_b = ratio(first, alone[a][1], tolerance), ratio(second, alone[b][1], tolerance)
        except ValueError as error:
            raise refuse("it is neither a weighted mean nor a sum over samples") from error
        kind, relative[b] = classify(r_a, r_b, value, alone[a][0], alone[b][0], tolerance)
        kinds.add(kind)
    if kinds - {"either"} == {"sum"}:
        return [1.0] * len(outputs)
    if len(kinds - {"either"}) > 1:
        raise refuse("it is neither a weighted mean nor a sum over samples")
    total = sum(relative)
    return [w / total for w in relative]


def check_shares(problem: Problem, shares: Sequence[float]) -> None:
    """Refuse given shares by which the loss of two batches as one is not the mean of their losses.

    Where such a batch cannot be formed (other lengths, a loss that the model computed itself) the shares are believed.

    Args:
        problem: the first two batches of positive weight are evaluated.
        shares: ω_b.
    """
    pair = [b for w, b in zip(shares, problem.batches, strict=True) if w > 0][:2]
    mine = [w for w in shares if w > 0][:2]
    if len(pair) < 2:
        return
    try:
        with torch.no_grad():
            outputs = [leaf_copy(problem.model(inputs)) for inputs, _ in pair]
        targets = [target for _, target in pair]
        whole = leaf_copy(joined(*outputs))
        value, gradients = value_and_gradient(problem.loss_fn, whole, joined(*targets))
        alone = [value_and_gradient(problem.loss_fn, z, y)[0] for z, y in zip(outputs, targets, strict=True)]
    except (RuntimeError, ValueError, TypeError):
        return
    sizes = [x.shape[:1] for x in leaves(outputs[0]) if x.requires_grad]
    unjoined = [
        bool((g != 0).any())
        for g, x, size in zip(gradients, (x for x in leaves(whole) if x.requires_grad), sizes, strict=True)
        if x.shape[:1] == size
    ]
    expected = (mine[0] * alone[0] + mine[1] * alone[1]) / sum(mine)
    near = 10 * tolerance_of(whole) * (abs(float(alone[0])) + abs(float(alone[1])))
    if any(unjoined) or not math.isfinite(float(expected)) or abs(float(value - expected)) <= near:
        return
    raise ValueError(
        f"the loss of two batches as one is {float(value):.6g}, but weight_fn makes it {float(expected):.6g}: the loss "
        "couples samples (a contrastive loss), or divides by another weight; pass one batch, or that weight"
    )


def check_samples(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, target: Any, c: Tensor) -> None:
    """Refuse given weights of samples by which a sample's part of the batch's gradient is not c_n times its own.

    Where a sample has no loss alone, the weights are believed.
    """
    try:
        z = leaf_copy(outputs)
        gradients = value_and_gradient(loss_fn, z, target)[1]
        owns = every_sample_at_once(loss_fn, z, target, len(c)) or sample_by_sample(
            loss_fn, z, target, len(c)
        )
    except (RuntimeError, ValueError, TypeError, IndexError):
        return
    for whole, own in zip(gradients, owns[1], strict=True):
        if whole.shape != own.shape or len(own) != len(c):
            return
        expected = own * c.to(own).reshape(-1, *[1] * (own.dim() - 1))
        wrong = (whole - expected).abs() > 10 * tolerance_of(z) * whole.abs().max()
        if bool((wrong & torch.isfinite(expected)).any()):
            raise ValueError(
                "weight_fn gives samples weights by which their losses do not make up the loss of the batch: the loss "
                "couples samples (a contrastive loss), or divides by another weight"
            )


def classify(
    r_a: float, r_b: float, whole: Tensor, a: Tensor, b: Tensor, tolerance: float
) -> tuple[str, float]:
    """("mean" or "sum", W_b / W_a) from the two ratios, checked against the three values of the loss."""
    near = 10 * tolerance
    scale = near * (float(a.abs()) + (float(b.abs()) if bool(torch.isfinite(b)) else 0.0))
    if not bool(torch.isfinite(b)):  # the mean over no weight at all
        if abs(r_a - 1) <= near and abs(float(whole - a)) <= scale:
            return "mean", 0.0
        raise refuse("one batch has no finite loss")
    if abs(r_a - 1) <= near and (math.isnan(r_b) or abs(r_b - 1) <= near):
        if abs(float(whole - a - b)) <= scale:
            if math.isnan(r_b) and float(b) == 0:
                return "either", 0.0  # adds nothing to a sum, and has no weight in a mean
            return "sum", 1.0
        if math.isnan(r_b) and abs(float(whole - a)) <= scale:
            return "mean", 0.0
    mixed = 0 < r_a < 1 and (math.isnan(r_b) or abs(r_a + r_b - 1) <= near)
    if mixed and abs(float(whole - r_a * a - (1 - r_a) * b)) <= scale:
        return "mean", (1 - r_a) / r_a
    raise refuse("it is neither a weighted mean nor a sum over samples")


def per_sample(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, target: Any) -> Tensor:
    """c_n: each sample's part of the batch's output gradient over that of the sample as a batch of one.

    A sample without a gradient has no say in Σ c_n g_n²; it gets the weight 0.

    Raises:
        ValueError: where the batch's loss is not Σ c_n times the losses of the samples alone.
    """
    z = leaf_copy(outputs)
    tolerance = tolerance_of(z)
    value, gradients = value_and_gradient(loss_fn, z, target)
    count = batch_size([target, *gradients])
    found = every_sample_at_once(loss_fn, z, target, count) or sample_by_sample(loss_fn, z, target, count)
    weights, owns = sample_ratios(gradients, *found, tolerance)
    rest = float(value)
    silent = unseen = False
    for n, (c, own) in enumerate(zip(weights, owns, strict=True)):
        if math.isnan(c):
            unseen = unseen or math.isfinite(own)
            silent = silent or (math.isfinite(own) and own != 0)
            weights[n] = 0.0
            if any(bool((g[n] != 0).any()) for g in gradients):
                raise refuse_samples()
        elif c != 0.0:
            rest -= c * own
    scale = 10 * tolerance * (float(value.abs()) + sum(abs(c) for c in weights))
    if not silent and abs(rest) > max(scale, 1e-30) * math.sqrt(count):
        raise refuse_samples()
    # A mean's weights sum to 1, a sum's are 1: a factor that depends on the outputs (a squared loss) does
    # neither.
    total, near = sum(weights), 10 * tolerance * count
    mean = abs(total - 1) <= near or (unseen and 0 < total < 1)
    if not (mean or all(c == 0 or abs(c - 1) <= near for c in weights)):
        raise refuse_samples()
    return torch.tensor(weights, dtype=torch.float64)


def sample_by_sample(
    loss_fn: Callable[[Any, Any], Tensor], z: Any, target: Any, count: int
) -> tuple[Tensor, list[Tensor]]:
    """The loss of every sample as a batch of one, (N,), and its gradients by the sample's outputs, (N, …).

    Raises:
        ValueError: where the loss cannot take a sample alone, as one that compares each with the others of its batch.
    """
    try:
        found = [
            value_and_gradient(loss_fn, leaf_copy(rows(z, n, count)), rows(target, n, count))
            for n in range(count)
        ]
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(
            "the loss takes the batch but no sample of it alone, so no sample has a gradient of its own: use a loss "
            f"that is a sum over samples, or curvature of the whole batch; on one sample it failed with {error}"
        ) from error
    stacked = [torch.cat(parts) for parts in zip(*(gradients for _, gradients in found), strict=True)]
    return torch.stack([own.reshape(()) for own, _ in found]), stacked


def every_sample_at_once(
    loss_fn: Callable[[Any, Any], Tensor], z: Any, target: Any, count: int
) -> tuple[Tensor, list[Tensor]] | None:
    """As :func:`sample_by_sample`, vectorised; ``None`` for a loss that cannot be (it reads values, or draws)."""
    given = [x for x in leaves([z, target]) if x.dim() > 0 and x.shape[0] == count]
    moving = {id(x): i for i, x in enumerate(given)}
    inputs = [moving.get(id(x)) for x in leaves(z) if x.requires_grad]
    if None in inputs or len(moving) != len(given):
        return None
    wanted = tuple(i for i in inputs if i is not None)

    def one(*own: Tensor) -> Tensor:
        def part(x: Any) -> Any:
            i = moving.get(id(x))
            return x if i is None else own[i].unsqueeze(0)

        return loss_fn(tree_map(part, z), tree_map(part, target)).reshape(())

    step = max(1, SAMPLE_ELEMENTS * count // max(1, sum(x.numel() for x in given)))
    try:
        both = torch.func.vmap(torch.func.grad_and_value(one, argnums=wanted), chunk_size=min(step, count))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap warns where it loops
            gradients, values = both(*(x.detach() for x in given))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, IndexError, KeyError):
        return None
    return values.detach().to(torch.float64), [g.detach().to(torch.float64) for g in gradients]


def sample_ratios(
    batch: Sequence[Tensor], values: Tensor, own: Sequence[Tensor], tolerance: float
) -> tuple[list[float], list[float]]:
    """Every sample's :func:`ratio`, and the values of their own losses, on the host in one transfer."""
    x, y = (torch.cat([g.reshape(len(values), -1) for g in side], 1) for side in (batch, own))
    square = (y * y).sum(1)
    r = (x * y).sum(1) / square
    error = (x - r.unsqueeze(1) * y).abs().amax(1)
    allowed = tolerance * r.abs().clamp(min=1e-30) * y.abs().amax(1)
    known = (square > 0) & (square < math.inf)
    if bool((known & ~(error <= allowed)).any()):
        raise refuse_samples()
    found: list[list[float]] = torch.stack([torch.where(known, r, math.nan), values.reshape(-1)]).tolist()
    return found[0], found[1]


def refuse_samples() -> ValueError:
    """The error for a loss that is not a weighted sum of its samples' losses."""
    return ValueError(
        "the weights of the samples in this loss are not known: it is not a weighted mean or sum of what "
        f"it gives for each sample alone; {REMEDY}, or use a loss of torch.nn"
    )
