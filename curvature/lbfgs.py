"""Limited-memory BFGS curvature: positive definite always.

Legend: see :mod:`curvature.limited_memory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvature import vectors
from curvature.limited_memory import ROUNDING, LimitedMemory
from curvature.protocols import State
from curvature.registry import estimators


@dataclass(frozen=True)
class LBFGS(LimitedMemory):
    """B ← B - B s sᵀB / sᵀB s + y yᵀ / sᵀy over the last pairs: positive definite, from gradients alone.

    For line searches and balls on functions whose curvature is mostly positive. Each pair's y is the difference of
    two steps' gradients, so with minibatches it holds the difference of two batches' noise as well: use the full
    batch, large batches, or ``safeguard="powell"``, which pulls such pairs towards the present B.

    Args:
        history: m >= 1 pairs.
        initial_curvature: γ outside the span of the pairs, see :class:`curvature.limited_memory.LimitedMemory`.
        safeguard: what keeps B positive definite: ``"skip"`` drops a pair with sᵀy <= skip_below ‖s‖ ‖y‖, or within
            rounding of 0;
            ``"powell"`` takes θy + (1-θ)Bs in place of y where sᵀy < 0.2 sᵀBs, with θ so that equality holds.
        skip_below: in [0, 1).

    >>> import torch
    >>> from curvature import Observation
    >>> H = torch.diag(torch.tensor([2.0, 1.0]))  # the pairs of a quadratic are s, H s
    >>> estimator = LBFGS(history=2, initial_curvature=1.0)
    >>> state, x = estimator.init([torch.zeros(2)]), torch.zeros(2)
    >>> for step in (torch.zeros(2), torch.tensor([1.0, 0.0])):
    ...     x = x + step
    ...     estimator.update(state, Observation([H @ x], step_change=[step]))
    >>> estimator.operator(state).to_dense().round(decimals=3) + 0.0
    tensor([[2., 0.],
            [0., 1.]])

    Cost: O(m² P) a step, 8 m + 4 bytes a float32 parameter of state.
    References: Byrd, Nocedal & Schnabel 1994; Nocedal & Wright 2006, (6.19), (18.14) and (18.15); Powell 1978.
    """

    safeguard: Literal["skip", "powell"] = "skip"
    skip_below: float = 1e-8

    semidefinite = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.safeguard not in ("skip", "powell"):
            raise ValueError(f"safeguard must be 'skip' or 'powell', got {self.safeguard!r}")
        if not 0.0 <= self.skip_below < 1.0:
            raise ValueError(f"skip_below must be in [0, 1), got {self.skip_below}")

    def accepts(self, state: State, s: list[Tensor], y: list[Tensor], noise: float | Tensor = 0.0) -> Tensor:
        """sᵀy > ε ‖s‖ ‖y‖; with Powell's safeguard any step that moved and changed the gradient."""
        length, change = vectors.norm(s), vectors.norm(y)
        finite = (length * change > 0) & torch.isfinite(length * change)
        if self.safeguard == "powell":
            return finite & (change > noise)
        rounding = noise + ROUNDING * vectors.epsilon(s) * change
        return finite & (vectors.dot(s, y) > length * torch.maximum(rounding, self.skip_below * change))

    def updated(self, B: Tensor, s: Tensor, y: Tensor) -> Tensor:
        """Eq. (6.19), with (18.14) and (18.15) where asked for."""
        Bs = B @ s
        sBs, sy = torch.dot(s, Bs), torch.dot(s, y)
        if self.safeguard == "powell":
            gap = torch.where(sBs > sy, sBs - sy, 1.0)
            theta = torch.where(sy < 0.2 * sBs, 0.8 * sBs / gap, 1.0)
            y = theta * y + (1.0 - theta) * Bs
            sy = torch.dot(s, y)
        good = (sBs > 0) & (sy > 0)
        change = torch.outer(y, y) / torch.where(good, sy, 1.0) - torch.outer(Bs, Bs) / torch.where(
            good, sBs, 1.0
        )
        return torch.where(good, B + change, B)


estimators.add("lbfgs", LBFGS)
