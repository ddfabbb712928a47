"""A CUDA graph's stand-in on a CPU: the operations of a step, recorded and played again without Python.

What a graph records of a step is its kernels with the addresses and the numbers that they were launched with. Here that
is every operation below autograd with its tensors and its numbers. A replay runs the same operations on the same
tensors and writes each result where it lay when it was recorded, so that whatever the host decided, read or counted in
the recorded step is repeated as it was: a step that is not safe to capture gives other numbers, or is refused below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

READS = (
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.nonzero",
    "aten.is_nonzero",
    "aten.masked_select",
    "aten.unique",
)
"""Operations for which the host waits."""

SENT = ("aten.lift_fresh", "aten.lift")
"""What :func:`torch.tensor` runs: a number that the host sends, which a graph cannot record."""


class NotCapturableError(AssertionError):
    """A recorded step did what a graph cannot record, or what a replay would repeat wrongly."""


class Recorded(TorchDispatchMode):
    """Records what runs inside; :meth:`replay` runs it again.

    Args:
        known: tensors that stay from step to step: parameters, state, inputs, learning rates.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made = {x.untyped_storage().data_ptr() for x in known}
        self.known = set(self.made)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "profiler":
            return function(*args, **kwargs)
        name = str(function).rsplit(".", 1)[0]
        if name in READS:
            raise NotCapturableError(f"the host reads: {function}")
        if name in SENT:
            raise NotCapturableError(f"the host sends a number: {function}")
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.numel() and x.untyped_storage().data_ptr() not in self.made:
                raise NotCapturableError(
                    f"{function} takes a tensor that is neither kept nor made in the step"
                )
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        self.made |= {x.untyped_storage().data_ptr() for x in tree_leaves(result) if isinstance(x, Tensor)}
        return result

    def signature(self) -> list[Any]:
        """What a graph holds of it: operations, their numbers and shapes, and the addresses of what stays."""

        def told(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return repr(x)  # NaN is no other number than NaN here
            address = x.untyped_storage().data_ptr()
            return x.dtype, tuple(x.shape), x.stride(), address if address in self.known else None

        return [
            (str(function), [told(x) for x in tree_flatten((args, kwargs))[0]])
            for function, args, kwargs, _ in self.calls
        ]

    @torch.no_grad()
    def replay(self) -> None:
        """The same operations on the same memory."""
        for function, args, kwargs, result in self.calls:
            if function.is_view:
                continue  # what it gave lies in memory that is written by others
            again = function(*args, **kwargs)
            if not function._schema.is_mutable:
                tree_map(
                    lambda x, y: x.copy_(y) if isinstance(x, Tensor) and x is not y else x, result, again
                )


def recorded(step: Callable[[], object], known: Sequence[Tensor]) -> Recorded:
    """One step, recorded; it is taken as well."""
    with Recorded(known) as mode:
        step()
    return mode


def kept(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer's steps find and leave at one address."""
    state = [x for entries in optimizer.state.values() for x in entries.values() if isinstance(x, Tensor)]
    rates = [group["lr"] for group in optimizer.param_groups if isinstance(group["lr"], Tensor)]
    path = getattr(getattr(optimizer, "_paths", None), "_graph", None)
    numbers = [sent for _, sent in getattr(path, "_kept", {}).values()]
    return [*(p for group in optimizer.param_groups for p in group["params"]), *state, *rates, *numbers]
