"""No curvature at all: B = I, the reference column of every ablation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from curvature.operators import IdentityOperator
from curvature.protocols import TRANSIENT, Estimator, Needs, Observation, State
from curvature.registry import estimators


@dataclass(frozen=True)
class Identity(Estimator):
    """B = I: the step is the (clipped, normalised, …) gradient itself.

    The control of every ablation of curvature: whatever the region and the radius do, they do it here without
    second-order information. SGD, signSGD, Muon and LARS are this estimator with different regions.

    >>> import torch
    >>> estimator = Identity()
    >>> state = estimator.init([torch.zeros(3)])
    >>> estimator.operator(state).matvec([torch.arange(3.0)])
    [tensor([0., 1., 2.])]

    Cost: nothing.
    """

    semidefinite = True

    @property
    def needs(self) -> Needs:
        """Nothing but the gradient."""
        return Needs.GRAD

    shardable = True

    def init(self, params: Sequence[Tensor]) -> State:
        """Expanded scalars stand for the shapes, for the time of a step: no memory a parameter, nothing to save."""
        return {TRANSIENT: shapes_of(params)}

    def update(self, state: State, seen: Observation) -> None:
        """Nothing to learn but the shapes."""
        state.setdefault(TRANSIENT, shapes_of(seen.parameters))

    def operator(self, state: State) -> IdentityOperator:
        """The identity."""
        return IdentityOperator(cast("list[Tensor]", state[TRANSIENT]))


def shapes_of(params: Sequence[Tensor]) -> list[Tensor]:
    """One element each, expanded to the shape."""
    return [p.detach().new_empty(()).expand(p.shape) for p in params]


estimators.add("identity", Identity)
