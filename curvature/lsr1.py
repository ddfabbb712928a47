"""Symmetric rank-one quasi-Newton curvature: indefinite where the function is.

Legend: see :mod:`curvature.limited_memory`; v = y - B s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.limited_memory import ROUNDING, LimitedMemory
from curvature.protocols import State
from curvature.registry import estimators


@dataclass(frozen=True)
class LSR1(LimitedMemory):
    """B ← B + v vᵀ / sᵀv over the last pairs: learns curvature of any sign, from gradients alone.

    For trust regions, which can use negative curvature. Each pair's y is the difference of two steps' gradients, so
    with minibatches it holds the difference of two batches' noise as well: use the full batch, large batches, or a
    batch that stays for several steps. A rejected step has s = 0 and teaches nothing.

    Args:
        history: m >= 1 pairs.
        initial_curvature: γ outside the span of the pairs, see :class:`curvature.limited_memory.LimitedMemory`.
        skip_below: r in [0, 1): a pair with |sᵀv| < r ‖s‖ ‖v‖ is skipped, as its update would be unbounded; so is one
            whose sᵀv is within rounding of 0.

    >>> import torch
    >>> from curvature import Observation
    >>> H = torch.diag(torch.tensor([2.0, -1.0]))  # the pairs of a quadratic are s, H s
    >>> estimator = LSR1(history=2)
    >>> state, x = estimator.init([torch.zeros(2)]), torch.zeros(2)
    >>> for step in (torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])):
    ...     x = x + step
    ...     estimator.update(state, Observation([H @ x], step_change=[step]))
    >>> estimator.operator(state).to_dense().round(decimals=3) + 0.0
    tensor([[ 2.,  0.],
            [ 0., -1.]])

    Cost: O(m² P) a step, 8 m + 4 bytes a float32 parameter of state.
    References: Conn, Gould & Toint 1991; Byrd, Nocedal & Schnabel 1994; Nocedal & Wright 2006, (6.24) and (6.26).
    """

    skip_below: float = 1e-8

    semidefinite = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.skip_below < 1.0:
            raise ValueError(f"skip_below must be in [0, 1), got {self.skip_below}")

    def accepts(self, state: State, s: list[Tensor], y: list[Tensor], noise: float | Tensor = 0.0) -> Tensor:
        """|sᵀv| >= r ‖s‖ ‖v‖ with the present B, and a pair that B does not fit already."""
        Bs = self.operator(state).matvec(s)
        v = vectors.add(y, Bs, -1.0)
        product, length = vectors.dot(s, v).abs(), vectors.norm(v)
        rounding = noise + ROUNDING * vectors.epsilon(s) * (vectors.norm(y) + vectors.norm(Bs))
        enough = product > vectors.norm(s) * torch.maximum(rounding, self.skip_below * length)
        return enough & torch.isfinite(length)

    def updated(self, B: Tensor, s: Tensor, y: Tensor) -> Tensor:
        """B + v vᵀ / sᵀv, eq. (6.24), with the same test, since older pairs may have gone."""
        v = y - B @ s
        product = torch.dot(s, v)
        length = torch.linalg.vector_norm(v)
        # A pair that B fits to rounding leaves nothing but rounding in v, and so in sᵀv.
        sizes = torch.linalg.vector_norm(y) + torch.linalg.vector_norm(B @ s)
        limit = torch.maximum(ROUNDING * torch.finfo(B.dtype).eps * sizes, self.skip_below * length)
        good = product.abs() > torch.linalg.vector_norm(s) * limit
        return torch.where(good, B + torch.outer(v, v) / torch.where(good, product, 1.0), B)


estimators.add("lsr1", LSR1)
