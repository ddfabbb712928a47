"""A step that is called inside ``torch.autocast`` computes as it would outside of it; the closure does not notice.

Under autocast a matrix product of two float32 tensors is taken in half precision: of the loss that is what the user
wants, of factors, bases and conjugate gradients it is not, and then types no longer fit each other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

KINDS: tuple[str, ...] = ("cpu", "cuda", "mps", "xpu")
"""Device types that are looked at whatever the parameters' own is."""


@dataclass(frozen=True)
class Autocast:
    """The regions that are open, as they were found.

    Args:
        kinds: (device type, dtype) of every one.
    """

    kinds: tuple[tuple[str, torch.dtype], ...]

    @classmethod
    def found(cls, device: torch.device) -> Autocast:
        """Those of the processor, of this device's type and of the usual accelerators."""
        kinds: tuple[str, ...] = KINDS
        if device.type not in KINDS and torch.amp.is_autocast_available(device.type):
            kinds = (*KINDS, device.type)
        open_now = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
        return cls(tuple((kind, torch.get_autocast_dtype(kind)) for kind in open_now)) if open_now else NONE

    def set_aside(self) -> AbstractContextManager[object]:
        """Inside, nothing is cast."""
        if not self.kinds:
            return nullcontext()
        stack = ExitStack()
        for kind, dtype in self.kinds:
            stack.enter_context(torch.autocast(kind, dtype, enabled=False))
        return stack

    def around(self, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """The closure, which casts as it did where it was written."""
        if closure is None or not self.kinds:
            return closure

        def cast() -> Any:
            with ExitStack() as stack:
                for kind, dtype in self.kinds:
                    stack.enter_context(torch.autocast(kind, dtype, enabled=True))
                return closure()

        return cast


NONE = Autocast(())
"""No region is open."""
