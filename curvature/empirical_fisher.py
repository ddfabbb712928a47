"""The empirical Fisher diagonal: running means of squared gradients, what Adam and SOAA are built on.

Legend: g the batch gradient, g_n the gradient of sample n's own loss, c_n its weight in the batch loss
(1/N for a mean), u_n = c_n g_n its share of the batch gradient, v the running mean, t the updates seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.operators import DiagonalOperator
from curvature.protocols import Estimator, Needs, Observation, State
from curvature.registry import estimators
from curvature.running_mean import bias_corrected, check_beta


@dataclass(frozen=True)
class EmpiricalFisherDiagonal(Estimator):
    """diag(E[g gᵀ]) by a running mean of squared gradients, bias-corrected.

    The cheapest curvature there is, and the one of Adam and SOAA. With ``samples="batch"`` the square is taken of
    the batch gradient, which mixes the samples' gradients before squaring; ``samples="per_sample"`` is the empirical
    Fisher proper, Σ c_n g_n².

    Args:
        beta: decay of the running mean, in [0, 1); 0 keeps only the last batch.
        samples: what is squared: the ``"batch"`` gradient, or the ``"per_sample"`` gradients.

    >>> estimator = EmpiricalFisherDiagonal(beta=0.9)
    >>> state = estimator.init([torch.zeros(2)])
    >>> estimator.update(state, Observation(gradient=[torch.tensor([1.0, -2.0])]))
    >>> estimator.operator(state).diagonal()
    [tensor([1., 4.])]

    Cost: O(P) time, 4 bytes a float32 parameter of state.
    References: Kingma & Ba 2015, arXiv 1412.6980; Kunstner et al. 2019, arXiv 1905.12558 (its limits).
    """

    beta: float = 0.999
    samples: Literal["batch", "per_sample"] = "batch"

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.samples not in ("batch", "per_sample"):
            raise ValueError(f"samples must be 'batch' or 'per_sample', got {self.samples!r}")

    @property
    def needs(self) -> Needs:
        """Gradients; of every sample with ``samples="per_sample"``."""
        return Needs.GRAD if self.samples == "batch" else Needs.GRAD | Needs.PER_SAMPLE_GRAD

    @property
    def tracks_second_moment(self) -> bool:  # type: ignore[override]
        """The batch form is the second moment itself."""
        return self.samples == "batch"

    def init(self, params: Sequence[Tensor]) -> State:
        """v = 0 and t = 0 for every parameter."""
        return {"second_moment": vectors.zeros_like(params), "count": [vectors.scalar_like([p]) for p in params]}

    def update(self, state: State, seen: Observation) -> None:
        """v ← β v + (1-β) g²."""
        second_moment = cast("list[Tensor]", state["second_moment"])
        count = cast("list[Tensor]", state["count"])
        if self.samples == "per_sample":
            squares = cast("list[Tensor]", seen.statistics["squares"])
            live = [i for i, g in enumerate(seen.gradient) if g is not None]
            torch._foreach_lerp_([second_moment[i] for i in live], [squares[i] for i in live], 1.0 - self.beta)
        else:
            live = [i for i, g in enumerate(seen.gradient) if g is not None]
            v = [second_moment[i] for i in live]
            g = [cast(Tensor, seen.gradient[i]).to(second_moment[i].dtype) for i in live]
            torch._foreach_mul_(v, self.beta)
            torch._foreach_addcmul_(v, g, g, 1.0 - self.beta)
        if live:
            torch._foreach_add_([count[i] for i in live], 1.0)

    def operator(self, state: State) -> DiagonalOperator:
        """diag(v / (1 - βᵗ))."""
        return DiagonalOperator(bias_corrected(state["second_moment"], state["count"], self.beta))  # type: ignore[arg-type]


estimators.add("empirical-fisher-diagonal", EmpiricalFisherDiagonal)
