"""Symmetric matrices in half the room: what ranks send each other of a Kronecker factor.

Legend: M (…, n, n) symmetric, k = ⌊n/2⌋ rows above and n - k below. The triangle above the diagonal consists of a
rectangle, the upper triangle of the upper left block, and that of the lower right one; the second and the third, laid
opposite each other, fill a k x (k + 1) rectangle (the idea of LAPACK's rectangular full packed format; Gustavson et al.
2010, ACM Trans. Math. Softw. 37(2)). So nothing but rectangles is copied, and no index is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed(M: Tensor) -> Tensor:
    """The n(n+1)/2 numbers of every matrix, (…, n(n+1)/2).

    Args:
        M: (…, n, n) symmetric; of entries that differ from their mirror images by rounding one of the two is kept.

    >>> packed(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
    tensor([2., 3., 1.])

    Cost: two passes over half of M.
    """
    lead, n = M.shape[:-2], M.shape[-1]
    k, odd = n // 2, n % 2
    mixed = pad(M[..., :k, :k].triu(), (1, 0)) + pad(M[..., k + odd :, k : n - odd].tril(), (0, 1))
    pieces = [M[..., :k, k:], mixed]
    if odd:
        pieces.append(M[..., k:, k:].diagonal(dim1=-2, dim2=-1))
    return torch.cat([x.reshape(*lead, -1) for x in pieces], -1)


def unpack_(P: Tensor, M: Tensor) -> Tensor:
    """Write what :func:`packed` gave into ``M``, exactly symmetric.

    Args:
        P: (…, n(n+1)/2).
        M: (…, n, n), overwritten.

    >>> unpack_(torch.tensor([2.0, 3.0, 1.0]), torch.empty(2, 2))
    tensor([[1., 2.],
            [2., 3.]])
    """
    lead, n = M.shape[:-2], M.shape[-1]
    k, odd = n // 2, n % 2
    sizes = [k * (n - k), k * (k + 1), n - k if odd else 0]
    rectangle, flat, diagonal = P.split(sizes, -1)
    M[..., :k, k:] = rectangle.reshape(*lead, k, n - k)
    M[..., k:, :k] = M[..., :k, k:].mT
    mixed = flat.reshape(*lead, k, k + 1)
    upper, lower = mixed[..., 1:], mixed[..., :-1]
    M[..., :k, :k] = upper.triu() + upper.triu(1).mT
    if odd:
        M[..., k:, k:] = torch.diag_embed(diagonal)
        M[..., k + 1 :, k:-1] += lower.tril()
        M[..., k:-1, k + 1 :] += lower.tril().mT
    else:
        M[..., k:, k:] = lower.tril() + lower.tril(-1).mT
    return M
