"""Fashion-MNIST with the multilayer perceptron 784-1000-500-100-10 of the DeepOBS suite."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from optimizers.ablation.data import FASHION_MNIST, DataSet, prepare, read_idx
from optimizers.ablation.workload import TensorData, Workload, accuracy, cross_entropy


def load_images(data_set: DataSet, flat: bool) -> TensorData:
    """Load an idx image set: 55,000 for training, 5,000 for validation (fixed shuffle), 10,000 for the test.

    Args:
        data_set: the four idx files.
        flat: images as (N, 784), otherwise as (N, 1, 28, 28); pixels in [0, 1].

    Returns:
        The data, on the CPU.
    """
    folder = prepare(data_set)
    arrays = [read_idx(folder / file) for file, _ in data_set.files]
    shape = (784,) if flat else (1, 28, 28)
    images, test_images = (
        torch.from_numpy(a.copy()).float().div_(255).reshape(-1, *shape) for a in arrays[::2]
    )
    labels, test_labels = (torch.from_numpy(a.copy()).long() for a in arrays[1::2])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation = order[:-5000], order[-5000:]
    return TensorData(
        (images[train], labels[train]), (images[validation], labels[validation]), (test_images, test_labels)
    )


def load() -> TensorData:
    """Load Fashion-MNIST with flat images."""
    return load_images(FASHION_MNIST, flat=True)


def model() -> nn.Module:
    """Build the network 784-1000-500-100-10 (ReLU, 1,336,610 parameters)."""
    widths = [784, 1000, 500, 100]
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


WORKLOAD = Workload(
    name="fashion-mnist",
    summary="Fashion-MNIST, MLP 784-1000-500-100-10 (1.34 M parameters)",
    model=model,
    data=load,
    loss=cross_entropy,
    metric=accuracy,
    metric_name="accuracy",
    higher_is_better=True,
    steps=858,  # two epochs
    batch_size=128,
    prepare=lambda: prepare(FASHION_MNIST),
)
