"""MNIST with the deep autoencoder 784-1000-500-250-30 and its mirror: the problem K-FAC became known on.

Reference: Hinton & Salakhutdinov 2006, Science 313; Martens & Grosse 2015, arXiv 1503.05671.
"""

from __future__ import annotations

import functools
import itertools

from torch import Tensor, nn

from optimizers.ablation.data import MNIST, prepare
from optimizers.ablation.workload import Workload
from optimizers.ablation.workloads import images

WIDTHS = [784, 1000, 500, 250, 30]


def model() -> nn.Module:
    """Build the autoencoder: tanh, a linear code of 30 and linear outputs (logits); 2,837,314 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise([*WIDTHS, *WIDTHS[-2::-1]]):
        layers.append(nn.Linear(inputs, outputs))
        if outputs not in (30, 784):
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy summed over an image's pixels, averaged over images."""
    total = nn.functional.binary_cross_entropy_with_logits(outputs, target, reduction="sum")
    return total / len(outputs)


def squared_error(outputs: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of the reconstruction summed over an image's pixels, averaged over images."""
    return (outputs.sigmoid() - target).square().sum() / len(outputs)


WORKLOAD = Workload(
    name="mnist-autoencoder",
    summary="MNIST, deep autoencoder 784-1000-500-250-30 and back, tanh (2.84 M parameters)",
    model=model,
    data=functools.partial(images.load, MNIST, reconstruct=True),
    loss=loss,
    metric=squared_error,
    metric_name="squared error",
    higher_is_better=False,
    steps=1200,
    batch_size=512,
    target="train_loss",  # the literature on this problem compares optimizers on the training loss
    prepare=functools.partial(prepare, MNIST),
)
