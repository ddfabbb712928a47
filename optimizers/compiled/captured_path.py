"""Steps that a CUDA graph can record and play again: tensors alone, at addresses that stay.

A replay runs kernels and no Python. So nothing in such a step may be decided, counted or sent by the host: it is the
free function of :mod:`optimizers.compiled.graph`, which the compiler traces in other steps, and numbers of the host are
kept in tensors of the device that were filled before. A number that is to change between replays must be a tensor
itself (a learning rate is, if it is given as one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvature import vectors
from optimizers.compiled import graph
from optimizers.compiled.graph_path import BACKEND, GraphPath, GroupNumbers
from optimizers.core import Composition
from optimizers.distributed import Ranks
from optimizers.scaling import GradScale
from optimizers.step_info import StepInfo

if TYPE_CHECKING:
    from optimizers.step_paths import Held

REMEDY = "capture the forward and the backward pass alone and call step() after every replay, or leave capturable out"


def why_not(composition: Composition) -> str | None:
    """Why no step of a composition can be captured, in words; ``None`` where all can."""
    reason = graph.why_not(composition)
    if reason is None and hasattr(composition.curvature, "ordinary"):
        reason = f"{type(composition.curvature).__name__} counts steps on the host, to refresh a basis in some of them"
    return reason


def check_capturable(capturable: object, composition: Composition) -> bool:
    """The flag as a bool.

    Raises:
        ValueError: for what is none, and for ``True`` beside a composition that the host takes part in.
    """
    if capturable is not None and not isinstance(capturable, bool):
        raise ValueError(f"capturable must be a bool or None, got {capturable!r}")
    reason = why_not(composition) if capturable else None
    if reason is not None:
        raise ValueError(f"capturable=True is not supported: {reason}; use another composition, or {REMEDY}")
    return bool(capturable)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what runs now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Raise where a graph records a step that was not built for it: a replay would repeat the host's decisions.

    Raises:
        RuntimeError: naming the flag.
    """
    if is_capturing(device):
        raise RuntimeError(
            "a CUDA graph records step(), and this optimizer was built without capturable=True: give that, or "
            + REMEDY
        )


class CapturedPath(GraphPath):
    """Takes the steps of one optimizer so that a graph may record them, recorded or not.

    Args:
        composition: what the steps are of.
        seed: of the rounding of state in bfloat16.
        compiles: whether the function is compiled, or runs as it stands.

    Cost: as it stands every intermediate vector is written, and the state is copied before it changes: several times
    the parameters in memory, in the pool of the graph; compiled, about twice.
    """

    def __init__(self, composition: Composition, seed: int, compiles: bool) -> None:
        self.composition, self._counts, self._overcounted = composition, None, None
        function: Callable[..., Any] = graph.graph_of(composition, seed)
        self._step = graph.compiled(function, BACKEND) if compiles else function
        self._kept: dict[int, tuple[list[float], Tensor]] = {}

    def takes(self, held: Held, gradient: Sequence[Tensor | None]) -> bool:
        """Whether there is a gradient at all; one that lacks some would be another graph.

        Raises:
            RuntimeError: where a gradient is missing, or of another dtype, layout or device than its parameter.
        """
        if all(g is None for g in gradient):
            return False
        if not super().takes(held, gradient):
            raise RuntimeError(
                "capturable=True takes steps in which every parameter has a dense gradient of its own dtype, all on "
                "one device: give the optimizer the parameters that the loss reaches"
            )
        return True

    def step_(
        self, held: Held, gradient: Sequence[Tensor], loss: Tensor | None, scale: GradScale, ranks: Ranks
    ) -> StepInfo:
        """One step, in which nothing is read by the host."""
        if ranks.groups:
            raise RuntimeError(
                "capturable=True is for one process, and this step is shared by several: give process_group=None where "
                "gradients are reduced elsewhere, or leave capturable out"
            )
        with vectors.unread():
            return super().step_(held, gradient, loss, scale, ranks)

    def numbers(self, index: int, group: Mapping[str, Any], like: Tensor) -> GroupNumbers:
        """η, β, λ of a group, in tensors that stay; they are filled anew where a number has changed since.

        Raises:
            RuntimeError: where that would have to happen while a graph records.
            ValueError: for a learning rate on another device.
        """
        rate, decay = group["lr"], group["weight_decay"]
        if isinstance(rate, Tensor) and rate.device != like.device:
            raise ValueError(
                f"capturable=True takes a learning rate on the parameters' device, and this one is on {rate.device}: "
                f"give torch.tensor(lr, device={str(like.device)!r})"
            )
        host = [0.0 if isinstance(rate, Tensor) else float(rate), float(group["momentum"]), float(decay)]
        known = self._kept.get(index)
        if known is None or known[0] != host or known[1].device != like.device:
            if is_capturing(like.device):
                raise RuntimeError(
                    "a number of the host was not known before the capture began: take a step first, on another "
                    "stream, and give a learning rate that changes as a tensor"
                )
            sent = torch.tensor(host, dtype=like.dtype, device=like.device)
            if known is not None and known[1].device == like.device:
                known[1].copy_(sent)
                sent = known[1]
            self._kept[index] = host, sent
        lr, beta, weight_decay = self._kept[index][1].unbind()
        if isinstance(rate, Tensor):
            lr = rate.detach().to(like).reshape(())
        return lr, beta, None if decay == 0.0 else weight_decay, bool(group["maximize"])
