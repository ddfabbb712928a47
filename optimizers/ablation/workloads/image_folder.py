"""Images in folders, as ImageNet is laid out, with ResNet-18: for those who have such data.

``$SOAA_IMAGE_FOLDER`` names a folder with ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``. One image in 50 of the
training folder is kept for validation; ``val`` is the test.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from optimizers.ablation.errors import AblationError
from optimizers.ablation.workload import Batch, Split, Workload, accuracy, cross_entropy

SIZE = 224
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def root() -> Path:
    """Return the folder of images; AblationError where there is none or Pillow is missing."""
    path = os.environ.get("SOAA_IMAGE_FOLDER", "")
    if not path or not all((Path(path) / part).is_dir() for part in ("train", "val")):
        raise AblationError(
            "workload 'image-folder' needs $SOAA_IMAGE_FOLDER: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, "
            f"got {path!r}"
        )
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise AblationError("workload 'image-folder' needs Pillow: pip install pillow") from None
    if not classes(Path(path)):
        raise AblationError(f"workload 'image-folder': {path}/train has no class folders")
    return Path(path)


def classes(folder: Path) -> list[str]:
    """Return the class names: the folders under ``train``, sorted."""
    return sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())


class FolderData:
    """Images read from disk when they are needed; training crops and flips are a function of the generator."""

    def __init__(self, folder: Path) -> None:
        numbers = {name: i for i, name in enumerate(classes(folder))}

        def files(part: str) -> list[tuple[Path, int]]:
            return [
                (path, number)
                for name, number in numbers.items()
                for path in sorted((folder / part / name).glob("*"))
                if path.suffix.lower() in SUFFIXES
            ]

        training = files("train")
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = max(1, len(training) // 50)
        self._splits: dict[Split, list[tuple[Path, int]]] = {
            "train": [training[i] for i in order[held_out:]],
            "validation": [training[i] for i in order[:held_out]],
            "test": files("val"),
        }
        for split, members in self._splits.items():
            if not members:
                raise AblationError(f"workload 'image-folder': no images for {split} in {folder}")
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        members = self._splits["train"]
        if batch_size > len(members):
            raise AblationError(
                f"batch_size must be <= {len(members)}, the training images, got {batch_size}"
            )
        while True:
            order = torch.randperm(len(members), generator=generator).tolist()
            for start in range(0, len(order) - batch_size + 1, batch_size):
                chosen = [members[i] for i in order[start : start + batch_size]]
                yield self._load(chosen, torch.rand(batch_size, 4, generator=generator, dtype=torch.float64))

    def evaluation(self, split: Split, limit: int | None = None) -> Iterator[Batch]:
        members = self._splits[split][:limit]
        for start in range(0, len(members), 64):
            yield self._load(members[start : start + 64], None)

    def _load(self, members: list[tuple[Path, int]], crops: Tensor | None) -> Batch:
        rows = [None] * len(members) if crops is None else crops.tolist()
        images = self._pool.map(read_image, [path for path, _ in members], rows)
        return torch.stack(list(images)), torch.tensor([number for _, number in members])


def read_image(path: Path, crop: list[float] | None) -> Tensor:
    """Read an image as a normalised (3, 224, 224) tensor.

    Args:
        path: the file.
        crop: four numbers in [0, 1) (area, horizontal and vertical place, flip) for training; None cuts out the
            centre after the shorter side was scaled to 256.

    Returns:
        The tensor.
    """
    from PIL import Image

    try:
        with Image.open(path) as stored:
            image = stored.convert("RGB")
    except OSError as error:
        raise AblationError(f"image {path} cannot be read: {error}") from error
    width, height = image.size
    shorter = min(width, height)
    # area between 8% and 100% of the largest square: Szegedy et al. 2015, arXiv 1409.4842
    side = shorter * SIZE / 256 if crop is None else shorter * (0.08 + 0.92 * crop[0]) ** 0.5
    across, down = (0.5, 0.5) if crop is None else (crop[1], crop[2])
    x, y = across * (width - side), down * (height - side)
    image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div_(255)
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    return pixels.flip(-1) if crop is not None and crop[3] < 0.5 else pixels


class Residual(nn.Module):
    """Two 3x3 convolutions around which the input is added (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return nn.functional.relu(self.branch(x) + self.shortcut(x))


def resnet18(outputs: int) -> nn.Module:
    """Build ResNet-18 for images of 224 x 224 (11.7 M parameters at 1,000 classes)."""
    widths = [
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 2),
        (256, 256, 1),
        (256, 512, 2),
    ]
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *(Residual(*shape) for shape in [*widths, (512, 512, 1)]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, outputs),
    )


WORKLOAD = Workload(
    name="image-folder",
    summary="your images behind $SOAA_IMAGE_FOLDER, laid out as ImageNet, ResNet-18 (11.7 M parameters)",
    model=lambda: resnet18(len(classes(root()))),
    data=lambda: FolderData(root()),
    loss=cross_entropy,
    metric=accuracy,
    metric_name="accuracy",
    higher_is_better=True,
    steps=5000,
    batch_size=128,
    prepare=functools.partial(root),
)
