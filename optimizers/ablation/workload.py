"""What a workload is: a model, data in three splits, a loss and a metric. Adding one is one file."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from optimizers.ablation.errors import AblationError, unknown_name

Split = Literal["train", "validation", "test"]
Batch = tuple[Tensor, Tensor]


class Data(Protocol):
    """The data of a workload, in three splits."""

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield training batches for ever, in an order that is a function of the generator alone."""
        ...

    def evaluation(self, split: Split, limit: int | None = None) -> Iterator[Batch]:
        """Yield a split once in a fixed order, or its first `limit` samples (of a fixed shuffle)."""
        ...


@dataclass(frozen=True)
class Workload:
    """A training problem on which optimizers are compared.

    Args:
        name: what it is called on the command line.
        summary: one line for ``soaa list``.
        model: builds the model; its initial values come from the global generator, which the run has seeded.
        data: loads the data, in memory where it fits.
        loss: (outputs, target) to the mean loss of a batch, a 0-d tensor.
        metric: (outputs, target) to the mean metric of a batch, a 0-d tensor.
        metric_name: what the metric is called in tables.
        higher_is_better: the metric's direction.
        steps: training steps where the user names none.
        batch_size: samples a step where the user names none.
        target: which curve a target is set on, for steps-to-target.
        evaluation_samples: how many samples of a split a point of the curve is measured on.
        prepare: makes sure that the data are there, before any training.
    """

    name: str
    summary: str
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], Tensor]
    metric_name: str
    higher_is_better: bool
    steps: int
    batch_size: int
    target: Literal["train_loss", "validation_loss"] = "validation_loss"
    evaluation_samples: int = 2000
    prepare: Callable[[], object] = field(default=lambda: None)


class TensorData:
    """Data that fit in memory as two tensors a split; training batches are epochs of a seeded shuffle."""

    def __init__(self, train: Batch, validation: Batch, test: Batch, evaluation_batch: int = 1000) -> None:
        self._splits: dict[Split, Batch] = {"train": train, "validation": validation, "test": test}
        self._evaluation_batch = evaluation_batch

    def to(self, device: torch.device, dtype: torch.dtype) -> TensorData:
        """Return the data on a device, with floating-point tensors in `dtype`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        moved = {name: (move(x), move(y)) for name, (x, y) in self._splits.items()}
        return TensorData(moved["train"], moved["validation"], moved["test"], self._evaluation_batch)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        inputs, targets = self._splits["train"]
        count = len(inputs)
        if not 1 <= batch_size <= count:
            raise AblationError(
                f"batch size must be from 1 to the {count} training samples, got {batch_size}"
            )
        while True:
            order = torch.randperm(count, generator=generator).to(inputs.device)
            # the incomplete last batch is left out: every step costs the same
            for start in range(0, count - batch_size + 1, batch_size):
                rows = order[start : start + batch_size]
                yield inputs[rows], targets[rows]

    def evaluation(self, split: Split, limit: int | None = None) -> Iterator[Batch]:
        inputs, targets = self._splits[split]
        count = len(inputs) if limit is None else min(limit, len(inputs))
        for start in range(0, count, self._evaluation_batch):
            stop = min(start + self._evaluation_batch, count)
            yield inputs[start:stop], targets[start:stop]


def accuracy(outputs: Tensor, target: Tensor) -> Tensor:
    """Return the fraction of samples whose largest output is the target class, a 0-d tensor."""
    return (outputs.argmax(-1) == target).to(torch.float64).mean()


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy; outputs (..., classes), target (...)."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), target.flatten())


# a workload a line: name, module and object
_HERE = "optimizers.ablation.workloads"
BUILT_IN = {
    "digits": f"{_HERE}.digits:WORKLOAD",
    "fashion-mnist-logistic": f"{_HERE}.fashion_mnist_logistic:WORKLOAD",
    "fashion-mnist": f"{_HERE}.fashion_mnist:WORKLOAD",
    "fashion-mnist-2c2d": f"{_HERE}.fashion_mnist_2c2d:WORKLOAD",
    "mnist-autoencoder": f"{_HERE}.mnist_autoencoder:WORKLOAD",
    "mnist-conv-autoencoder": f"{_HERE}.mnist_conv_autoencoder:WORKLOAD",
    "character-gpt": f"{_HERE}.character_gpt:WORKLOAD",
    "character-gpt-brown": f"{_HERE}.character_gpt:BROWN_WORKLOAD",
    "image-folder": f"{_HERE}.image_folder:WORKLOAD",
}


def names() -> list[str]:
    """Return the names of every workload: those of this package, then those of other packages."""
    return [*BUILT_IN, *sorted(set(_third_party()) - set(BUILT_IN))]


@functools.cache
def _third_party() -> dict[str, str]:
    return {entry.name: entry.value for entry in entry_points(group="soaa.workloads")}


def get(name: str) -> Workload:
    """Return a workload by name.

    Args:
        name: a name of this package, or of an entry point in the group ``soaa.workloads``.

    Returns:
        The workload; nothing is loaded yet.

    Raises:
        AblationError: no workload has this name, or another package's cannot be imported.

    >>> get("digits").metric_name
    'accuracy'
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        workload = getattr(importlib.import_module(module), attribute)
    elif name in _third_party():
        try:
            (entry,) = entry_points(group="soaa.workloads", name=name)
            workload = entry.load()
        except Exception as error:  # foreign code: whatever it raises is this workload's fault
            raise AblationError(
                f"workload {name!r} ({_third_party()[name]}) cannot be loaded: {error}"
            ) from error
    else:
        raise unknown_name("workload", name, names())
    if not isinstance(workload, Workload):
        raise AblationError(
            f"workload {name!r} must be an optimizers.ablation.Workload, got {type(workload).__name__}"
        )
    return workload
