"""Evaluating a trial point: same batch, same random state, same buffers, and a way back.

A trial must leave no trace: the random generators and the buffers of every module that ran (batch-norm statistics)
are put back, ``.grad`` is left alone, and a rejected step restores θ from a copy, bit for bit. Adding and subtracting
the step again would not: in float32 rounding changes a few per cent of the elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from curvature import vectors
from optimizers.sharding import local

RandomState = list[tuple[torch.device, Tensor]]


def random_state(params: Sequence[Tensor]) -> RandomState:
    """The state of the generators that a forward pass on these devices may use."""
    devices = {torch.device("cpu")} | {p.device for p in params}
    states: RandomState = []
    for device in sorted(devices, key=str):
        if device.type == "cpu":
            states.append((device, torch.get_rng_state()))
        elif hasattr(torch.get_device_module(device.type), "get_rng_state"):
            states.append((device, torch.get_device_module(device.type).get_rng_state(device)))
    return states


def set_random_state(states: RandomState) -> None:
    """Put generators back into ``states``."""
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device.type).set_rng_state(state, device)


@contextmanager
def buffers_put_back() -> Iterator[None]:
    """Restore the buffers of every module that runs inside, the optimizer need not know the model.

    A hook that sees every module's forward call, active only here, copies a module's buffers before it first runs.
    """
    saved: dict[int, tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]] = {}

    def save(module: nn.Module, args: tuple[Any, ...]) -> None:
        if id(module) not in saved:
            buffers = {name: b for name, b in module._buffers.items() if b is not None}
            saved[id(module)] = (module, {name: (b, b.detach().clone()) for name, b in buffers.items()})

    handle = register_module_forward_pre_hook(save)
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            for module, buffers in saved.values():
                # fully_shard leaves the root's parameters gathered after a forward pass without a backward pass;
                # the next one would compute at the trial point although θ has moved back.
                reshard = getattr(module, "reshard", None)
                if callable(reshard):
                    reshard()
                for name, (buffer, copy) in buffers.items():
                    # A forward pass may write into the buffer or put another in its place.
                    buffer.copy_(copy)
                    module._buffers[name] = buffer


@contextmanager
def gradients_put_back(params: Sequence[Tensor], *, copies: bool) -> Iterator[None]:
    """Take ``.grad`` away inside, and give the same tensors back.

    Args:
        params: the optimizer's parameters.
        copies: leave copies inside, for closures that clip or log what no backward pass computes anew; else a trial's
            own gradient starts from nothing.
    """
    held = [p.grad for p in params]
    for p, g in zip(params, held, strict=True):
        p.grad = g.clone() if copies and g is not None else None
    try:
        yield
    finally:
        for p, g in zip(params, held, strict=True):
            p.grad = g


@contextmanager
def same_random_numbers(before: RandomState, params: Sequence[Tensor]) -> Iterator[None]:
    """Draw the numbers again that were drawn from ``before`` on, and leave the generators as they were found."""
    after = random_state(params)
    set_random_state(before)
    try:
        yield
    finally:
        set_random_state(after)


def evaluate(
    closure: Callable[[], Any], params: Sequence[Tensor], before: RandomState, *, with_gradient: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The loss (and gradient) at the parameters of this moment, on the closure's batch, without a trace.

    Args:
        closure: recomputes the loss; it may call ``zero_grad`` and ``backward``.
        params: the optimizer's parameters.
        before: the random state that the first evaluation started from.
        with_gradient: whether autograd records; without it the pass is forward only.

    Returns:
        the loss as a detached 0-d tensor (``None`` if the closure gave none), and every parameter's gradient.
    """
    gradients = gradients_put_back(params, copies=not with_gradient)
    with same_random_numbers(before, params), buffers_put_back(), gradients:
        with torch.set_grad_enabled(with_gradient):
            value = closure()
        gradient = [local(p.grad) for p in params]
    return loss_tensor(value, params), gradient


def gradient_norm(gradient: Sequence[Tensor | None]) -> Tensor:
    """The norm over all parameters that have a gradient at the trial point, 0-d.

    Raises:
        RuntimeError: for a closure that gave no parameter one.
    """
    present = [g for g in gradient if g is not None]
    if not present:
        raise RuntimeError(
            "the closure computed no gradient at the trial point, and the policy's ratio needs its norm: call "
            "optimizer.backward(loss) in it at every evaluation"
        )
    return vectors.norm(present)


def shifted_gradient(
    closure: Callable[[], Any],
    params: Sequence[Tensor],
    shards: Sequence[Tensor],
    before: RandomState,
    shift: Sequence[Tensor],
) -> list[Tensor | None]:
    """The closure's gradient at θ + shift, without a trace: θ is put back bit for bit.

    Args:
        closure: recomputes the loss and calls ``backward``.
        params: the optimizer's parameters.
        shards: what this rank holds of them.
        before: the random state that the first evaluation started from.
        shift: one tensor a parameter, shaped like its shard.
    """
    saved = [p.detach().clone() for p in shards]
    for p, s in zip(shards, shift, strict=True):
        p.add_(s.to(p.dtype))
    try:
        return evaluate(closure, params, before, with_gradient=True)[1]
    finally:
        for p, old in zip(shards, saved, strict=True):
            p.copy_(old)


def loss_tensor(value: Any, params: Sequence[Tensor]) -> Tensor | None:
    """A loss, given as a tensor or a number, as a detached 0-d tensor; ``None`` stays ``None``."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"loss must be a scalar, got a tensor of shape {tuple(value.shape)}")
        return value.detach().reshape(())
    if isinstance(value, (int, float)):
        return torch.tensor(
            float(value), dtype=torch.promote_types(params[0].dtype, torch.float32), device=params[0].device
        )
    raise TypeError(f"loss must be a scalar tensor or a number, got {type(value).__name__}")
