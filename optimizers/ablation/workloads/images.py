"""Loading of the idx image sets: MNIST and Fashion-MNIST."""

from __future__ import annotations

import functools

import torch

from optimizers.ablation.data import DataSet, prepare, read_idx
from optimizers.ablation.workload import TensorData


@functools.lru_cache(maxsize=2)  # every run of an ablation reads the same images, and none writes to them
def load(data_set: DataSet, flat: bool = True, reconstruct: bool = False) -> TensorData:
    """Load an idx image set: 55,000 for training, 5,000 for validation (fixed shuffle), 10,000 for the test.

    Args:
        data_set: the four idx files.
        flat: images as (N, 784), otherwise as (N, 1, 28, 28); pixels in [0, 1].
        reconstruct: the target is the image itself, not its label.

    Returns:
        The data, on the CPU.
    """
    folder = prepare(data_set)
    arrays = [read_idx(folder / file) for file, _ in data_set.files]
    shape = (784,) if flat else (1, 28, 28)
    images, test_images = (
        torch.from_numpy(array.copy()).float().div_(255).reshape(-1, *shape) for array in arrays[::2]
    )
    labels, test_labels = (torch.from_numpy(array.copy()).long() for array in arrays[1::2])
    if reconstruct:
        labels, test_labels = images, test_images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation = order[:-5000], order[-5000:]
    return TensorData(
        (images[train], labels[train]),
        (images[validation], labels[validation]),
        (test_images, test_labels),
    )
