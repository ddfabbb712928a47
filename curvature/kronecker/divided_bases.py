"""What K-FAC and EK-FAC share where ranks keep eigenbases divided among them (``inverses="owner"``)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from curvature.kronecker import owned
from curvature.kronecker.estimator import KroneckerEstimator
from curvature.kronecker.learning import held
from curvature.kronecker.operator import KroneckerOperator
from curvature.protocols import State


class DividedBases(KroneckerEstimator):
    """Base of :class:`KFAC` and :class:`EKFAC`, which have the field ``inverses``."""

    inverses: Literal["everywhere", "owner"]

    #: What an owner keeps, by the names that it has in the state of ``inverses="everywhere"``.
    _divided: ClassVar[tuple[str, ...]] = owned.VECTORS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inverses not in ("everywhere", "owner"):
            raise ValueError(f"inverses must be 'everywhere' or 'owner', got {self.inverses!r}")

    @property
    def _owned(self) -> bool:
        return self.inverses == "owner"

    @property
    def gathered_keys(self) -> tuple[str, ...]:
        """What ranks keep divided."""
        return self._divided if self._owned else ()

    @property
    def outlives_a_step(self) -> bool:
        """Whether a run cannot go on from a state that lacks what ranks keep divided."""
        return self._owned and self.inverse_interval > 1

    def gather(self, state: State) -> dict[str, list[Tensor]]:
        """All of it, from its owners."""
        return owned.gathered(state, self._layout_of(state, None), self._divided)

    def check_gathered(self, state: State, given: dict[str, list[Tensor]] | None) -> None:
        """Refuse a loaded state from which the run would go on otherwise."""
        name = f'{type(self).__name__}(inverses="owner") with inverse_interval={self.inverse_interval}'
        refusal = name if self.outlives_a_step else ""
        owned.check_gathered(state, self._layout_of(state, None), given, self._divided, refusal)

    def take_gathered(self, state: State, given: dict[str, list[Tensor]]) -> None:
        """Keep this process's own of what was loaded."""
        owned.take_gathered(state, self._layout_of(state, None), given)

    def _owned_operator(self, state: State, factored: bool) -> KroneckerOperator:
        layout = self._layout_of(state, None)
        bases = owned.bases_of(state, layout)
        return owned.OwnedKroneckerOperator(
            self._like(state, layout),
            layout,
            [owned.eigenblock(state, bases, b) for b in layout.blocks],
            [d.clone() for d in held(state, "diagonal")],
            factored,
            bases,
        )
