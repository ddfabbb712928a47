"""Random probe vectors, drawn from a generator of their own so that the global random state stays untouched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from curvature.vectors import compute_dtype

Distribution = Literal["rademacher", "gaussian"]

Cut = Callable[[int, Tensor, Callable[[Sequence[int]], Tensor]], Tensor]
"""(i, this process's shard of tensor i, shape ↦ numbers drawn in that shape) ↦ the shard's part of the whole draw."""

_cut: Cut | None = None


@contextmanager
def drawn_whole(cut: Cut) -> Iterator[None]:
    """Inside, a probe of shards is the shards of the probe that one process with whole tensors would draw."""
    global _cut
    before, _cut = _cut, cut
    try:
        yield
    finally:
        _cut = before


def generator(seed: int, index: int, device: torch.device) -> torch.Generator:
    """A generator that depends only on ``seed`` and ``index``: the same on every rank and after a resume."""
    # One stream a (seed, index): the odd constant spreads neighbouring pairs over the seed space.
    return torch.Generator(device=device).manual_seed((seed * 0x9E3779B97F4A7C15 + index) % (1 << 63))


def probe(
    params: Sequence[Tensor], seed: int, index: int, distribution: Distribution = "rademacher"
) -> list[Tensor]:
    """One probe z with E[z zᵀ] = I, shaped like ``params``.

    Args:
        params: shapes, devices and dtypes.
        seed: the user's seed.
        index: which probe; the caller counts.
        distribution: ``"rademacher"`` (±1; the smallest variance for a diagonal) or ``"gaussian"``.

    >>> z = probe([torch.zeros(1000)], seed=0, index=0)[0]
    >>> sorted(set(z.tolist()))
    [-1.0, 1.0]
    """
    if distribution not in ("rademacher", "gaussian"):
        raise ValueError(f"distribution must be 'rademacher' or 'gaussian', got {distribution!r}")
    generators: dict[torch.device, torch.Generator] = {}
    drawn = []
    for i, p in enumerate(params):
        random = generators.setdefault(p.device, generator(seed, index, p.device))

        def draw(shape: Sequence[int], p: Tensor = p, random: torch.Generator = random) -> Tensor:
            dtype = compute_dtype(p.dtype)
            if distribution == "rademacher":
                return signs(shape, dtype, p.device, random)
            return torch.randn(tuple(shape), generator=random, device=p.device, dtype=dtype)

        drawn.append(draw(p.shape) if _cut is None else _cut(i, p, draw))
    return drawn


FEW = 1 << 12
"""Signs up to here are a number each: their drawing costs less than taking words apart."""


def signs(shape: Sequence[int], dtype: torch.dtype, device: torch.device, random: torch.Generator) -> Tensor:
    """Independent signs, ±1 with probability ½; many of them are the bits of random words.

    >>> set(signs((100,), torch.float32, torch.device("cpu"), torch.Generator()).tolist()) == {-1.0, 1.0}
    True
    """
    count = math.prod(shape)
    if count <= FEW:
        bits = torch.randint(0, 2, tuple(shape), generator=random, device=device, dtype=torch.int8)
        return bits.to(dtype).mul_(2.0).sub_(1.0)
    # A generator on a CPU draws one number after another: 64 signs a number are a 64th of that time.
    words = torch.empty(-(-count // 64), dtype=torch.int64, device=device)
    words.random_(-(1 << 63), None, generator=random)  # all 64 bits; the default leaves the highest at zero
    octets = words.view(torch.uint8).to(torch.int32)
    signs_of = (torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)) & 1
    table = signs_of.to(dtype).mul_(2.0).sub_(1.0)
    return table.index_select(0, octets).reshape(-1)[:count].reshape(tuple(shape))
