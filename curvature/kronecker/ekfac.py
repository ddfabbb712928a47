"""EK-FAC: K-FAC's eigenbasis with the curvature along each of its axes measured, not multiplied together.

Legend: Q_G, Q_A the eigenvectors of K-FAC's factors; S = Σ_n (Q_Gᵀ ∇_n Q_A)² the second moments of the samples'
gradients in that basis. The block is (Q_G ⊗ Q_A) diag(S) (Q_G ⊗ Q_A)ᵀ, S in place of K-FAC's λ_G λ_Aᵀ.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from curvature.estimate import add_statistics, check_derivatives
from curvature.kronecker import learning, measurement, owned, owned_moments
from curvature.kronecker.divided_bases import DividedBases
from curvature.kronecker.eigen import eigh_here, eigh_many
from curvature.kronecker.equal_eigenvalues import without_choice
from curvature.kronecker.layout import Block, Layout
from curvature.kronecker.learning import held
from curvature.kronecker.live import Parts
from curvature.kronecker.moments import HELD, Held
from curvature.kronecker.operator import Eigenblock, KroneckerOperator
from curvature.kronecker.orthogonal_iteration import iterate_here, iterate_many
from curvature.kronecker.send_back import Accumulators
from curvature.kronecker.spare import Spare
from curvature.loss_graph import LossGraph
from curvature.problem import Problem
from curvature.protocols import TRANSIENT, Observation, State, Statistics
from curvature.registry import estimators
from curvature.running_mean import running_mean_
from curvature.shared_work import Team, team
from curvature.side_effects import same_random_numbers


@dataclass(frozen=True)
class EKFAC(DividedBases):
    """K-FAC's eigenbasis with re-measured eigenvalues: never further from Gauss-Newton, in the Frobenius norm.

    S is the diagonal of the Gauss-Newton block (of the sampled or empirical Fisher) in K-FAC's eigenbasis, and the
    diagonal is the best diagonal there is. Choose it over :class:`KFAC` where eigenbases are refreshed rarely: S
    follows at every measurement, for the cost of per-sample gradients in the basis.

    A block's first S needs its first basis, which is known only when the first step's micro-batches and ranks have all
    been seen. So that step holds what layers saw and got, up to 2²⁶ numbers, and forms S at its end: the first update
    is the one-shot estimate of the whole batch, however it is split. What is larger is held no longer: one batch in
    one process is looked at twice in place of it, and several start from K-FAC's λ_G λ_Aᵀ, with a warning. From then on
    S is a running mean. When a basis is refreshed, the block is carried over and its diagonal in the new basis kept.

    With ``inverses="owner"`` the owner of a block keeps its S beside its basis, and lends the basis for a moment to the
    others, who measure in it: a measurement then holds what layers saw and got, as the first step does. What is larger
    than 2²⁶ numbers is looked at once more, with all bases at hand for that long.

    Its arguments are those of :class:`KFAC`, without ``damping_kind`` (damping is exact, 1 / (S + λ)), and one more. A
    run with ``inverses="owner"`` goes on only from ``gathered_state_dict()``, whatever its ``inverse_interval``.

    Args:
        refresh: how a basis follows its factor: ``"eigh"`` decomposes it anew; ``"qr"`` takes one step of orthogonal
            iteration from the basis before (the first is a decomposition all the same), about half the time on a CPU
            and less on an accelerator. S is measured in whichever basis there is, so the block stays the best one
            with that basis; :class:`KFAC`, whose eigenvalues are those of the factors, has no such choice.

    >>> from torch import nn
    >>> from curvature import estimate
    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> B = estimate(EKFAC(model), model, nn.MSELoss(), [(x, torch.zeros(2, 1))])
    >>> torch.allclose(B.to_dense(), torch.tensor([[2.0, 2.0], [2.0, 4.0]]))
    True

    Cost: K-FAC's, beside O(K N d_out size_in) a layer for S, R times that where R positions share the weight; one
    tensor of the weight's size a layer of state more.
    Reference: George et al. 2018, arXiv 1806.03884.
    """

    inverses: Literal["everywhere", "owner"] = "everywhere"
    refresh: Literal["eigh", "qr"] = "eigh"

    _divided: ClassVar[tuple[str, ...]] = owned.MEASURED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh not in ("eigh", "qr"):
            raise ValueError(f"refresh must be 'eigh' or 'qr', got {self.refresh!r}")

    @property
    def outlives_a_step(self) -> bool:
        """S is a running mean, and means nothing without the basis that it was measured in."""
        return self._owned

    def _keys(self) -> tuple[str, ...]:
        return tuple(k for k in (*learning.KEYS, "moments") if k not in self.gathered_keys)

    def _shapes(self, block: Block) -> dict[str, tuple[int, ...]]:
        shapes = super()._shapes(block)
        shapes["moments"] = shape_of_moments(block)
        return {k: v for k, v in shapes.items() if k not in self.gathered_keys}

    def _estimated(self, problem: Problem) -> KroneckerOperator:
        """One shot over batches, which are gone over twice."""
        state = self.init(problem.params)
        for look in range(2):
            statistics: Statistics = {}
            # Both looks see the same loss: dropout draws the same masks again.
            seeing = self._with_all(state) if look else state
            with same_random_numbers(problem.model) if look == 0 else nullcontext():
                for number, evaluation in enumerate(problem.evaluations()):
                    if look == number == 0:
                        check_derivatives(self, problem, evaluation)
                    own = self._own_weights(problem, evaluation)
                    add_statistics(statistics, self._look(seeing, evaluation.graph, own), evaluation.share)
            if look == 0:
                seen = Observation(problem.params, statistics=statistics, parameters=problem.params)
                self.update(state, seen)
                self._record_always()
                state["draws"] = 0  # the labels of the first look again
                if self.fisher == "forward-only" or not self._layout(problem.params).blocks:
                    break
        else:
            layout = self._layout(problem.params)
            self._put(state, layout.blocks, cast("list[Tensor]", statistics["moments"]))
            self._drop_choice(state, layout.blocks)
        return self.operator(state)

    def _measure(self, state: State, graph: LossGraph, own_weights: Tensor | None) -> Statistics:
        """K-FAC's statistics and S; of blocks that have no basis yet, what S will be formed from."""
        layout = self._layout(graph.params)
        known = self._known(state, layout)
        ready = len(known) == len(layout.blocks) and not self._owned
        if self.fisher == "forward-only" or ready:
            return self._look(state, graph, own_weights)
        parts = cast(Parts, state.get(TRANSIENT, Parts()))
        earlier = parts.samples
        if parts.held is None:
            parts.held = Held()
        before = state.get(TRANSIENT)
        state[TRANSIENT] = parts
        statistics = self._look(state, graph, own_weights)
        parts.held.end_of_part()
        parts.alone = None
        if not statistics and before is None:
            del state[TRANSIENT]
            return statistics
        if parts.held.full and parts.count == 1 and team() is None and len(known) < len(layout.blocks):
            trial = with_first_bases(self._with_all(state), statistics, self._new(state, layout))
            trial[TRANSIENT] = Parts(samples=earlier)
            parts.alone = cast("list[Tensor]", self._look(trial, graph, own_weights)["moments"])
        if self._owned and known and statistics:

            def once_more() -> Statistics:
                trial = self._with_all(state)
                trial[TRANSIENT] = Parts(samples=earlier)
                return self._look(trial, graph, own_weights)

            with torch.autocast(graph.loss.device.type, enabled=False):
                found = owned_moments.measured(state, layout, known, parts.held, once_more)
            owned_moments.add_(parts.owned, found)
            if len(known) == len(layout.blocks):
                parts.held = None
        return statistics

    def _look(self, state: State, graph: LossGraph, own_weights: Tensor | None) -> Statistics:
        return super()._measure(state, graph, own_weights)

    def _learn(self, state: State, seen: Observation) -> None:
        """K-FAC's update; then a block's first S is formed in its first basis, over all parts and ranks."""
        parts = cast(Parts, state.get(TRANSIENT, Parts()))
        layout = self._layout_of(state, seen)
        new = self._new(state, layout)
        super()._learn(state, seen)
        if parts.held is None or not seen.statistics:
            return
        known = {b.root for b in self._known(state, layout)}
        first = [b for b in new if b.root in known]
        if not first:
            return
        ranks = team()
        if not together(ranks, parts.held.full, held(state, "A_values")[first[0].root].device):
            if self._owned:
                found: Mapping[int, Tensor] = owned_moments.measured(state, layout, first, parts.held)
            else:
                found = {block.root: self._first(state, block, parts.held) for block in first}
            self._put(state, first, found)
            self._drop_choice(state, first)
        elif parts.alone is not None and parts.count == 1:
            self._put(state, first, parts.alone)
            self._drop_choice(state, first)
        else:
            warnings.warn(
                f"the first step has too many samples to hold (more than {HELD} elements), in several micro-batches or "
                "ranks that have no common eigenbasis yet: EKFAC starts from K-FAC's eigenvalues. Give the first "
                "step one smaller batch where that matters",
                stacklevel=4,
            )

    def _first(self, state: State, block: Block, seen: Held) -> Tensor:
        """A block's first S from what a step held, over all ranks."""
        S, ranks = torch.zeros_like(held(state, "moments")[block.root]), team()
        for term in seen.terms.get(block.root, ()):
            term.add_to_(S, *learning.basis_of(state, block))
        return S if ranks is None else ranks.sum_(S).div_(ranks.size)

    def _drop_choice(self, state: State, blocks: Sequence[Block]) -> None:
        """S of blocks that were measured in their present bases, the same whichever bases of eigenspaces these are."""
        moments = self._moments(state)
        for block in self._mine(state, blocks):
            i = block.root
            values = held(state, "G_values")[i], held(state, "A_values")[i]
            moments[i] = without_choice(moments[i], values, self._basis(state, block))

    # -- where bases and moments are: in the state, or those of its own blocks beside it --------------------------

    def _mine(self, state: State, blocks: Sequence[Block]) -> list[Block]:
        """Those of the blocks whose bases and moments this process keeps."""
        if not self._owned:
            return list(blocks)
        bases = owned.bases_of(state, self._layout_of(state, None))
        return [b for b in blocks if bases.owns(b)]

    def _moments(self, state: State) -> MutableMapping[int, Tensor] | list[Tensor]:
        """S by root."""
        if not self._owned:
            return held(state, "moments")
        bases = owned.bases_of(state, self._layout_of(state, None))
        if bases.moments is None:
            bases.moments = {}
        return bases.moments

    def _basis(self, state: State, block: Block) -> tuple[Tensor | None, Tensor | None]:
        if not self._owned:
            return learning.basis_of(state, block)
        return owned.bases_of(state, self._layout_of(state, None)).pair(block)

    def _put(
        self, state: State, blocks: Sequence[Block], found: Mapping[int, Tensor] | Sequence[Tensor]
    ) -> None:
        moments = self._moments(state)
        for block in self._mine(state, blocks):
            moments[block.root] = found[block.root]

    def _with_all(self, state: State) -> State:
        """A state with the bases of all ranks, to be let go after one look; it shares all else with ``state``."""
        return {**state, **self.gather(state)} if self._owned else state

    def _new(self, state: State, layout: Layout) -> list[Block]:
        """The blocks that have no eigenbases."""
        known = {b.root for b in self._known(state, layout)}
        return [b for b in layout.blocks if b.root not in known]

    @property
    def _by_sample(self) -> bool:
        return self.fisher != "forward-only"

    def _known(self, state: State, layout: Layout) -> list[Block]:
        """The blocks that have eigenbases."""
        counts = torch.stack([c.cpu() for c in held(state, "count")]).tolist()
        return [b for b in layout.blocks if counts[b.root] > 0]

    def _with_basis(self, state: State, layout: Layout) -> list[Block]:
        """The blocks that can be measured in their bases at once."""
        return self._known(state, layout) if "A_vectors" in state else []

    def _zeros(self, state: State, layout: Layout, params: Sequence[Tensor], spare: Spare) -> Statistics:
        statistics = super()._zeros(state, layout, params, spare)
        known = self._with_basis(state, layout)
        if known and self.fisher != "forward-only":
            shapes = {b.root: shape_of_moments(b) for b in known}
            statistics["moments"] = measurement.zeros(layout, shapes, params)
        return statistics

    def _accumulators(self, state: State, layout: Layout, statistics: Statistics) -> Accumulators:
        into = super()._accumulators(state, layout, statistics)
        known = self._with_basis(state, layout) if "moments" in statistics else []
        measured = cast("list[Tensor]", statistics.get("moments", []))
        parts = cast(Parts, state.get(TRANSIENT, Parts()))
        return replace(
            into,
            moments={b.root: measured[b.root] for b in known},
            bases={b.root: learning.basis_of(state, b) for b in known},
            held=parts.held,
            holding=frozenset(b.root for b in layout.blocks).difference(b.root for b in known),
        )

    def _take(
        self, state: State, layout: Layout, observed: dict[str, list[Tensor]], live: set[int]
    ) -> set[int]:
        parts = cast(Parts, state.get(TRANSIENT, Parts()))
        if "moments" in observed or parts.owned:
            measured, moments, count = (
                observed.get("moments", parts.owned),
                self._moments(state),
                held(state, "count"),
            )
            known = self._mine(state, self._known(state, layout))
            blocks = [b.root for b in known if live.intersection(b.members)]
            running_mean_(
                [moments[i] for i in blocks],
                [measured[i] for i in blocks],
                [count[i].clone() for i in blocks],
                self.beta,
            )
        return super()._take(state, layout, observed, live)

    def _refresh(self, state: State, blocks: Sequence[Block]) -> None:
        """New bases; S becomes the diagonal, in the new basis, of the block that it was."""
        if self._owned:
            layout = self._layout_of(state, None)
            bases = owned.bases_of(state, layout)
            earlier = dict(bases.vectors)
            before = {b.root: bases.pair(b) for b in layout.blocks if b.root in earlier}
            owned.refresh_(state, layout, blocks, iterate_here if self.refresh == "qr" else eigh_here)
            blocks = [
                b
                for b in self._mine(state, layout.blocks)
                if bases.vectors.get(b.root) is not earlier.get(b.root)
            ]
        else:
            before = {b.root: learning.basis_of(state, b) for b in blocks}
            learning.refresh_(state, blocks, iterate_many if self.refresh == "qr" else eigh_many)
        moments = self._moments(state)
        for block in blocks:
            i = block.root
            fresh = i not in moments if isinstance(moments, dict) else not bool(moments[i].any())
            if fresh or self.fisher == "forward-only":
                g, a = held(state, "G_values")[i], held(state, "A_values")[i]
                moments[i] = g.unsqueeze(-1) * a.unsqueeze(-2)
            else:
                moments[i] = rotated(moments[i], before[i], self._basis(state, block))

    def operator(self, state: State) -> KroneckerOperator:
        """B from the eigenbases and moments at hand."""
        return self._owned_operator(state, False) if self._owned else super().operator(state)

    def _eigenblock(self, state: State, block: Block) -> Eigenblock:
        g, a = held(state, "G_values")[block.root], held(state, "A_values")[block.root]
        Q_G, Q_A = learning.basis_of(state, block)
        return Eigenblock(block, held(state, "moments")[block.root].clone(), Q_G, Q_A, g, a)


