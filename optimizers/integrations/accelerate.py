"""Accelerate: ``accelerator.backward(loss)`` goes through the optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from optimizers.second_order import SecondOrder


class AccelerateHook:
    """Lets curvature and radius see the loss that ``accelerator.backward`` is given.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        optimizer: the optimizer, as built or as ``accelerator.prepare`` returned it.
        model: gives its outputs to curvature that needs them (``optimizer.needs.outputs``).

    Raises:
        TypeError: where the optimizer is not one of this library.
        ValueError: where outputs are needed and no model is given; under DeepSpeed or Megatron, which own the backward.

    Policies that judge a trial need ``optimizer.step(closure)``, which works as without Accelerate.
    """

    def __init__(self, accelerator: Any, optimizer: Any, model: nn.Module | None = None) -> None:
        self.optimizer = unwrapped(optimizer)
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if kind in ("DEEPSPEED", "MEGATRON_LM"):
            raise ValueError(
                f"{kind} computes the gradients itself, so that curvature cannot see the loss: use DDP or FSDP2"
            )
        if self.optimizer.needs.outputs and model is None:
            raise ValueError(
                f"{type(self.optimizer.curvature).__name__} needs the model's outputs: give model="
            )
        self._accelerator = accelerator
        self._outputs: Any = None
        self._handle = None if model is None else model.register_forward_hook(self._keep)
        self._replaced = accelerator.__dict__.get("backward")
        accelerator.backward = self.backward

    def _keep(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if self.optimizer.needs.outputs:
            self._outputs = outputs

    def backward(self, loss: Tensor, **options: Any) -> None:
        """In place of ``accelerator.backward``: divides by the accumulation steps and scales, as it does."""
        accelerator = self._accelerator
        outputs, self._outputs = self._outputs, None
        self.optimizer.backward(
            loss / accelerator.gradient_accumulation_steps, outputs, scaler=accelerator.scaler, **options
        )

    def remove(self) -> None:
        """Give the accelerator its own backward again."""
        if self._handle is not None:
            self._handle.remove()
        if self._replaced is None:
            self._accelerator.__dict__.pop("backward", None)
        else:
            self._accelerator.backward = self._replaced


def unwrapped(optimizer: Any) -> SecondOrder:
    """The optimizer inside a trainer's wrapper."""
    while not isinstance(optimizer, SecondOrder) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, SecondOrder):
        raise TypeError(f"optimizer must be built by this library, got {type(optimizer).__name__}")
    return optimizer
