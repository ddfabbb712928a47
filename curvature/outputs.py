"""The outputs of a model from which a loss is computed: which tensor they are, and what they may not be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def refuse_empty(z: Tensor) -> None:
    """Refuse the outputs of an empty batch, whose mean loss is 0/0."""
    if z.numel() == 0:
        raise ValueError(
            f"outputs hold no sample, their shape is {tuple(z.shape)}: leave the empty batch out"
        )


def check_outputs(z: Tensor) -> None:
    """Refuse outputs in which no curvature can be taken."""
    if not z.requires_grad:
        raise ValueError("outputs must be the tensor that the loss was computed from, not detached from it")
    if z.is_complex():
        raise ValueError(
            "outputs must be real, got a complex tensor: let the model return torch.view_as_real(outputs)"
        )
    refuse_empty(z)


def output_tensor(outputs: Any) -> Tensor:
    """The one tensor of the model's outputs from which the loss is computed.

    A tensor is itself; of a dict, a tuple or a dataclass it is the entry named ``logits``, or else the only
    floating-point tensor that requires grad.

    >>> import torch
    >>> output_tensor({"logits": torch.zeros(2), "hidden": torch.ones(2)})
    tensor([0., 0.])
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        named = dict(outputs)
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        named = {f.name: getattr(outputs, f.name) for f in dataclasses.fields(outputs)}
    elif isinstance(outputs, Sequence):
        named = {str(i): x for i, x in enumerate(outputs)}
    else:
        raise TypeError(
            f"outputs must be a tensor, or a dict, tuple or dataclass of tensors, got {describe(outputs)}"
        )
    if isinstance(named.get("logits"), Tensor):
        return named["logits"]  # type: ignore[no-any-return]
    found = {
        k: x for k, x in named.items() if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad
    }
    if len(found) != 1:
        names = ", ".join(map(repr, found)) or "none"
        raise ValueError(
            f"outputs must hold one tensor from which the loss is computed (or one named 'logits'), found {names}: "
            "pass that tensor itself"
        )
    return next(iter(found.values()))


def describe(value: object) -> str:
    """A short description of a value for messages: ``tensor of shape (2, 3)``."""
    return (
        f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
    )
