"""Whether one row of a model's outputs depends on another sample's inputs: tried on the model itself.

Legend: N samples along an axis of the inputs; S a set of them, R the rest.

The samples of S are given the inputs of samples of R. The outputs of R must stay as they are, with the same random
numbers and buffers in both evaluations. The sets are the bits of the samples' numbers and their complements, so that
every ordered pair of samples is apart once. Nothing changes its shape: dropout masks stay with their rows, and a
model that sorts rows by their values (a router, padding to the longest) is only asked for the same values as before.
Four samples of a batch are tried, or all where the model takes no fewer; a model that keeps them apart is remembered.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from curvature.measured_weights import joined, leaves, tree_map
from curvature.outputs import output_tensor
from curvature.side_effects import own_buffers, same_random_numbers

#: What was found to be apart, by model.
_apart: weakref.WeakKeyDictionary[nn.Module, set[Hashable]] = weakref.WeakKeyDictionary()

#: Samples of a batch that are tried.
TRIED = 4

Verdict: TypeAlias = str
"""``"apart"``: no row depends on another sample; ``"mixed"``: one does; ``"second"``: of what lies along axis 1 of the
outputs none does, of what lies along axis 0 one does, or nobody can say; anything else: why nobody can say."""

FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


def samples_mixed(
    model: nn.Module,
    args: Sequence[Any],
    keywords: Mapping[str, Any] | None = None,
    axis: int = 0,
    out_axes: Sequence[int] = (0,),
) -> Verdict:
    """Whether the model mixes the samples of its inputs; a model that draws random numbers draws the same ones.

    Args:
        model: called as ``model(*args, **keywords)``, without a graph and without a trace.
        args: positional inputs of one batch, nested as the model takes them.
        keywords: inputs by name.
        axis: where the samples lie in the inputs.
        out_axes: where they may lie in the outputs, each in an equal run.

    Returns:
        ``"apart"`` where no row depends on another sample, ``"mixed"`` where one does, else why nobody can say.

    >>> x = torch.arange(6.0).reshape(3, 2)
    >>> samples_mixed(nn.Softmax(1), [x]), samples_mixed(nn.Softmax(0), [x])
    ('apart', 'mixed')

    Cost: once for every model, mode and kind of inputs, five forward passes of four samples.
    """
    inputs = (tuple(args), dict(keywords or {}))
    count = sample_count(inputs, axis)
    if count is None:
        return "its inputs hold no tensors with such an axis"
    if count == 1:
        return "apart"
    known = _apart.setdefault(model, set())
    modes = tuple((type(m), m.training) for m in model.modules())
    key = (axis, tuple(out_axes), modes, tuple((x.dtype, x.dim()) for x in leaves(inputs)))
    if key in known:
        return "apart"
    verdict: Verdict = "its samples could not be tried"
    for size in dict.fromkeys((min(count, TRIED), count)):
        trial = Trial(model, inputs, axis, count, size, tuple(out_axes))
        try:
            verdict = trial.verdict()
        except FAILURES as error:
            verdict = f"{type(error).__name__} when it was called with {size} samples: {error}".split("\n")[0]
            continue
        break
    if verdict == "apart":
        known.add(key)
    return verdict


def sample_count(inputs: Any, axis: int) -> int | None:
    """N: the length that most of the tensors with that axis have, where it is not 1."""
    lengths = [x.shape[axis] for x in leaves(inputs) if x.dim() > axis]
    return max(lengths, key=lambda n: (n > 1, lengths.count(n)), default=None)


def take(inputs: Any, axis: int, count: int, index: Tensor) -> Any:
    """The samples ``index``, in this order, in every tensor that holds ``count`` of them."""

    def of(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() > axis and x.shape[axis] == count:
            return x.index_select(axis, index.to(x.device))
        return x

    return tree_map(of, inputs)


@dataclass(frozen=True)
class Trial:
    """One model, and the first ``size`` of ``count`` samples of one batch."""

    model: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    axis: int
    count: int
    size: int
    out_axes: tuple[int, ...]

    def verdict(self) -> Verdict:
        """With dropout switched off where random numbers may have changed their rows."""
        found, draws = self._compared(quiet=False)
        if found == "mixed" and draws:
            found, draws = self._compared(quiet=True)
            if found == "mixed" and draws:
                return "it draws random numbers, and may give a row others where the other rows change"
        return found

    def _compared(self, quiet: bool) -> tuple[Verdict, bool]:
        """(verdict, whether the model draws random numbers)."""
        everyone = torch.arange(self.size)
        before, drew = self._outputs(everyone, quiet)
        left = [axis for axis in self.out_axes if self._rows(before, axis)]
        if not left:
            return f"its outputs do not hold the {self.size} samples along an axis", drew
        for some in splits(self.size):
            rest = some.logical_not().nonzero().squeeze(1)
            index = everyone.clone()
            index[some] = rest.repeat(self.size)[: int(some.sum())]
            after, _ = self._outputs(index, quiet)
            if [x.shape for x in after] != [x.shape for x in before]:
                return "the shapes of its outputs depend on values", drew
            lost = [
                axis for axis in left if _differs(self._rows(before, axis), self._rows(after, axis), rest)
            ]
            left = [axis for axis in left if axis not in lost]
            if left:
                continue
            again, _ = self._outputs(everyone, quiet)
            if any(_differs(self._rows(before, axis), self._rows(again, axis), everyone) for axis in lost):
                return "two evaluations of it with the same random numbers differ", drew
            return "mixed", drew
        return "apart", drew

    def _outputs(self, index: Tensor, quiet: bool) -> tuple[list[Tensor], bool]:
        """The outputs for these samples in this order, and whether random numbers were drawn."""
        args, keywords = take(self.inputs, self.axis, self.count, index)
        with ExitStack() as stack:
            stack.enter_context(same_random_numbers(self.model))
            stack.enter_context(own_buffers(self.model))
            stack.enter_context(torch.no_grad())
            if quiet:
                stack.enter_context(_NoDropout())
            states = _random_states(self.model)
            outputs = self.model(*args, **keywords)
            now = _random_states(self.model)
        drew = any(not torch.equal(a, b) for a, b in zip(states, now, strict=True))
        return [z.detach() for z in _of_interest(outputs) if z.is_floating_point()], drew

    def _rows(self, outputs: Sequence[Tensor], axis: int) -> list[Tensor]:
        """Those of the outputs that may hold the samples along ``axis``, as (samples, …)."""
        return [
            z.movedim(axis, 0).reshape(self.size, -1)
            for z in outputs
            if z.dim() > axis and z.shape[axis] > 0 and z.shape[axis] % self.size == 0
        ]


def splits(count: int) -> Iterator[Tensor]:
    """Sets of samples, as masks: every bit of their numbers and its complement.

    >>> [s.tolist() for s in splits(2)]
    [[False, True], [True, False]]
    """
    numbers = torch.arange(count)
    for bit in range((count - 1).bit_length()):
        one = (numbers >> bit & 1).bool()
        yield one
        yield one.logical_not()


def _of_interest(outputs: Any) -> list[Tensor]:
    """The one tensor through which the loss is computed where it has a name, or else all."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return [output_tensor(outputs)]
    return list(leaves(outputs))


