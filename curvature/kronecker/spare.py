"""The memory of the last step's factors, taken again where nobody holds them any more.

Factors are as large as the layers, and a step gives their sums back to the system when it ends. Asking for them anew
at the next step costs a page fault every 4 KiB, which took a fifth of a measurement. Memory that anything else still
refers to, be it through a view, is left to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvature.room import Room


class Spare:
    """Tensors by name, and room for intermediate ones; a copied or unpickled one is empty.

    >>> spare = Spare()
    >>> x = spare.take("A", (2, 2), torch.float32, torch.device("cpu"))
    >>> view = x[0]
    >>> del x
    >>> spare.take("A", (2, 2), torch.float32, torch.device("cpu")).data_ptr() == view.data_ptr()
    False
    """

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}
        self.room = Room()

    def take(self, name: object, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with contents that mean nothing."""
        held = self._held
        if name in held and _references(held, name) == _ALONE:
            x = held[name]
            if x.shape == torch.Size(shape) and x.dtype == dtype and x.device == device:
                return x
        held.pop(name, None)
        x = torch.empty(tuple(shape), dtype=dtype, device=device)
        if _ALONE[0]:
            held[name] = x
        return x

    def clear(self) -> None:
        """Give all of it back."""
        self._held.clear()
        self.room.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> Spare:
        return Spare()

    def __reduce__(self) -> tuple[Callable[[], Spare], tuple[()]]:
        return Spare, ()


def _references(held: dict[object, Tensor], name: object) -> tuple[int, int]:
    """How many refer to the tensor itself, and how many tensors share its memory."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:  # without it a view goes unseen
        return (0, 0)
    return sys.getrefcount(held[name]), count(held[name].untyped_storage()._cdata)


#: What :func:`_references` says of a tensor that only its dictionary holds.
_ALONE = _references({"": torch.empty(1)}, "")
