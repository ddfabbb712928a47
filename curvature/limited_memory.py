"""What limited-memory quasi-Newton estimators share: pairs of steps and gradient changes, and the matrix they make.

Legend: m the history, s = θ_t - θ_{t-1}, y = g_t - g_{t-1}; S, Y the pairs in the order of their age; Q (P, 2m) an
orthonormal basis of all s and y; ŝ = Qᵀs, ŷ = Qᵀy. B = γI outside the span of Q, so the recursion that updates B
pair by pair runs entirely on B̂ = Qᵀ B Q, a small dense matrix: the compact representation of Byrd, Nocedal &
Schnabel 1994, in coordinates in which nothing is inverted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.low_rank_operator import LowRankOperator, flat_rows, split_rows
from curvature.protocols import Estimator, Needs, Observation, State

#: How many units of roundoff count as rounding in a sum or a difference.
ROUNDING = 8
#: sᵀy / ‖s‖ ‖y‖ above which a pair's curvature is taken for positive: its reciprocal scales γ.
POSITIVE = 1e-8


@dataclass(frozen=True)
class LimitedMemory(Estimator):
    """Keeps the last m pairs (s, y) that a subclass accepts; see :class:`curvature.LSR1` and :class:`curvature.LBFGS`.

    A pair counts where the same parameters had a gradient at both of its ends: a parameter that had none in between, or
    that an optimizer was given later, moved by an s that belongs to another y.

    Args:
        history: m >= 1.
        initial_curvature: γ, the curvature in every direction that no pair knows: ``"scaled"`` is yᵀy / sᵀy of the
            newest pair with sᵀy > 10⁻⁸ ‖s‖ ‖y‖ (1 before there is one), or a number > 0.
    """

    history: int = 10
    initial_curvature: float | Literal["scaled"] = "scaled"

    tracks_steps = True

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"history must be >= 1, got {self.history}")
        if isinstance(self.initial_curvature, str):
            if self.initial_curvature != "scaled":
                raise ValueError(
                    f"initial_curvature must be 'scaled' or a number > 0, got {self.initial_curvature!r}"
                )
        elif not self.initial_curvature > 0:
            raise ValueError(f"initial_curvature must be > 0, got {self.initial_curvature}")

    @property
    def needs(self) -> Needs:
        """Gradients."""
        return Needs.GRAD

    def init(self, params: Sequence[Tensor]) -> State:
        """No pair; ``age`` numbers the pairs as they come, -1 is an empty place."""

        def places() -> list[Tensor]:
            return [
                torch.zeros((self.history, *p.shape), dtype=vectors.compute_dtype(p.dtype), device=p.device)
                for p in params
            ]

        return {
            "steps": places(),
            "gradient_changes": places(),
            "previous_gradient": vectors.zeros_like(params),
            # the update in which a parameter last had a gradient, from 1
            "last_seen": [torch.zeros((), dtype=torch.int64, device=p.device) for p in params],
            "age": torch.full((self.history,), -1, dtype=torch.int64, device=params[0].device),
            "seen": 0,
        }

    def update(self, state: State, seen: Observation) -> None:
        """Take in the pair of the last step, if it is acceptable; nothing waits for the host."""
        previous = cast("list[Tensor]", state["previous_gradient"])
        gradient = [
            p if g is None else g.detach().to(p.dtype) for g, p in zip(seen.gradient, previous, strict=True)
        ]
        count = cast(int, state["seen"])
        last = cast("list[Tensor]", state["last_seen"])
        same = self.same_parameters(last, count, seen.gradient)
        if count > 0:
            if seen.step_change is None:
                raise RuntimeError(
                    f"{type(self).__name__} needs the change of the parameters (tracks_steps): use it in "
                    "optimizers.SecondOrder, or fill Observation.step_change"
                )
            s = [x.detach().to(p.dtype) for x, p in zip(seen.step_change, previous, strict=True)]
            y = [g - p for g, p in zip(gradient, previous, strict=True)]
            # y holds the rounding of two gradients, which may be all of it after a short step
            noise = ROUNDING * vectors.epsilon(previous) * (vectors.norm(gradient) + vectors.norm(previous))
            self.insert(state, s, y, self.accepts(state, s, y, noise) & same)
        for p, g in zip(previous, gradient, strict=True):
            p.copy_(g)
        for t, given in zip(last, seen.gradient, strict=True):
            if given is not None:
                t.fill_(count + 1)
        state["seen"] = count + 1

    @staticmethod
    def same_parameters(last: Sequence[Tensor], count: int, gradient: Sequence[Tensor | None]) -> Tensor:
        """Whether exactly those parameters have a gradient that had one in update number ``count``, a 0-d bool."""
        changed = [(t == count) != (g is not None) for t, g in zip(last, gradient, strict=True)]
        return ~vectors.any_of(changed)

    def accepts(self, state: State, s: list[Tensor], y: list[Tensor], noise: float | Tensor = 0.0) -> Tensor:
        """Whether the pair is to be kept, a 0-d bool; NaN must give ``False``.

        Args:
            state: as it is before the pair.
            s: the step.
            y: the change of the gradient.
            noise: the length that rounding alone may have given y.
        """
        raise NotImplementedError

    def updated(self, B: Tensor, s: Tensor, y: Tensor) -> Tensor:
        """B̂ after one pair, or B̂ itself where the pair must be skipped; everything (n, n) or (n,)."""
        raise NotImplementedError

    def insert(self, state: State, s: list[Tensor], y: list[Tensor], accepted: Tensor) -> None:
        """Overwrite the oldest place with (s, y) where ``accepted``."""
        age = cast(Tensor, state["age"])
        place = age.argmin().reshape(1)
        for rows, row in (
            *zip(cast("list[Tensor]", state["steps"]), s, strict=True),
            *zip(cast("list[Tensor]", state["gradient_changes"]), y, strict=True),
        ):
            at = place.to(rows.device)
            rows.index_copy_(0, at, torch.where(accepted.to(rows.device), row[None], rows[at]))
        age.index_copy_(0, place, torch.where(accepted, age.amax() + 1, age[place]))

    def operator(self, state: State) -> LowRankOperator:
        """γI, and within the span of the pairs B̂, by its eigenvectors.

        Cost: O(P m²) for the orthonormal basis, once an operator.
        """
        steps, changes = cast("list[Tensor]", state["steps"]), cast("list[Tensor]", state["gradient_changes"])
        age = cast(Tensor, state["age"])
        W = torch.cat([flat_rows(steps), flat_rows(changes)])
        # Pairs of very different lengths would lose each other's digits in one QR; a scale a row does no harm.
        lengths = torch.linalg.vector_norm(W, dim=1)
        Q, R = torch.linalg.qr((W / torch.where(lengths > 0, lengths, 1.0)[:, None]).T)
        R = R * lengths
        order = age.argsort()
        s_hat, y_hat = R[:, : self.history][:, order].T, R[:, self.history :][:, order].T
        valid = age[order] >= 0
        gamma = self.gamma(s_hat, y_hat, valid)
        B = gamma * torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
        for s, y, held in zip(s_hat, y_hat, valid, strict=True):
            B = torch.where(held, self.updated(B, s, y), B)
        eigenvalues, V = torch.linalg.eigh(0.5 * (B + B.T))
        return LowRankOperator(split_rows((Q @ V).T, [x[0] for x in steps]), eigenvalues - gamma, gamma)

    def gamma(self, s: Tensor, y: Tensor, valid: Tensor) -> Tensor:
        """γ from the pairs (m, n), oldest first."""
        if isinstance(self.initial_curvature, str):
            found = torch.ones((), dtype=s.dtype, device=s.device)
            smallest = max(POSITIVE, ROUNDING * torch.finfo(s.dtype).eps)
            for s_i, y_i, held in zip(s, y, valid, strict=True):
                sy, yy = torch.dot(s_i, y_i), torch.dot(y_i, y_i)
                floor = smallest * torch.linalg.vector_norm(s_i) * yy.sqrt()
                found = torch.where(held & (sy > floor), yy / sy, found)
            return found
        return torch.full((), self.initial_curvature, dtype=s.dtype, device=s.device)
