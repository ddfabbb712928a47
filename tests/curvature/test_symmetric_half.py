"""Symmetric matrices packed into half of their room."""

from __future__ import annotations

import pytest
import torch

from curvature.symmetric_half import packed, unpack_


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("lead", [(), (3,), (2, 1)])
def test_a_round_trip_keeps_every_number_in_half_the_room(n: int, lead: tuple[int, ...]) -> None:
    X = torch.randn(*lead, n, n, generator=torch.Generator().manual_seed(n))
    M = X + X.mT
    P = packed(M)
    assert P.shape == (*lead, n * (n + 1) // 2)
    torch.testing.assert_close(unpack_(P, torch.full_like(M, torch.nan)), M, rtol=0.0, atol=0.0)
    # every number stands in it once: the sums are those of the triangle
    torch.testing.assert_close(P.sum(-1), M.triu().sum((-2, -1)))


def test_what_is_unpacked_is_symmetric_to_the_bit() -> None:
    X = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    M = X.T @ X + 1e-6 * X
    found = unpack_(packed(M), torch.empty(7, 7))
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, M, rtol=1e-4, atol=1e-4)
