"""Every registered preset keeps the laws of :func:`optimizers.testing.check_optimizer`; broken ones are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimizers import SecondOrder, available, build
from optimizers import testing as laws
from optimizers.testing import check_optimizer


@pytest.mark.parametrize("name", available()["optimizers"])
def test_preset_conforms(name: str) -> None:
    check_optimizer(lambda model, **options: build(model, name, **options))


class Broken(SecondOrder):
    """SGD with a defect."""

    def __init__(self, model: nn.Module, lr: float = 0.1, params: Any = None) -> None:
        super().__init__(model.parameters() if params is None else params, lr, momentum=0.9)


class Climbing(Broken):
    def step(self, closure: Any = None, **options: Any) -> Any:
        for p in self._params:
            p.grad.neg_()
        return super().step(closure, **options)


class Forgetful(Broken):
    def load_state_dict(self, state_dict: Any) -> None:
        """Loads nothing."""


class Careless(Broken):
    def step(self, closure: Any = None, **options: Any) -> Any:
        for p in self._params:
            p.grad.nan_to_num_()
        return super().step(closure, **options)


class Random(Broken):
    def step(self, closure: Any = None, **options: Any) -> Any:
        torch.rand(1)
        return super().step(closure, **options)


class Writing(Broken):
    def step(self, closure: Any = None, **options: Any) -> Any:
        returned = super().step(closure, **options)
        for p in self._params:
            p.grad.mul_(2.0)
        return returned


class Decaying(Broken):
    @torch.no_grad()
    def step(self, closure: Any = None, **options: Any) -> Any:
        returned = super().step(closure, **options)
        for p in self._params:
            p.mul_(0.99)
        return returned


@pytest.mark.parametrize(
    ("broken", "law", "message"),
    [
        (Climbing, laws.trains, "the loss must fall"),
        (Forgetful, laws.resumes_bit_exactly, "resume bit for bit"),
        (Careless, laws.non_finite_gradient_moves_nothing, "must not move θ"),
        (Random, laws.leaves_no_trace, "random state must be left alone"),
        (Writing, laws.leaves_no_trace, ".grad must be left alone"),
        (Decaying, laws.missing_gradient_moves_nothing, "without a gradient must stay"),
        (Decaying, laws.groups_have_their_own_learning_rate, "lr=0 must stay"),
        (Decaying, laws.zero_step_is_harmless, "must not move θ"),
    ],
)
def test_a_defect_is_found(broken: type[Broken], law: Any, message: str) -> None:
    law(Broken)
    with pytest.raises(AssertionError, match=message):
        law(broken)
