"""The elementwise step in two compiled passes over memory, without a wait for the device.

Legend: see ``optimizers.elementwise`` and :mod:`optimizers.compiled.kernels`.

What a step predicted is a sum over its own result; formed in the step it would cost a third pass, or break the
in-place one. The next step's first pass reads the same m and v before it changes them, so it forms that sum on its way
(*settles* it), one step later and before anybody needs it: the policy compares losses only then. Who asks earlier
(``step_info``, ``state_dict``) pays one pass over m and v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimizers.compiled.kernels import COLUMNS, Kernels, Kind, kernels_of
from optimizers.compiled.rows import ALIGNMENT, Layout, Pool
from optimizers.compiled.tensors import Options, Settled, Tensors, classes, log
from optimizers.elementwise import Formula, quadratic_weight
from trust_region.rms_box import rank_one_scale

_INDEX = {name: i for i, name in enumerate(COLUMNS)}


@dataclass(frozen=True)
class Taken:
    """A step that was taken and whose prediction is not settled.

    Args:
        table: its numbers, one row a class.
        finite: whether it moved anything, 0-d bool.
    """

    table: Tensor
    finite: Tensor


@dataclass(frozen=True)
class _Bound:
    """A layout with the rows that do not move between steps."""

    pointers: list[int]
    kernels: Kernels
    layout: Layout
    class_of: Sequence[int]
    groups: Tensor
    leaf_class: Tensor
    heads: list[list[Tensor]]
    rests: list[list[list[Tensor]]]
    pools: list[list[Pool]]

    def gather(self, which: Sequence[int]) -> None:
        for i in which:
            for pool, pieces in zip(self.pools[i], self.rests[i], strict=True):
                pool.gather(pieces)

    def scatter(self, which: Sequence[int]) -> None:
        for i in which:
            for pool, pieces in zip(self.pools[i], self.rests[i], strict=True):
                pool.scatter(pieces)

    def leaves(self, i: int) -> list[Tensor]:
        return [*self.heads[i], *(pool.rows for pool in self.pools[i])]

    def counts(self, x: Tensors) -> Tensor:
        """Gradients taken in by m, then by v, a class."""
        first = [self.class_of.index(kind) for kind in range(len(self.groups))]
        return torch.stack([x.steps[i] for i in first] + [x.count[i] for i in first]).view(2, -1)

    def set_counts(self, x: Tensors, counts: Tensor) -> None:
        """Write them to every tensor; adding to so many 0-d tensors would take longer than a small model's step."""
        steps, count = (row.unbind() for row in counts.unbind())
        source = [steps[k] for k in self.class_of] + [count[k] for k in self.class_of]
        torch._foreach_copy_([*x.steps, *x.count], source)

    def given_out(self, table: Tensor) -> list[Tensor]:
        """Every leaf's row of a table with one row a class."""
        rows = table.unbind()
        return [rows[kind] for kind in self.layout.classes]

    def weighted(self, sums: list[Tensor], weights: Tensor) -> Tensor:
        """Σ over leaves of their sums, each weighted by its class's row."""
        return (torch.stack(sums) * weights.index_select(0, self.leaf_class)).sum(0)


