"""Evaluating a model without a trace: buffers, training modes and the global random state are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Run the body, then restore the model's buffers, training flags and the global random states.

    Batch-norm statistics move with every forward pass in training mode, and dropout draws from the global
    generator; an estimate of curvature must do neither.

    >>> norm = nn.BatchNorm1d(2)
    >>> with preserved(norm):
    ...     _ = norm(torch.ones(3, 2))
    >>> norm.running_mean, int(norm.num_batches_tracked)
    (tensor([0., 0.]), 0)
    """
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    held = [(m, dict(m._buffers)) for m in model.modules()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        with same_random_numbers(model):
            yield
    finally:
        for module, before in held:
            module._buffers.clear()  # a forward pass may bind a new tensor to a buffer's name
            module._buffers.update(before)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(
                    buffer, value
                ):  # a living graph may have saved one that nothing has written to
                    buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Put the global random states back after the body, so that what follows draws the same again (dropout masks)."""
    devices = {t.device for t in [*model.parameters(), *model.buffers()] if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices)):
        yield


@contextlib.contextmanager
def own_buffers(model: nn.Module) -> Iterator[None]:
    """Run the body with copies in the place of the model's buffers, then put these and the training flags back.

    The buffers themselves are not written to: a living graph may have saved them.

    >>> norm = nn.BatchNorm1d(2)
    >>> with own_buffers(norm):
    ...     _ = norm(torch.ones(3, 2))
    >>> norm.running_mean, int(norm.num_batches_tracked)
    (tensor([0., 0.]), 0)
    """
    held = [(m, dict(m._buffers), m.training) for m in model.modules()]
    copies = {id(b): b.detach().clone() for b in model.buffers()}
    try:
        for module, before, _ in held:
            module._buffers.update({k: b if b is None else copies[id(b)] for k, b in before.items()})
        yield
    finally:
        for module, before, mode in held:
            module._buffers.clear()
            module._buffers.update(before)
            module.training = mode


def coupled_by_batch_norm(model: nn.Module) -> str | None:
    """The name of a batch-norm layer that mixes the samples of a batch, or None: in training mode all do."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or (module.running_mean is None and module.running_var is None)
        ):
            return name or type(module).__name__
    return None
