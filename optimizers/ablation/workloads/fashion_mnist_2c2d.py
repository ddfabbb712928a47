"""Fashion-MNIST with the convolutional network 2c2d of the DeepOBS suite."""

from __future__ import annotations

import functools

from torch import nn

from optimizers.ablation.data import FASHION_MNIST, prepare
from optimizers.ablation.workload import Workload, accuracy, cross_entropy
from optimizers.ablation.workloads import images


def model() -> nn.Module:
    """Build 2c2d: two 5x5 convolutions (32, 64) with pooling, two dense layers (3,274,634 parameters)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 1024),
        nn.ReLU(),
        nn.Linear(1024, 10),
    )


WORKLOAD = Workload(
    name="fashion-mnist-2c2d",
    summary="Fashion-MNIST, CNN with 2 convolutions and 2 dense layers (3.27 M parameters)",
    model=model,
    data=functools.partial(images.load, FASHION_MNIST, flat=False),
    loss=cross_entropy,
    metric=accuracy,
    metric_name="accuracy",
    higher_is_better=True,
    steps=858,
    batch_size=128,
    evaluation_samples=1000,
    prepare=functools.partial(prepare, FASHION_MNIST),
)
