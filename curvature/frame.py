"""Running anything while other tensors stand in the place of a model's parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

T = TypeVar("T")


class Frame(nn.Module):
    """Runs anything at all while ``functional_call`` has substituted the model's tensors.

    So a loss that reads the model's parameters sees the substituted ones, and so does a backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], T]) -> T:
        return run()
