"""Memory for a result that is read at once and then not needed: used again by the next one.

A tensor of more than a few pages that is asked for anew costs a page fault every 4 KiB, which can take longer than the
sums that go there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Room:
    """One piece of memory a dtype and device, as large as the largest tensor that was taken; a copied one is empty.

    >>> room = Room()
    >>> x = room.take((2, 3), torch.zeros(()))
    >>> room.take((6,), x).data_ptr() == x.data_ptr()
    True
    """

    def __init__(self) -> None:
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor with contents that mean nothing, valid until the next one is taken."""
        key, size = (like.dtype, like.device), math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            self._held.pop(key, None)  # before the larger one is asked for
            held = self._held[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(tuple(shape))

    def clear(self) -> None:
        """Give all of it back."""
        self._held.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> Room:
        return Room()

    def __reduce__(self) -> tuple[Callable[[], Room], tuple[()]]:
        return Room, ()
