"""Lightning: one mixin for automatic and manual optimization."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from optimizers.integrations.accelerate import unwrapped


class SecondOrderModule:
    """``class Model(SecondOrderModule, LightningModule)``: the loss goes through the optimizer's ``backward``.

    In automatic optimization Lightning steps with a closure, so policies that judge a trial work; in manual
    optimization call ``self.manual_backward(loss)`` as always. Where curvature needs the model's outputs set
    ``self.outputs`` in ``training_step``. With 16-mixed precision Lightning scales the loss before anyone sees it,
    which a step refuses: use bf16-mixed.
    """

    outputs: Any = None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: the optimizer's ``backward`` in place of ``loss.backward()``."""
        optimizers = self.trainer.optimizers  # type: ignore[attr-defined]
        if len(optimizers) != 1:
            raise ValueError(
                f"SecondOrderModule sends the loss to one optimizer, this module has {len(optimizers)}: override "
                "backward(loss) and call the backward of the one that is meant"
            )
        outputs, self.outputs = self.outputs, None
        unwrapped(optimizers[0]).backward(loss, outputs, *args, **kwargs)
