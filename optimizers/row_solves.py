"""Between steps: the solve for the momentum, kept beside it for the blocks whose gradients come in rows (K-FAC).

See :mod:`curvature.kronecker.solved_mean` for the method. Here it is decided for which blocks the conditions hold, and
s is laid into the optimizer's state, with which it is saved: a resumed run continues with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from curvature.kronecker.gradient_rows import GradientRows
from curvature.kronecker.inverses import FactoredKroneckerOperator
from curvature.kronecker.layout import Block
from curvature.kronecker.solved_mean import Mean, Solved, SolvedMeanOperator
from curvature.protocols import CurvatureOperator
from curvature.running_mean import bias_correction
from optimizers.momentum import RunningMean

if TYPE_CHECKING:
    from optimizers.step_paths import Held

SOLVED, DAMPING = "solved_mean", "solved_damping"
"""Entries of a parameter's state: s, shaped like it, and λ that it belongs to."""


def suits(momentum: object) -> bool:
    """Whether the averaged gradient is linear in the gradients with weights that are known."""
    return type(momentum) is RunningMean


def prepared(
    operator: CurvatureOperator,
    momentum: object,
    held: Held,
    gradient: Sequence[Tensor | None],
    averaged: Sequence[Tensor],
    rows: Mapping[int, GradientRows],
    *,
    corrected: bool = True,
) -> CurvatureOperator:
    """``operator``, or one that solves for ``averaged`` by rows where the gradient still is the product of them.

    Takes s out of the state: it belongs to the mean before this gradient, and only a solve brings it up to date.

    Args:
        operator: B.
        momentum: how the gradient was averaged.
        held: what the optimizer holds, the mean included.
        gradient: this step's.
        averaged: m̂, this gradient included.
        rows: of this step's gradient.
        corrected: ``False`` where m itself is to be solved for, and given as ``averaged``.
    """
    entries: list[dict[str, Any]] = [held.state[p] for p in held.params]
    before = {i: (e.pop(SOLVED), e.pop(DAMPING)) for i, e in enumerate(entries) if SOLVED in e}
    buffers = held.momentum_buffers()
    if not rows or not buffers or type(operator) is not FactoredKroneckerOperator or not suits(momentum):
        return operator
    betas = held.each("momentum")
    usable: dict[int, GradientRows] = {}
    kept: dict[int, Solved] = {}
    for block in (b.block for b in operator.factorblocks):
        own = rows.get(block.root)
        if own is None or not own.hold([gradient[i] for i in block.members]):
            continue
        solved = _before(block, before)
        if _averaged_alike(block, betas, None if solved is not None else held.steps):
            usable[block.root] = own
            if solved is not None:
                kept[block.root] = solved
    if not usable:
        return operator
    corrections = None
    if corrected:
        corrections = [bias_correction(t, b) for t, b in zip(held.steps, betas, strict=True)]
    weights = [0.0 if isinstance(b, Tensor) else 1.0 - b for b in betas]
    return SolvedMeanOperator(operator, Mean(averaged, buffers, weights, corrections, usable, kept))


def keep(operator: CurvatureOperator, held: Held) -> None:
    """Lay s into the state after the step was proposed."""
    if not isinstance(operator, SolvedMeanOperator):
        return
    for block in (b.block for b in operator.of.factorblocks):
        solved = operator.mean.kept.get(block.root)
        for k, i in enumerate(block.members if solved is not None else ()):
            assert solved is not None
            held.state[held.params[i]].update({SOLVED: solved.members[k], DAMPING: solved.damping})


def _before(block: Block, before: Mapping[int, tuple[Tensor, float]]) -> Solved | None:
    """s of a block, where it was kept for all of its members alike."""
    found = [before[i] for i in block.members if i in before]
    if len(found) != len(block.members) or len({damping for _, damping in found}) != 1:
        return None
    return Solved(found[0][1], [s for s, _ in found])


def _averaged_alike(block: Block, betas: Sequence[float | Tensor], steps: Sequence[Tensor] | None) -> bool:
    """Whether the members' means have the same weights: the same β, and as many gradients each.

    Numbers of gradients are read where they are given; as long as s is kept the members have taken in the same ones.
    """
    own = [betas[i] for i in block.members]
    if any(isinstance(b, Tensor) or b != own[0] for b in own):
        return False
    return steps is None or len({float(steps[i]) for i in block.members}) == 1
