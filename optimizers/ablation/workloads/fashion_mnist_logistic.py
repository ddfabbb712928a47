"""Fashion-MNIST with multinomial logistic regression: a convex problem."""

from __future__ import annotations

import functools

from torch import nn

from optimizers.ablation.data import FASHION_MNIST, prepare
from optimizers.ablation.workload import Workload, accuracy, cross_entropy
from optimizers.ablation.workloads import images


def model() -> nn.Module:
    """Build the linear model 784-10, started at zero as is usual for a convex problem (7,850 parameters)."""
    layer = nn.Linear(784, 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


WORKLOAD = Workload(
    name="fashion-mnist-logistic",
    summary="Fashion-MNIST, logistic regression (7,850 parameters, convex)",
    model=model,
    data=functools.partial(images.load, FASHION_MNIST),
    loss=cross_entropy,
    metric=accuracy,
    metric_name="accuracy",
    higher_is_better=True,
    steps=858,
    batch_size=128,
    prepare=functools.partial(prepare, FASHION_MNIST),
)
