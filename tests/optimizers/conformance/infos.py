"""What PyTorch's optimizer suite must be told of every registered preset.

``torch.testing._internal.common_optimizers`` describes PyTorch's own optimizers with ``OptimizerInfo`` and runs its
tests over them; the same description and machinery are used here, over :func:`optimizers.available`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from curvature.protocols import Needs
from optimizers import SecondOrder, available, build
from optimizers.registry import optimizers as registry

#: Learning rates at which a preset visibly descends within a few steps of the suite's problem.
RATES = {"muon": 0.02, "lars": 0.05, "lamb": 0.02}


class Affine(nn.Module):
    """The suite's problem: logistic regression of 4 samples onto 10 classes, for a weight of 10 x 5."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, contiguous: bool = True, device: Any = None
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> nn.Parameter:
            values = torch.randn(*shape, 2, generator=generator).to(dtype=dtype, device=device)
            return nn.Parameter(values[..., 0].contiguous() if contiguous else values[..., 0])

        self.linear = nn.Linear(5, 10, dtype=dtype, device=device)
        self.linear.weight, self.linear.bias = draw(10, 5), draw(10)
        self.x = torch.randn(4, 5, generator=generator).to(dtype=dtype, device=device)
        self.y = torch.tensor([0, 3, 7, 3], device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def loss_of(model: Affine) -> tuple[Tensor, Tensor]:
    """(loss, outputs). A log-likelihood, so that curvature of sampled labels has one."""
    outputs = model(model.x)
    return nn.functional.cross_entropy(outputs, model.y), outputs


def closure_of(model: Affine, optimizer: SecondOrder) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, outputs = loss_of(model)
        optimizer.backward(loss, outputs)
        return loss

    return closure


def arguments_of(name: str) -> set[str]:
    """Options of a preset, those of ``SecondOrder`` that it passes on included."""
    parameters = inspect.signature(registry[name]).parameters
    names = {n for n in parameters if n != "params"}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        names |= {"weight_decay", "maximize", "compile", "process_group"}
    if name == "adam":
        names.discard("weight_decay")  # refused there, with a word on AdamW
    return names


def climbs(optimizer: SecondOrder) -> bool:
    """Whether ``maximize`` can be meant: only gradients decide the step."""
    needs = optimizer.needs
    return not (needs.graph or needs.trial or Needs.LOSS in needs)


def inputs_of(name: str) -> Callable[..., list[OptimizerInput]]:
    def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
        taken = arguments_of(name)
        rate = RATES.get(name)
        base = {"lr": rate} if rate else {}
        found = [OptimizerInput(params=None, kwargs=dict(base), desc="default")]
        if not sample(name).needs.trial:
            found.append(OptimizerInput(params=None, kwargs={"lr": rate or 5e-3}, desc="non-default lr"))
            found.append(
                OptimizerInput(params=None, kwargs={"lr": torch.tensor(rate or 5e-3)}, desc="Tensor lr")
            )
        if "weight_decay" in taken:
            found.append(
                OptimizerInput(params=None, kwargs={**base, "weight_decay": 0.1}, desc="weight_decay")
            )
        if "maximize" in taken and climbs(sample(name)):
            found.append(OptimizerInput(params=None, kwargs={**base, "maximize": True}, desc="maximize"))
        return found

    return inputs


def error_inputs_of(name: str) -> Callable[..., list[ErrorOptimizerInput]]:
    def errors(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
        taken = arguments_of(name)
        found = [] if "model" in taken else list(get_error_inputs_for_all_optims(device, dtype))
        for bad, kwargs, regex in (
            ("lr", {"lr": -1.0}, "lr must be >= 0, got -1.0"),
            ("betas", {"betas": (1.0, 0.0)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
            ("weight_decay", {"weight_decay": -1.0}, "weight_decay must be >= 0, got -1"),
            ("lr", {"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
        ):
            if bad in taken:
                found.append(
                    ErrorOptimizerInput(
                        OptimizerInput(params=None, kwargs=kwargs, desc=f"bad {bad}"),
                        error_type=ValueError,
                        error_regex=regex,
                    )
                )
        return found

    return errors


class Preset:
    """A registered preset as the ``optim_cls`` of an ``OptimizerInfo``: built for a model."""

    def __init__(self, name: str) -> None:
        self.preset = name
        self.__name__ = name.replace("-", "_")

    def __call__(self, model: nn.Module, **options: Any) -> SecondOrder:
        return build(model, self.preset, **options)

    def of_params(self, params: Any, **options: Any) -> SecondOrder:
        return registry[self.preset](params, **options)

    @property
    def decays(self) -> bool:
        return "weight_decay" in arguments_of(self.preset)

    @property
    def takes_model(self) -> bool:
        return "model" in arguments_of(self.preset)


def sample(name: str) -> SecondOrder:
    return build(Affine(), name)


def optim_db() -> list[OptimizerInfo]:
    """One ``OptimizerInfo`` a registered preset."""
    return [
        OptimizerInfo(
            Preset(name),  # type: ignore[arg-type]
            optim_inputs_func=inputs_of(name),
            optim_error_inputs_func=error_inputs_of(name),
            supported_impls=("foreach",),
            supports_sparse=False,
            supports_complex=False,
            step_requires_closure=bool(sample(name).needs.trial),
            supports_param_groups="model" not in arguments_of(name),
        )
        for name in available()["optimizers"]
    ]


DB = optim_db()
GRADIENT_ONLY = [i for i in DB if not (i.optim_cls(Affine()).needs.graph or i.step_requires_closure)]


def steps(model: Affine, optimizer: Any, n: int) -> None:
    closure = closure_of(model, optimizer)
    for _ in range(n):
        optimizer.step(closure)


def numbers(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
