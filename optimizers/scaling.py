"""What a ``torch.amp.GradScaler`` tells a step: the scale of the gradients, and whether they overflowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvature.protocols import Needs
from optimizers.pending import Pending


@dataclass(frozen=True)
class GradScale:
    """The scaler's word on this step.

    Args:
        active: whether a scaler called the step.
        scale: what the gradients are multiplied by; ``None`` where they were unscaled already (for clipping).
        overflowed: > 0 where a gradient is not finite, 0-d.
    """

    active: bool = False
    scale: Tensor | None = None
    overflowed: Tensor | None = None

    @classmethod
    def of(cls, optimizer: object) -> GradScale:
        """What the scaler left on ``optimizer`` for the time of this step."""
        overflowed = getattr(optimizer, "found_inf", None)
        if overflowed is None:
            return cls()
        return cls(True, getattr(optimizer, "grad_scale", None), overflowed)

    def check(self, needs: Needs, pending: Pending, closure: Any, loss: Any) -> None:
        """Refuse what would mix a scaled loss with gradients that are not scaled.

        Raises:
            RuntimeError: naming the call that works.
        """
        if not self.active:
            return
        if closure is not None:
            raise RuntimeError(
                "a GradScaler cannot drive a closure, whose loss it would have to scale twice: use bfloat16 autocast "
                "without a scaler, or scaler.step(optimizer, loss=loss)"
            )
        if (
            pending.backwards
            and not pending.knows_scale
            and (needs.graph or (Needs.LOSS in needs and loss is None))
        ):
            raise RuntimeError(
                "optimizer.backward was given a loss that a GradScaler had scaled, and curvature and radius need it as "
                "it is: call optimizer.backward(loss, scaler=scaler) in place of optimizer.backward(scaler.scale(loss))"
            )

    def unscaled(self, gradient: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients, divided by the scale; copies, so that ``.grad`` stays as it is."""
        if self.scale is None:
            return list(gradient)
        return [None if g is None else g / self.scale.to(g.device, g.dtype) for g in gradient]

    def finite(self, gradient_is_finite: Tensor) -> Tensor:
        """Whether the step may be taken, as far as this process knows."""
        if self.overflowed is None:
            return gradient_is_finite
        return gradient_is_finite & (self.overflowed.to(gradient_is_finite.device) == 0).reshape(())
