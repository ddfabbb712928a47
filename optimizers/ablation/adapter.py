"""From a cell to an optimizer, and one way to take a step with any of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.ablation import baselines
from optimizers.ablation.cell import Cell
from optimizers.ablation.errors import AblationError, unknown_name

LossFunction = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[nn.Module, LossFunction, Tensor, Tensor], Tensor]


def available() -> dict[str, list[str]]:
    """Return every name that a cell may use, by kind: curvature, trust_region, optimizers."""
    import optimizers

    found = {kind: list(names) for kind, names in optimizers.available().items()}
    found["optimizers"] = [*found.get("optimizers", []), *baselines.BASELINES]
    return found


def check_names(cell: Cell) -> None:
    """Raise AblationError, naming the nearest valid names, where a name of the cell does not exist."""
    if cell.optimizer in baselines.BASELINES:
        return
    names = available()
    wanted = (
        ("optimizer", cell.optimizer, "optimizers"),
        ("curvature", cell.curvature, "curvature"),
        ("trust region", cell.trust_region, "trust_region"),
    )
    for kind, name, key in wanted:
        if name and name not in names.get(key, []):
            raise unknown_name(kind, name, names.get(key, []))


def build(
    cell: Cell, model: nn.Module, learning_rate: float | None, total_steps: int
) -> torch.optim.Optimizer:
    """Build the optimizer of a cell for a model.

    Args:
        cell: what to build.
        model: whose parameters are trained.
        learning_rate: given as ``lr``; None leaves the optimizer's own default.
        total_steps: given to optimizers that take it and were not told otherwise.

    Returns:
        The optimizer.

    Raises:
        AblationError: an unknown name or option, or a value that the optimizer refuses.
    """
    check_names(cell)
    options: dict[str, Any] = {name: _typed(cell, name, value) for name, value in cell.options}
    if learning_rate is not None:
        if "lr" in options:
            raise AblationError(
                f"{cell.label}: the cell sets lr={options['lr']}, and the run {learning_rate}: give one of them"
            )
        options["lr"] = learning_rate
    try:
        if cell.optimizer in baselines.BASELINES:
            _check_options(cell.optimizer, baselines.BASELINES[cell.optimizer][0], options)
            return baselines.build(cell.optimizer, model, **options)
        import optimizers

        if "total_steps" not in options and takes_total_steps(cell):
            options["total_steps"] = total_steps
        if cell.optimizer:
            return optimizers.build(model, optimizer=cell.optimizer, **options)
        return optimizers.build(model, curvature=cell.curvature, trust_region=cell.trust_region, **options)
    except (ValueError, TypeError, KeyError) as error:
        message = error.args[0] if error.args else error
        raise AblationError(f"{cell.label}: {message}{_words(error, options)}") from error


def _words(error: Exception, options: Mapping[str, object]) -> str:
    """Where a type was wrong: which options were read as words, since a number with a slip in it is one."""
    words = [f"{name}={value!r}" for name, value in options.items() if isinstance(value, str)]
    return (
        f"; read as words, not numbers: {', '.join(words)}" if words and isinstance(error, TypeError) else ""
    )


def _typed(cell: Cell, name: str, value: object) -> object:
    """A configuration file and the command line have no word for a dtype but its name."""
    if not name.endswith("dtype") or not isinstance(value, str):
        return value
    found = getattr(torch, value, None)
    if not isinstance(found, torch.dtype):
        raise AblationError(f"{cell.label}: {name} must be a dtype of torch such as 'float32', got {value!r}")
    return found


def _check_options(name: str, factory: Callable[..., object], options: Mapping[str, object]) -> None:
    valid = [parameter for parameter in inspect.signature(factory).parameters if parameter != "model"]
    for option in options:
        if option not in valid:
            raise unknown_name(f"option of {name}", option, valid)


def takes_total_steps(cell: Cell) -> bool:
    """Return whether what the cell names has an argument ``total_steps``: the length of the run."""
    return "total_steps" in _parameters(_factory("optimizers", cell.optimizer)) or (
        not cell.optimizer and "total_steps" in _parameters(_factory("trust_region", cell.trust_region))
    )


def summary(kind: str, name: str) -> str:
    """Return one line on a name of `available`: the first line of its documentation."""
    if kind == "optimizers" and name in baselines.BASELINES:
        return baselines.BASELINES[name][1]
    text = inspect.getdoc(_factory(kind, name)) or ""
    # what marks up the pages says nothing in a terminal: ``step(closure)``, :class:`Box`
    return re.sub(r"(:\w+:)?`+~?([^`]*)`+", r"\2", text.partition("\n")[0])


def _factory(kind: str, name: str) -> Callable[..., object] | None:
    from curvature.registry import estimators
    from optimizers.registry import optimizers
    from trust_region.registry import trust_regions

    registries: dict[str, Any] = {
        "optimizers": optimizers,
        "curvature": estimators,
        "trust_region": trust_regions,
    }
    return registries[kind][name] if name else None


def _parameters(factory: Callable[..., object] | None) -> list[str]:
    return [] if factory is None else list(inspect.signature(factory).parameters)


def step_function(optimizer: torch.optim.Optimizer) -> Step:
    """Return how one training step is taken with this optimizer.

    The closure loop where a trial is judged, the flat loop elsewhere, and ``loss.backward()`` for an
    optimizer that knows neither.

    Args:
        optimizer: a `SecondOrder`, or any `torch.optim.Optimizer`.

    Returns:
        A function of (model, loss function, inputs, target) that steps and returns the batch's loss before
        the step, detached.
    """
    if not hasattr(optimizer, "backward"):
        return lambda *problem: _plain_step(optimizer, *problem)
    if judges_trials(optimizer):
        return lambda *problem: _closure_step(optimizer, *problem)
    return lambda *problem: _flat_step(optimizer, *problem)


def judges_trials(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer evaluates trial points: it then needs a closure, and sets its own step."""
    needs = getattr(optimizer, "needs", None)
    if needs is None:
        return False
    from curvature import Needs

    return bool(needs & (Needs.TRIAL_LOSS | Needs.TRIAL_GRADIENT))


def opening(optimizer: torch.optim.Optimizer) -> int:
    """Return how many steps an optimizer begins with whose cost is not that of later ones."""
    return int(getattr(getattr(optimizer, "curvature", None), "every_step_until", 0))


def _plain_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, loss_fn: LossFunction, inputs: Tensor, target: Tensor
) -> Tensor:
    optimizer.zero_grad()
    loss = loss_fn(model(inputs), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _flat_step(
    optimizer: Any, model: nn.Module, loss_fn: LossFunction, inputs: Tensor, target: Tensor
) -> Tensor:
    optimizer.zero_grad()
    outputs = model(inputs)
    loss = loss_fn(outputs, target)
    optimizer.backward(loss, outputs=outputs)
    optimizer.step(loss=loss)
    return loss.detach()


def _closure_step(
    optimizer: Any, model: nn.Module, loss_fn: LossFunction, inputs: Tensor, target: Tensor
) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = loss_fn(outputs, target)
        optimizer.backward(loss, outputs=outputs)
        return loss

    loss: Tensor = optimizer.step(closure)
    return loss.detach()
