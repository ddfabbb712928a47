"""A curvature operator as SciPy sees linear operators, for ``eigsh`` and its kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def to_scipy(operator: CurvatureOperator, like: Sequence[Tensor] | None = None) -> LinearOperator:
    """B as a symmetric ``scipy.sparse.linalg.LinearOperator`` on flat float64 vectors of length P.

    Vectors go to the parameters' device and dtype for a product and come back as float64. SciPy's own arithmetic
    is in float64, but a product is as precise as the parameters: with float32 ones ask ``eigsh`` for ``tol=1e-5``.

    Args:
        operator: B.
        like: tensors shaped like the parameters, where the operator does not know them (``operator.like``).

    Returns:
        a linear operator of shape (P, P).

    >>> from scipy.sparse.linalg import eigsh
    >>> from curvature import DiagonalOperator
    >>> B = to_scipy(DiagonalOperator([torch.tensor([1.0, 5.0, 3.0, -2.0]).double()]))
    >>> eigsh(B, k=1, which="LA", return_eigenvectors=False).round(6)
    array([5.])

    Cost: one product of B a product, and two copies of a vector between host and device.
    """
    from scipy.sparse.linalg import LinearOperator

    if like is None:
        like = getattr(operator, "like", None)
        if like is None:
            raise ValueError(
                f"{type(operator).__name__} does not tell its shapes: pass like=, the parameters"
            )
    shaped: Sequence[Tensor] = like
    size = vectors.numel(shaped)

    def matvec(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if np.iscomplexobj(x):  # B is real
            return matvec(x.real) + 1j * matvec(x.imag)
        flat = torch.from_numpy(np.array(x, dtype=np.float64).reshape(-1))
        v = [
            piece.to(p.device, vectors.compute_dtype(p.dtype))
            for piece, p in zip(vectors.unflatten(flat, shaped), shaped, strict=True)
        ]
        return np.concatenate(
            [y.detach().to("cpu", torch.float64).reshape(-1).numpy() for y in operator.matvec(v)]
        )

    return LinearOperator((size, size), matvec=matvec, rmatvec=matvec, dtype=np.float64)
