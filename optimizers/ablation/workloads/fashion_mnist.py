"""Fashion-MNIST with the multilayer perceptron 784-1000-500-100-10 of the DeepOBS suite."""

from __future__ import annotations

import functools
import itertools

from torch import nn

from optimizers.ablation.data import FASHION_MNIST, prepare
from optimizers.ablation.workload import Workload, accuracy, cross_entropy
from optimizers.ablation.workloads import images


def model() -> nn.Module:
    """Build the network 784-1000-500-100-10 (ReLU, 1,336,610 parameters)."""
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise([784, 1000, 500, 100]):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


WORKLOAD = Workload(
    name="fashion-mnist",
    summary="Fashion-MNIST, MLP 784-1000-500-100-10 (1.34 M parameters)",
    model=model,
    data=functools.partial(images.load, FASHION_MNIST),
    loss=cross_entropy,
    metric=accuracy,
    metric_name="accuracy",
    higher_is_better=True,
    steps=858,  # two epochs
    batch_size=128,
    prepare=functools.partial(prepare, FASHION_MNIST),
)
