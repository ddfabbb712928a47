"""The progression of diabetes a year after ten measurements (scikit-learn's, 442 patients): a small regression."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optimizers.ablation import TensorData, Workload


def load() -> TensorData:
    """302 patients for training, 70 for validation, 70 for the test, in a fixed shuffle; all standardised."""
    from sklearn.datasets import load_diabetes

    table = load_diabetes()
    order = torch.randperm(len(table.data), generator=torch.Generator().manual_seed(0))
    parts = order[:302], order[302:372], order[372:]
    x = torch.from_numpy(table.data).to(torch.float32)
    y = torch.from_numpy(table.target).to(torch.float32).unsqueeze(1)
    # mean and scale of the training part alone: the others must not be seen
    x = (x - x[parts[0]].mean(0)) / x[parts[0]].std(0)
    y = (y - y[parts[0]].mean()) / y[parts[0]].std()
    train, validation, test = ((x[part], y[part]) for part in parts)
    return TensorData(train, validation, test)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))


def mean_squared_error(outputs: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, target)


def mean_absolute_error(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).abs().to(torch.float64).mean()


WORKLOAD = Workload(
    name="diabetes",
    summary="progression of diabetes, MLP 10-32-1 (385 parameters); ships with scikit-learn",
    model=model,
    data=load,
    loss=mean_squared_error,
    metric=mean_absolute_error,
    metric_name="mean absolute error",
    higher_is_better=False,
    steps=200,
    batch_size=64,
)
