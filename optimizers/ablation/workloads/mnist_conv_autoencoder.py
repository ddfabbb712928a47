"""MNIST with a small convolutional autoencoder: convolutions, transposed convolutions and dense layers."""

from __future__ import annotations

import functools

from torch import nn

from optimizers.ablation.data import MNIST, prepare
from optimizers.ablation.workload import Workload
from optimizers.ablation.workloads import images
from optimizers.ablation.workloads.mnist_autoencoder import loss, squared_error


def model() -> nn.Module:
    """Build the autoencoder: 1-16-32 channels, a code of 22, and back to logits (80,151 parameters)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(1568, 22),
        nn.Linear(22, 1568),
        nn.Tanh(),
        nn.Unflatten(1, (32, 7, 7)),
        nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(16, 1, 3, stride=2, padding=1, output_padding=1),
    )


WORKLOAD = Workload(
    name="mnist-conv-autoencoder",
    summary="MNIST, convolutional autoencoder with a code of 22 (80 k parameters)",
    model=model,
    data=functools.partial(images.load, MNIST, flat=False, reconstruct=True),
    loss=loss,
    metric=squared_error,
    metric_name="squared error",
    higher_is_better=False,
    steps=858,
    batch_size=128,
    target="train_loss",
    evaluation_samples=1000,
    prepare=functools.partial(prepare, MNIST),
)