class TwoPass:
    """Two compiled passes for a composition that is one formula an element.

    Args:
        formula: its constants.
        policy: the radius policy, which decides what a prediction is.

    Cost: bytes a float32 parameter and step, read or written: 12 by the first pass (4 where it only looks for gradients
    that are not finite) and 28 by the second, as many as a fused AdamW's. Kernels compile once a process. Small tensors
    are copied into pools of their size.
    """

    def __init__(self, formula: Formula, policy: object) -> None:
        self.formula = formula
        self.policy = policy
        # A policy that divides by the prediction needs it every step; elsewhere it is formed when somebody asks.
        self.observes = formula.needs_sums or bool(getattr(policy, "lagged", False))
        self._bound: _Bound | None = None
        self.taken: Taken | None = None
        """The last step, until it is settled."""

    def step_(
        self,
        x: Tensors,
        gradient: Sequence[Tensor],
        kind: Kind,
        options: Options,
        radius: Tensor,
        decide: Callable[[Tensor], Tensor],
    ) -> Settled | None:
        """Update the state and move the parameters, in place.

        Args:
            x: the tensors.
            gradient: ``.grad`` as it is: neither unscaled nor negated.
            kind: of the tensors.
            options: hyperparameters.
            radius: d, 0-d.
            decide: turns "my gradient is finite" into "the step is taken" (all ranks, a GradScaler); 0-d bools.

        Returns:
            what the previous step predicted, where that was still open and this pass formed it.
        """
        bound = self._bind(x, kind)
        bound.kernels.prepare("observe" if self.observes else "all_zero", "move_")
        counts = bound.counts(x)
        grads, table = self._gradient_rows(bound, gradient), self._table(bound, counts, options, kind.state)
        table[:, _INDEX["radius"]] = radius
        settled: Settled | None = None
        scale: Tensor | float = 1.0
        bound.gather((1, 2))
        if self.observes:
            sums = self._sums(bound, grads, table)
            finite = decide(sums["finite"] == 0.0)
            if self.formula.needs_sums:
                size = sum(p.numel() for p in x.params)
                scale = rank_one_scale(sums["mean_square"], sums["moment"] + self.formula.eps * size)
            if self.taken is not None:
                settled = Settled(_known(sums["predicted"], self.taken))
        else:
            finite = decide(torch.stack(bound.kernels.run("all_zero", [grads])).sum() == 0.0)
        if self.formula.interior:
            table[:, _INDEX["curvature"]] = radius * scale
        lr = table[:, _INDEX["lr"]]
        table[:, _INDEX["quadratic"]] = quadratic_weight(self.policy, lr, scale)
        bound.gather((0,))
        p, m, v = (bound.leaves(i) for i in range(3))
        bound.kernels.run("move_", [p, grads, m, v, bound.given_out(table)], finite)
        bound.scatter((0, 1, 2))
        bound.set_counts(x, counts + finite)
        self.taken = Taken(table, finite)
        return settled

    def settle(self, x: Tensors, kind: Kind) -> Settled | None:
        """What the last step predicted, if nobody has asked yet; the state must be as that step left it."""
        if self.taken is None:
            return None
        taken, self.taken = self.taken, None
        bound = self._bind(x, kind)
        bound.gather((1, 2))
        step = _Direction.of(taken.table)
        inputs = bound.given_out(step.inputs(taken.table))
        found = bound.kernels.run("predict", [bound.leaves(1), bound.leaves(2), inputs])
        weights = torch.stack([*step.prediction, step.square, torch.ones_like(step.square)], 1)
        linear, quadratic, square, inside = bound.weighted(found, weights).unbind()
        size = sum(p.numel() for p in x.params)
        return Settled(
            _known(linear + quadratic, taken), _known(square.sqrt(), taken), _known(inside / size, taken)
        )

    def _sums(self, bound: _Bound, grads: list[Tensor], table: Tensor) -> dict[str, Tensor]:
        """What the first pass finds: Σm̂² and Σv̂ of the new m and v, 0 or NaN, and the previous step's P."""
        step = _Direction.of(table if self.taken is None else self.taken.table)
        columns, inputs = table.t(), bound.given_out(step.inputs(table))
        found = bound.kernels.run("observe", [grads, bound.leaves(1), bound.leaves(2), inputs])
        c_1, c_2 = columns[_INDEX["mean_correction"]], columns[_INDEX["moment_correction"]]
        gain = columns[_INDEX["gradient_scale"]].square() * columns[_INDEX["moment_weight"]]
        weights = torch.stack(
            [
                c_1 * c_1,
                c_2 * columns[_INDEX["moment_decay"]],
                c_2 * gain,
                torch.ones_like(c_1),
                *step.prediction,
            ],
            1,
        )
        squares, kept, gained, finite, linear, quadratic = bound.weighted(found, weights).unbind()
        return {
            "mean_square": squares,
            "moment": kept + gained,
            "finite": finite,
            "predicted": linear + quadratic,
        }

    def _bind(self, x: Tensors, kind: Kind) -> _Bound:
        pointers = x.pointers()
        if self._bound is None or self._bound.pointers != pointers or self._bound.kernels.kind != kind:
            lists = [[y.detach() for y in tensors] for tensors in (x.params, x.mean, x.second_moment)]
            class_of, groups = classes(x)
            layout = Layout.of(class_of, *lists)
            kinds = (kind.param, kind.state, kind.state, kind.gradient)
            self._bound = _Bound(
                pointers,
                kernels_of(kind),
                layout,
                class_of,
                torch.tensor(groups, device=kind.device),
                torch.tensor(layout.classes, device=kind.device),
                [layout.views(tensors) for tensors in lists],
                [layout.rests(tensors) for tensors in lists],
                [layout.pools(dtype, kind.device) for dtype in kinds],
            )
        return self._bound

    def _gradient_rows(self, bound: _Bound, gradient: Sequence[Tensor]) -> list[Tensor]:
        if bound.kernels.kind.device.type != "cpu":
            gradient = [g if g.data_ptr() % ALIGNMENT == 0 else g.clone() for g in gradient]
        pools = bound.pools[3]
        for pool, pieces in zip(pools, bound.layout.rests(gradient), strict=True):
            pool.gather(pieces)
        return [*bound.layout.views(gradient), *(pool.rows for pool in pools)]

    def _table(self, bound: _Bound, counts: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
        """The numbers of every class that are known before the sums.

        Args:
            bound: the layout.
            counts: gradients taken in before this step by m, and by v, a class.
            options: hyperparameters of the groups.
            dtype: of the state.
        """
        device, b_2, eps = counts.device, self.formula.beta_2, self.formula.eps
        columns = zip(options.sign, options.beta_1, options.lr, options.weight_decay, strict=True)
        # Where corrections and what is kept will stand, the logarithms and λ that they are formed from.
        host = [
            [s, 1.0 - b, b_2, 1.0 - b_2, log(b), log(b_2), 0.0, 0.0, eps, _number(eta), decay, 0.0]
            for s, b, eta, decay in columns
        ]
        groups = _on_device(host, dtype, device)
        for i, eta in enumerate(options.lr):
            if isinstance(eta, Tensor):
                groups[i, _INDEX["lr"]] = eta.to(device, dtype, non_blocking=True).reshape(())
        if options.unscale is not None:
            groups[:, _INDEX["gradient_scale"]] *= options.unscale.to(device, dtype)
        groups[:, _INDEX["kept"]] = 1.0 - groups[:, _INDEX["lr"]] * groups[:, _INDEX["kept"]]
        table = groups.index_select(0, bound.groups)
        corrections = table[:, _INDEX["mean_correction"] : _INDEX["moment_correction"] + 1]
        seen = (counts + 1.0).to(dtype).t()
        corrections.copy_(-1.0 / torch.expm1(seen * corrections))
        return table


def _number(eta: float | Tensor) -> float:
    return 0.0 if isinstance(eta, Tensor) else eta


def _on_device(rows: list[list[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``rows`` as a tensor, sent without a wait."""
    table = torch.tensor(rows, dtype=dtype)
    if device.type == "cpu":
        return table
    pinned = table.pin_memory() if torch.accelerator.is_available() else table
    return pinned.to(device, non_blocking=True)


def _known(x: Tensor, taken: Taken) -> Tensor:
    return torch.where(taken.finite, x, float("nan"))


@dataclass(frozen=True)
class _Direction:
    """What turns the sums over w = m / (max(κv, √v) + ε′) into those over the step u, one number a class.

    Args:
        curvature: κ.
        eps: ε′.
        prediction: of Σmw and Σvw² in P = η⟨m̂,u⟩ - q⟨v̂,u²⟩.
        square: of Σw² in ‖ηu‖².
    """

    curvature: Tensor
    eps: Tensor
    prediction: tuple[Tensor, Tensor]
    square: Tensor

    @classmethod
    def of(cls, table: Tensor) -> _Direction:
        """Of the step with these numbers."""
        x = dict(zip(COLUMNS, table.unbind(1), strict=True))
        c_1, c_2 = x["mean_correction"], x["moment_correction"]
        root = c_2.sqrt()
        ratio = x["radius"] * c_1 / root  # u = ratio w
        moved = x["lr"] * ratio
        prediction = (moved * c_1, -x["quadratic"] * c_2 * ratio * ratio)
        return cls(x["curvature"] * root, x["eps"] / root, prediction, moved * moved)

    def inputs(self, table: Tensor) -> Tensor:
        """:data:`INPUTS` of every class: the new means by ``table``, the direction by this."""
        weight = table[:, _INDEX["mean_weight"]]
        gain = weight * table[:, _INDEX["gradient_scale"]]
        return torch.stack([1.0 - weight, gain, self.curvature, self.eps], 1)
