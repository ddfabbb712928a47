"""A character language model: GPT with 4 layers of width 128 and context 64, on Moby Dick or the Brown corpus."""

from __future__ import annotations

import functools
import gzip
import math
from collections.abc import Callable, Iterator
from importlib import resources

import numpy as np
import torch
from torch import Tensor, nn

from optimizers.ablation.data import BROWN, prepare
from optimizers.ablation.workload import Batch, Split, Workload, cross_entropy

CONTEXT, WIDTH, HEADS, LAYERS = 64, 128, 4, 4


class TextData:
    """A text as characters: the first 90% for training, then 5% for validation and 5% for the test."""

    def __init__(self, text: str) -> None:
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        present = np.flatnonzero(np.bincount(points))
        self.characters = [chr(point) for point in present]
        number = np.zeros(present[-1] + 1, dtype=np.int64)
        number[present] = np.arange(len(present))
        codes = torch.from_numpy(number[points])
        first, second = len(codes) * 90 // 100, len(codes) * 95 // 100
        self._splits: dict[Split, Tensor] = {
            "train": codes[:first],
            "validation": codes[first:second],
            "test": codes[second:],
        }

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        codes = self._splits["train"]
        while True:
            starts = torch.randint(len(codes) - CONTEXT, (batch_size,), generator=generator)
            yield self._windows(codes, starts)

    def evaluation(self, split: Split, limit: int | None = None) -> Iterator[Batch]:
        codes = self._splits[split]
        starts = torch.arange(0, len(codes) - CONTEXT, CONTEXT)
        # shuffled, so that the first few are spread over the whole split and are the first of more
        starts = starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(0))][:limit]
        for part in starts.split(256):
            yield self._windows(codes, part)

    @staticmethod
    def _windows(codes: Tensor, starts: Tensor) -> Batch:
        positions = starts[:, None] + torch.arange(CONTEXT + 1)
        windows = codes[positions]
        return windows[:, :-1], windows[:, 1:]


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a layer norm and around a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        x = x + self._attention(self.norm_1(x))
        update: Tensor = self.feed_forward(self.norm_2(x))
        return x + update

    def _attention(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        parts = self.queries_keys_values(x).reshape(batch, time, 3, HEADS, WIDTH // HEADS)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        # written out: fused attention kernels have no double backward, which Hessian products need
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        future = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed: Tensor = self.projection((weights @ v).transpose(1, 2).reshape(batch, time, WIDTH))
        return mixed


class CharacterGPT(nn.Module):
    """Map characters (batch, time) to logits of the next ones (batch, time, vocabulary)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.apply(_initialise)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits."""
        x = self.characters(codes) + self.positions(torch.arange(codes.shape[1], device=codes.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def bits_per_character(outputs: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy in bits."""
    return cross_entropy(outputs, target) / math.log(2)


@functools.cache
def moby_dick() -> TextData:
    """Load Moby Dick (public domain), which this package ships."""
    compressed = resources.files(__package__).joinpath("moby-dick.txt.gz").read_bytes()
    return TextData(gzip.decompress(compressed).decode())


@functools.cache
def brown() -> TextData:
    """Load the Brown corpus from where data sets are."""
    path = prepare(BROWN) / BROWN.files[0][0]
    return TextData(gzip.decompress(path.read_bytes()).decode())


def _workload(name: str, text: str, data: Callable[[], TextData], check: Callable[[], object]) -> Workload:
    return Workload(
        name=name,
        summary=f"{text}, character language model: GPT 4 layers x 128, context 64 (0.8 M parameters)",
        model=lambda: CharacterGPT(len(data().characters)),
        data=data,
        loss=cross_entropy,
        metric=bits_per_character,
        metric_name="bits per character",
        higher_is_better=False,
        steps=2000,
        batch_size=32,
        evaluation_samples=512,
        prepare=check,
    )


WORKLOAD = _workload("character-gpt", "Moby Dick", moby_dick, lambda: None)
BROWN_WORKLOAD = _workload("character-gpt-brown", "Brown corpus", brown, lambda: prepare(BROWN))