def _differs(before: Sequence[Tensor], after: Sequence[Tensor], which: Tensor) -> bool:
    """Whether some sample of ``which`` has other outputs, by more than rounding in another order gives."""
    for a, b in zip(before, after, strict=True):
        rows = which.to(a.device)
        mine, theirs = a[rows], b[rows]
        finite = torch.isfinite(mine)
        if not torch.equal(finite, torch.isfinite(theirs)):
            return True
        mine, theirs = (torch.where(finite, x, 0.0).to(torch.float64) for x in (mine, theirs))
        if bool((mine - theirs).abs().max() > 5 * torch.finfo(a.dtype).eps ** 0.6 * mine.abs().max()):
            return True
    return False


def _random_states(model: nn.Module) -> list[Tensor]:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in sorted(devices, key=str))]


class _NoDropout(TorchFunctionMode):
    """Inside, the dropout of :mod:`torch.nn.functional` and of its attention lets everything pass."""

    plain: ClassVar[set[Any]] = {
        functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d,
        functional.alpha_dropout, functional.feature_alpha_dropout, torch.dropout,
    }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.plain:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        return func(*args, **kwargs)


def first_axis_mixed(
    model: nn.Module, args: Sequence[Any], keywords: Mapping[str, Any] | None = None
) -> Verdict:
    """:func:`samples_mixed` for samples along axis 0 of the outputs; where they are not kept apart axis 1 is tried."""
    verdict = samples_mixed(model, args, keywords)
    if verdict == "apart":
        return verdict
    second = any(samples_mixed(model, args, keywords, axis, (1,)) == "apart" for axis in (1, 0))
    return "second" if second else verdict


