"""Random numbers that belong to a sample: the same for it in whatever micro-batch, and on whatever rank, it comes.

A ``torch.Generator`` is a stream, so what a sample gets depends on who came before it in the same call. Here a number
is a hash of (seed, draw, sample, element): labels drawn for k micro-batches, or on many ranks, are those drawn for the
one large batch, and every device draws the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvature.shared_work import team

_MASK = (1 << 32) - 1
# Two rounds of xorshift and this odd factor change each output bit with probability 1/2 when an input bit changes; the
# factor has 27 bits, so that products of 32-bit numbers stay below 2^63.
_FACTOR = 0x45D9F3B


def sample_numbers(first: int, count: int, device: torch.device) -> Tensor:
    """The numbers of this process's samples ``first``, …, ``first + count - 1`` in the whole batch.

    Ranks hold every R-th sample, as ``torch.utils.data.DistributedSampler`` deals them.

    >>> sample_numbers(2, 3, torch.device("cpu"))
    tensor([2, 3, 4])
    """
    ranks = team()
    here = torch.arange(first, first + count, device=device)
    return here if ranks is None else here * ranks.size + ranks.rank


def uniform(seed: int, index: int, samples: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Independent numbers, uniform in (0, 1): (samples, elements).

    Args:
        seed: the user's seed.
        index: which draw; the caller counts.
        samples: the samples' numbers, int64.
        elements: numbers a sample.
        dtype: float32 or float64.

    >>> whole = uniform(0, 0, torch.arange(4), 2, torch.float64)
    >>> torch.equal(whole[2:], uniform(0, 0, torch.arange(2, 4), 2, torch.float64))
    True

    Cost: O(samples · elements), with a few temporaries of that size.
    """
    key = 0
    for part in (seed, seed >> 32, index, index >> 32):
        key = _mixed_int(key ^ (part & _MASK) ^ 0x9E3779B9)
    rows = mixed(mixed(samples & _MASK ^ key) ^ (samples >> 32) & _MASK)
    columns = mixed(torch.arange(elements, device=samples.device) ^ 0x85EBCA6B)
    high = mixed(rows.unsqueeze(-1) ^ columns)
    if dtype == torch.float64:
        low = mixed(high ^ 0xC2B2AE35)
        # 52 bits, centred: neither 0 nor 1
        return (((high << 20) | (low >> 12)).to(dtype) + 0.5) * 2.0**-52
    return ((high >> 9).to(dtype) + 0.5) * 2.0**-23


def normal(seed: int, index: int, samples: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Independent standard normal numbers: (samples, elements)."""
    return torch.erfinv(uniform(seed, index, samples, elements, dtype) * 2 - 1) * math.sqrt(2)


def mixed(x: Tensor) -> Tensor:
    """A bijection of the 32-bit numbers that looks random; ``x`` int64."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * _FACTOR & _MASK
    return (x >> 16) ^ x


def _mixed_int(x: int) -> int:
    for _ in range(2):
        x = ((x >> 16) ^ x) * _FACTOR & _MASK
    return (x >> 16) ^ x
