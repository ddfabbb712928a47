"""Random signs: fair, independent of each other, and the same for the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from curvature.probes import FEW, generator, probe, signs

CPU = torch.device("cpu")


def test_many_signs_are_fair_and_independent() -> None:
    """2²¹ signs, seed 0: every place of a word, every pair of places and neighbours at many distances.

    Sums are in standard deviations. Of the 64 places one in 10⁴ exceeds 4.7 by chance, of the 2,016 pairs 5.4.
    """
    n = 1 << 21
    z = signs((n,), torch.float64, CPU, generator(0, 0, CPU))
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    words = z.reshape(-1, 64)
    places = words.sum(0) / math.sqrt(len(words))
    assert float(places.abs().max()) < 4.7
    pairs = (words.T @ words) / math.sqrt(len(words))
    assert float(pairs.fill_diagonal_(0.0).abs().max()) < 5.4
    for lag in (1, 2, 7, 8, 9, 63, 64, 65, 128, 1024):
        assert abs(float(z[lag:] @ z[:-lag]) / math.sqrt(n - lag)) < 4.7, lag


@pytest.mark.parametrize("count", [1, 63, FEW, FEW + 1, 64 * FEW + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_dtypes_and_seeds(count: int, dtype: torch.dtype) -> None:
    like = [torch.zeros(count, 1, dtype=dtype), torch.zeros(3, count, dtype=dtype)]
    first, again, other = (probe(like, seed=s, index=i) for s, i in ((3, 1), (3, 1), (3, 2)))
    for x, y, z, p in zip(first, again, other, like, strict=True):
        assert (x.shape, x.dtype) == (p.shape, dtype)
        assert bool((x.abs() == 1).all())
        assert torch.equal(x, y)
        if count >= 63:
            assert not torch.equal(x, z)
    if count >= 63:
        assert not torch.equal(first[0].reshape(-1), first[1][0])
