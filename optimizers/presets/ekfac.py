"""EK-FAC (arXiv 1806.03884): K-FAC's eigenbasis with eigenvalues that are measured in it."""

from __future__ import annotations

from typing import Any, Literal

import curvature
from optimizers.presets.kfac import KFAC
from optimizers.registry import optimizers


class EKFAC(KFAC):
    """Eigenvalue-corrected Kronecker factors x KL ellipsoid x Levenberg-Marquardt damping.

    :class:`KFAC` with another diagonal in its eigenbasis, never further from the Fisher matrix. Its bases can be
    refreshed rarely, since the eigenvalues follow at every measurement. Loops and damping are those of :class:`KFAC`.

    Arguments and errors are those of :class:`KFAC`, but for ``damping_kind``: λ is added to the measured eigenvalues.
    With ``refresh="qr"`` a basis follows its factor by one step of orthogonal iteration, in place of a new
    eigendecomposition (``"eigh"``, the default).

    >>> import torch
    >>> model, x, y = torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1])
    >>> optimizer = EKFAC(model, lr=0.5, damping="fixed", radius=1.0, fisher="type-2")
    >>> for _ in range(30):
    ...     optimizer.zero_grad()
    ...     outputs = model(x)
    ...     loss = torch.nn.functional.cross_entropy(outputs, y)
    ...     optimizer.backward(loss, outputs)
    ...     optimizer.step()
    >>> bool(loss < 0.1)
    True

    Cost: see :class:`curvature.EKFAC`; with ``damping="trial"`` one forward pass a step more.
    Reference: George et al. 2018, arXiv 1806.03884, section 3 and algorithm 1.
    """

    estimator = curvature.EKFAC

    def _own_options(
        self, damping_kind: Literal["exact", "factored"] | None, refresh: Literal["eigh", "qr"] | None
    ) -> dict[str, Any]:
        if damping_kind not in (None, "exact"):
            raise ValueError(
                f"EKFAC's damping is exact, got damping_kind={damping_kind!r}: leave it out, or use KFAC"
            )
        return {} if refresh is None else {"refresh": refresh}


optimizers.add("ekfac", EKFAC)
