"""Each assertion of :func:`optimizers.testing.check_optimizer` is seen to fail, on an optimizer that breaks it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import Identity
from optimizers import SecondOrder
from optimizers import testing as laws
from trust_region import L2Ball, RatioRadius, TrustRegion


class Sound(SecondOrder):
    """SGD with momentum, and a place for a defect after each step."""

    def __init__(self, model: nn.Module, lr: Any = 0.1, params: Any = None, **options: Any) -> None:
        super().__init__(model.parameters() if params is None else params, lr, momentum=0.9, **options)
        self.model = [model]

    @torch.no_grad()
    def step(self, closure: Any = None, **options: Any) -> Any:
        returned = super().step(closure, **options)
        self.afterwards()
        return returned

    def afterwards(self) -> None:
        """The defect."""

    @property
    def first(self) -> dict[str, Any]:
        return self.state[self._params[0]]

    @property
    def missing(self) -> bool:
        return any(p.grad is None for p in self._params)

    @property
    def non_finite(self) -> bool:
        return any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in self._params)


class Plain(torch.optim.SGD):
    """Not one of ours."""

    def __init__(self, model: nn.Module, lr: float = 0.1, params: Any = None) -> None:
        super().__init__(model.parameters(), lr)


class Narrow(Sound):
    """Trains in float64 and not in float32."""

    def afterwards(self) -> None:
        if self._params[0].dtype == torch.float32:
            for p in self._params:
                assert p.grad is not None
                p.add_(p.grad)


class Amnesic(Sound):
    """A copy forgets its momentum."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for p in self._params:
            self.state[p]["momentum"] = torch.zeros_like(self.state[p]["momentum"])


class Unpickled(Amnesic):
    """Only what was pickled forgets it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpickled:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        SecondOrder.__setstate__(new, copy.deepcopy(self.__getstate__(), memo))
        return new


class Late(Sound):
    """State that appears in the first step."""

    def afterwards(self) -> None:
        self.first["late"] = torch.zeros(())


class Textual(Sound):
    """State that a checkpoint's planner cannot move."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.first["note"] = "text"


class Half(Sound):
    """State in half precision."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.first["small"] = torch.zeros((), dtype=torch.bfloat16)


class Silent(Sound):
    """A skipped step is not told."""

    def afterwards(self) -> None:
        self.first["skipped_steps"].zero_()
        self.step_info.skipped_steps = torch.zeros(())


class Counting(Sound):
    """State moves although the step was skipped."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.first["ticks"] = torch.zeros(())

    def afterwards(self) -> None:
        self.first["ticks"] += 1.0


class Poisoned(Sound):
    """Remembers a bad gradient."""

    poisoned = False

    def afterwards(self) -> None:
        if self.poisoned:
            self._params[0].fill_(float("nan"))
        self.poisoned = self.poisoned or self.non_finite


class AllOrNothing(Sound):
    """Stands still while one parameter has no gradient."""

    def step(self, closure: Any = None, **options: Any) -> Any:
        return None if self.missing else super().step(closure, **options)


class Unforgiving(Sound):
    """Breaks once a parameter's gradient was missing."""

    seen = False

    def afterwards(self) -> None:
        if self.seen and not self.missing:
            self._params[0].fill_(float("inf"))
        self.seen = self.seen or self.missing


class OneRate(Sound):
    """A learning rate of 0 anywhere holds everything."""

    def step(self, closure: Any = None, **options: Any) -> Any:
        held = any(float(group["lr"]) == 0 for group in self.param_groups)
        return None if held else super().step(closure, **options)


class Dividing(Sound):
    """Keeps a quotient by the learning rate."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.first["quotient"] = torch.zeros(())

    def afterwards(self) -> None:
        grad = self._params[0].grad
        assert grad is not None
        self.first["quotient"].copy_(grad.norm() / torch.as_tensor(self.param_groups[0]["lr"]))


class Numerical(Sound):
    """Takes a tensor's learning rate for another one."""

    def step(self, closure: Any = None, **options: Any) -> Any:
        if isinstance(self.param_groups[0]["lr"], Tensor):
            self.param_groups[0]["lr"] = 0.5 * float(self.param_groups[0]["lr"])
        return super().step(closure, **options)


class TwoLoops(Sound):
    """Goes twice as far with a closure."""

    def step(self, closure: Any = None, **options: Any) -> Any:
        returned = super().step(closure, **options)
        if closure is not None:
            super().step(**options)
        return returned


class Trialless(SecondOrder):
    """Judges a trial, and without a closure does something else in silence."""

    def __init__(self, model: nn.Module, lr: Any = 1.0, params: Any = None) -> None:
        super().__init__(
            model.parameters() if params is None else params,
            lr,
            curvature=Identity(),
            trust_region=TrustRegion(L2Ball(), radius=RatioRadius()),
        )

    def step(self, closure: Any = None, **options: Any) -> Any:
        return None if closure is None else super().step(closure, **options)


class Mode(Sound):
    def afterwards(self) -> None:
        for model in getattr(self, "model", ()):  # a copy has none
            model.train()


class Freezing(Sound):
    def afterwards(self) -> None:
        self._params[0].requires_grad_(False)


@pytest.mark.parametrize(
    ("broken", "law", "message"),
    [
        (Plain, laws.trains, "factory must give a SecondOrder, got Plain"),
        (Narrow, laws.trains, r"the loss must fall in 30 steps \(torch.float32\)"),
        (Amnesic, laws.copies_go_on_bit_exactly, "deepcopy must go on bit for bit"),
        (Unpickled, laws.copies_go_on_bit_exactly, "pickle must go on bit for bit"),
        (Late, laws.state_is_plain, "all state must be created with the optimizer"),
        (Textual, laws.state_is_plain, "state 'note' must be a tensor, int or float, is str"),
        (Half, laws.state_is_plain, "state 'small' must be float32 or wider, is torch.bfloat16"),
        (Silent, laws.non_finite_gradient_moves_nothing, "must count a skipped step"),
        (Counting, laws.non_finite_gradient_moves_nothing, "must not move state 'ticks'"),
        (Poisoned, laws.non_finite_gradient_moves_nothing, "training must go on after a skipped step"),
        (AllOrNothing, laws.missing_gradient_moves_nothing, "the other parameters must move"),
        (Unforgiving, laws.missing_gradient_moves_nothing, "a parameter may get gradients again"),
        (OneRate, laws.groups_have_their_own_learning_rate, "the other group must move"),
        (Dividing, laws.zero_step_is_harmless, "must not make state 'quotient' NaN"),
        (Numerical, laws.learning_rate_may_be_a_tensor, "lr as a 0-d tensor"),
        (TwoLoops, laws.loops_agree, "the flat loop and the closure loop must agree"),
        (Trialless, laws.loops_agree, "must refuse a step without a closure, and name it"),
        (Mode, laws.leaves_no_trace, "training mode must be left alone"),
        (Freezing, laws.leaves_no_trace, "requires_grad must be left alone"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_a_defect_is_found(broken: type[SecondOrder], law: Any, message: str) -> None:
    law(Sound)
    with pytest.raises(AssertionError, match=message):
        law(broken)
    if broken is not Plain and law is not laws.trains:
        with pytest.raises((AssertionError, ValueError)):  # and the whole check does not pass it
            laws.check_optimizer(broken)  # type: ignore[arg-type]


def test_what_is_sound_passes() -> None:
    laws.check_optimizer(Sound)