def shape_of_moments(block: Block) -> tuple[int, ...]:
    """Of S."""
    return block.dims.groups, block.dims.d_out, block.size_in


def rotated(S: Tensor, before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> Tensor:
    """The diagonal, in the basis ``after``, of the block that had the diagonal S in the basis ``before``.

    Args:
        S: (groups, d_out, size_in).
        before: (Q_G, Q_A), ``None`` for the identity.
        after: likewise.
    """
    for side, (old, new) in enumerate(zip(before, after, strict=True)):
        if old is None or new is None:
            continue
        rotation = (new.mT @ old).square_()
        S = rotation @ S if side == 0 else S @ rotation.mT
    return S


def with_first_bases(state: State, statistics: Statistics, blocks: Sequence[Block]) -> State:
    """A state in which ``blocks`` have the eigenbases of these statistics; it shares all else with ``state``."""
    trial = dict(state)
    for key in ("count", *learning.KEYS, *(k for k in learning.TRANSPOSED_KEYS if k in state)):
        trial[key] = list(held(state, key))
    for block in blocks:
        i = block.root
        held(trial, "count")[i] = torch.ones_like(held(state, "count")[i])
        held(trial, "A")[i] = learning.normalised(statistics, i)
        held(trial, "G")[i] = cast("list[Tensor]", statistics["G"])[i]
        if block.transposed is not None:
            held(trial, "A_transposed")[i] = learning.normalised(statistics, i, "_transposed")
            held(trial, "G_transposed")[i] = cast("list[Tensor]", statistics["G_transposed"])[i]
    learning.refresh_(trial, blocks, eigh_here)
    return trial


def together(ranks: Team | None, flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    return flag if ranks is None else ranks.any(flag, device)


estimators.add("ekfac", EKFAC)