def refuse_per_sample(verdict: Verdict, model: nn.Module) -> None:
    """Raise or warn where a sample has no gradient of its own."""
    if verdict == "second":
        raise ValueError(
            f"{type(model).__name__} keeps apart what lies along axis 1 of its outputs and not what lies along axis 0, "
            "where the samples are looked for: if it is time first, let the model take and return the samples first, "
            "(N, T, …), by transpose(0, 1) at its ends; if it mixes the samples of a batch, no sample has a gradient "
            "of its own: use curvature of the whole batch (Hessian, GaussNewton, GaussNewtonDiagonal, samples='batch')"
        )
    decide(
        verdict,
        model,
        "no sample has a gradient of its own",
        "use curvature of the whole batch (Hessian, GaussNewton, GaussNewtonDiagonal, samples='batch'), or a model "
        "that treats each sample by itself (layer norm or group norm in the place of batch statistics)",
    )


def refuse_batch_statistics(z: Tensor) -> None:
    """Raise where a batch norm that used the statistics of a batch stands in the graph of ``z``.

    Cost: a walk of the graph.
    """
    pending = [z.grad_fn]
    visited = set(pending)
    while pending:
        node = pending.pop()
        if node is None:
            continue
        # an instance norm is such a node over one row that holds all samples
        if getattr(node, "_saved_training", False) and node._saved_input.shape[0] > 1:  # type: ignore[attr-defined]
            raise ValueError(
                "a batch norm is in training mode, where a sample has no gradient of its own: call model.eval()"
            )
        for following, _ in node.next_functions:
            if following not in visited:
                visited.add(following)
                pending.append(following)


def refuse_split(model: nn.Module, batches: Sequence[Any]) -> None:
    """Raise or warn where several batches are not the one concatenated batch, looking at the first of their inputs."""
    inputs = batches[0]
    if sample_count(inputs, 0) == 1:
        try:
            inputs = joined(batches[0], batches[1])
        except FAILURES:  # of different shapes: there is no such batch
            return
    verdict = samples_mixed(model, [inputs], out_axes=(0, 1))
    if verdict != "apart" and samples_mixed(model, [inputs], axis=1, out_axes=(0, 1)) == "apart":
        return  # the samples lie along axis 1
    decide(
        verdict,
        model,
        "several batches do not equal the one concatenated batch",
        "pass one batch, or a model that treats each sample by itself",
    )


def decide(verdict: Verdict, model: nn.Module, claim: str, remedy: str) -> None:
    """Raise, warn or return.

    Args:
        verdict: of the model.
        model: for its name.
        claim: what is wrong where it mixes samples.
        remedy: what to do then.

    Raises:
        ValueError: naming both.
    """
    name = type(model).__name__
    if verdict == "apart":
        return
    if verdict == "mixed":
        raise ValueError(
            f"{name} mixes the samples of a batch (with others beside it a sample has other outputs), so {claim}: "
            f"{remedy}"
        )
    warnings.warn(
        f"{name} could not be tried for a mixing of samples ({verdict}); where it mixes them, {claim}",
        stacklevel=5,
    )


class KeepHook:
    """The forward hook; it holds its owner weakly, and a copied or unpickled one does nothing."""

    def __init__(self, owner: FirstInputs | None = None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is not None and torch.is_grad_enabled():
            owner.seen = (args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> KeepHook:
        return KeepHook()

    def __reduce__(self) -> tuple[type[KeepHook], tuple[()]]:
        return KeepHook, ()


class FirstInputs:
    """The inputs of a model's last call with a graph, kept until they have been looked at, once.

    Args:
        model: watched by a forward hook that leaves with the look; a copy of this object watches the model's copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle: Any = model.register_forward_hook(KeepHook(self), with_kwargs=True)
        weakref.finalize(self, self._handle.remove)

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstInputs:
        return FirstInputs(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[type[FirstInputs], tuple[nn.Module]]:
        return FirstInputs, (self.model,)

    def verdict(self) -> Verdict:
        """Of the model, at the first look; ``"apart"`` later, since it has been said."""
        if self._handle is None:
            return "apart"
        self._handle.remove()
        seen, self.seen, self._handle = self.seen, None, None
        return "it was not called as a whole" if seen is None else first_axis_mixed(self.model, *seen)
