"""Handwritten digits (scikit-learn's, 1,797 images 8x8) with a small network: needs no download."""

from __future__ import annotations

import functools

import torch
from torch import nn

from optimizers.ablation.workload import TensorData, Workload, accuracy, cross_entropy


@functools.cache
def load() -> TensorData:
    """Load the digits: 1,197 for training, 300 for validation, 300 for the test, in a fixed shuffle."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.data).to(torch.float32) / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation, test = order[:1197], order[1197:1497], order[1497:]
    return TensorData(
        (images[train], labels[train]), (images[validation], labels[validation]), (images[test], labels[test])
    )


def model() -> nn.Module:
    """Build the network 64-64-32-10 (tanh, 6,570 parameters)."""
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


WORKLOAD = Workload(
    name="digits",
    summary="handwritten digits 8x8, MLP 64-64-32-10 (6,570 parameters); ships with scikit-learn",
    model=model,
    data=load,
    loss=cross_entropy,
    metric=accuracy,
    metric_name="accuracy",
    higher_is_better=True,
    steps=200,
    batch_size=64,
)
