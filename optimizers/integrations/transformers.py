"""Hugging Face ``Trainer``: a callback that lets the optimizer see the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimizers.integrations.accelerate import AccelerateHook

if TYPE_CHECKING:
    Base = object  # types hold whether or not the library is installed
else:
    try:
        from transformers import TrainerCallback as Base
    except ImportError:
        Base = object


class TrainerHook(Base):
    """Add it by ``trainer.add_callback(TrainerHook(trainer))``, of a trainer with ``optimizers=(optimizer, None)``.

    Accumulation, clipping, mixed precision, schedules, DDP and checkpoints stay the trainer's.

    Args:
        trainer: a ``transformers.Trainer``.

    Raises:
        ValueError: when training begins, for a policy that judges a trial: the trainer's step takes no closure.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._hook: AccelerateHook | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Route the trainer's backward through the optimizer."""
        hook = AccelerateHook(
            self.trainer.accelerator, self.trainer.optimizer, kwargs.get("model", self.trainer.model)
        )
        if hook.optimizer.needs.trial:
            hook.remove()
            raise ValueError(
                f"{type(hook.optimizer.trust_region.radius).__name__} judges a trial point, and Trainer's step takes "
                'no closure: use a lagged policy (evaluate="lagged") or one that needs no trial'
            )
        self._hook = hook

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the trainer back."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
