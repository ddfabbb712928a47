"""The elementwise step on a CPU without a compiler: block by block, so that intermediate vectors stay in cache.

Fresh temporaries of a tensor's size cost a CPU more than the arithmetic: they are mapped, faulted in and streamed
through memory. Here large tensors are cut into blocks and small ones gathered into one, the state is updated in place,
and a few scratch blocks hold everything else. Two passes over memory: update m and v and form the sums; then step.

Legend: see ``optimizers.elementwise``; w = m / (max(κv, √v) + ε′), of which the step is a multiple, u = ratio · w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvature import vectors
from optimizers.compiled.host_path import Found
from optimizers.compiled.kernels import Kind
from optimizers.compiled.tensors import Options, Tensors, classes
from optimizers.elementwise import Formula, correction, prediction_of

BLOCK = 1 << 17
"""Elements a block: what is worked on stays in the cache, and calls are few."""

SMALL = 1 << 15
"""Tensors of fewer elements are gathered: seven copies in the cache cost less than a dozen calls a tensor."""


@dataclass
class Blocks:
    """Views of lists of tensors, cut alike.

    Args:
        owner: which tensor each block belongs to.
        bounds: where it begins and ends in that tensor.
    """

    owner: list[int] = field(default_factory=list)
    bounds: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Blocks:
        """Cut every tensor into blocks of at most :data:`BLOCK` elements."""
        blocks = cls()
        for i, x in enumerate(tensors):
            for start in range(0, x.numel(), BLOCK):
                blocks.owner.append(i)
                blocks.bounds.append((start, min(start + BLOCK, x.numel())))
        return blocks

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The blocks of ``tensors``, which must be contiguous."""
        flat = [x.view(-1) for x in tensors]
        return [flat[i][a:b] for i, (a, b) in zip(self.owner, self.bounds, strict=True)]


@dataclass(frozen=True)
class Span:
    """A block of one tensor, or several small tensors of one class gathered.

    Args:
        kind: the class, whose numbers all of them have in common.
        views: flat p, m and v; those of gathered tensors lie in scratch memory.
        which: the tensor, and where the block begins and ends in it; ``None`` for gathered ones.
        members: the gathered tensors.
        slots: views of scratch memory shaped like them, for p, m, v and g.
        tensors: the gathered p, m and v themselves.
        gradient: flat scratch for g, which gathered ones and those to be scaled need.
    """

    kind: int
    views: tuple[Tensor, Tensor, Tensor]
    which: tuple[int, int, int] | None
    members: Sequence[int]
    slots: Sequence[list[Tensor]]
    tensors: Sequence[list[Tensor]]
    gradient: Tensor

    def gather(self, parts: Sequence[int]) -> None:
        """Copy p (0), m (1) or v (2) into scratch memory, where that is where it is worked on."""
        for k in parts if self.which is None else ():
            torch._foreach_copy_(self.slots[k], self.tensors[k])

    def scatter(self, parts: Sequence[int]) -> None:
        """Copy them back."""
        for k in parts if self.which is None else ():
            torch._foreach_copy_(self.tensors[k], self.slots[k])

    def gradient_of(self, gradient: Sequence[Tensor], gain: float) -> Tensor:
        """g of the span, multiplied by ``gain``, in the precision of the state."""
        if self.which is None:
            torch._foreach_copy_(self.slots[3], [gradient[i] for i in self.members])
            return self.gradient if gain == 1.0 else self.gradient.mul_(gain)
        i, a, b = self.which
        g = gradient[i].view(-1)[a:b]
        if gain == 1.0 and g.dtype == self.gradient.dtype:
            return g
        return self.gradient[: b - a].copy_(g).mul_(gain)


class _Bound:
    """What stays between the steps of one set of tensors: spans, scratch memory and the counts of every class."""

    def __init__(self, x: Tensors, kind: Kind) -> None:
        self.pointers = x.pointers()
        class_of, self.groups = classes(x)
        first = [class_of.index(k) for k in range(len(self.groups))]
        self.seen = [[float(x.steps[i]), float(x.count[i])] for i in first]
        self.counters = [*x.steps, *x.count]
        small: dict[int, list[list[int]]] = {k: [] for k in range(len(self.groups))}
        for i, p in enumerate(x.params):
            if 0 < p.numel() < SMALL:
                packs = small[class_of[i]]
                if not packs or sum(x.params[j].numel() for j in packs[-1]) + p.numel() > BLOCK:
                    packs.append([])
                packs[-1].append(i)
        large = [i for i, p in enumerate(x.params) if p.numel() >= SMALL]
        cut = Blocks.of([x.params[i] for i in large])
        sizes = [sum(x.params[i].numel() for i in pack) for packs in small.values() for pack in packs]
        self.packs = len(sizes)
        largest = max([*(b - a for a, b in cut.bounds), *sizes])
        gathered = max(sizes, default=0)
        self.scratch = torch.empty(2, largest, dtype=kind.state)
        gradient = torch.empty(largest, dtype=kind.state)
        own = [torch.empty(gathered, dtype=d) for d in (kind.param, kind.state, kind.state)]
        lists = [[y.detach() for y in tensors] for tensors in (x.params, x.mean, x.second_moment)]
        self.spans: list[Span] = []
        for n, (a, b) in zip(cut.owner, cut.bounds, strict=True):
            i = large[n]
            p, m, v = (y[i].view(-1)[a:b] for y in lists)
            self.spans.append(Span(class_of[i], (p, m, v), (i, a, b), (), (), (), gradient))
        for k, packs in small.items():
            for pack in packs:
                lengths = [x.params[i].numel() for i in pack]
                size = sum(lengths)
                flat = [y[:size] for y in (*own, gradient)]
                slots = [
                    [part.view_as(x.params[i]) for part, i in zip(y.split(lengths), pack, strict=True)]
                    for y in flat
                ]
                held = [[y[i] for i in pack] for y in lists]
                self.spans.append(Span(k, (flat[0], flat[1], flat[2]), None, pack, slots, held, flat[3]))


@dataclass(frozen=True)
class _Direction:
    """What turns w into the step of a class.

    Args:
        curvature: κ.
        eps: ε′.
        ratio: u / w.
        c1: 1/(1-β₁ᵗ).
        c2: 1/(1-β₂ᵗ).
        lr: η.
        bent: of vw² in P = ηc₁ratio ⟨w, m - bent · vw⟩.
    """

    curvature: float
    eps: float
    ratio: float
    c1: float
    c2: float
    lr: float
    bent: float


class BlockedPasses:
    """Two passes of ordinary operations for a composition that is one formula an element.

    Args:
        formula: its constants.
        policy: the radius policy, which decides what a prediction is, and whether a step needs it.

    Cost: thirteen operations a block, in place; scratch memory of at most seven blocks.
    """

    def __init__(self, formula: Formula, policy: object) -> None:
        self.formula, self.rule = formula, prediction_of(policy)
        self.predicts = bool(getattr(policy, "lagged", False))
        self._bound: _Bound | None = None

    def step_on_host_(
        self,
        x: Tensors,
        gradient: Sequence[Tensor],
        kind: Kind,
        options: Options,
        radius: float,
        lagged: float | None,
        decide: Callable[[bool], bool],
    ) -> Found | None:
        """Update the state and move the parameters, in place; as :meth:`NativePasses.step_on_host_`."""
        if not decide(bool(vectors.all_finite(gradient))):
            return None
        if self._bound is None or self._bound.pointers != x.pointers():
            self._bound = _Bound(x, kind)
        bound, formula = self._bound, self.formula
        torch._foreach_add_(bound.counters, 1.0)
        for seen in bound.seen:
            seen[0] += 1.0
            seen[1] += 1.0
        scale = own = 1.0
        sums = self._average_(bound, gradient, options)
        if sums is not None:
            own = 1.0 + sums[0] / (sums[1] + formula.eps * x.size)
            own = 1.0 if math.isnan(own) else own
            scale = own if lagged is None else lagged
        directions = [self._direction(bound, k, options, radius, scale) for k in range(len(bound.groups))]
        predicted = self._move_(bound, directions, options)

        def rest() -> Tensor:
            return self._looked(bound, directions)

        return Found(predicted, own, rest)

    def _average_(
        self, bound: _Bound, gradient: Sequence[Tensor], options: Options
    ) -> tuple[float, float] | None:
        """Take g into m and v; Σm̂² and Σv̂ where the step, or the next one, asks for them."""
        formula = self.formula
        asks = formula.needs_sums or formula.lags
        squares, masses, by_mean, by_moment = [], [], [], []
        for span in bound.spans:
            group = bound.groups[span.kind]
            unscale = 1.0 if options.unscale is None else float(options.unscale)
            g = span.gradient_of(gradient, options.sign[group] * unscale)
            span.gather((1, 2))
            _, m, v = span.views
            m.lerp_(g, 1.0 - options.beta_1[group])
            v.mul_(formula.beta_2).addcmul_(g, g, value=1.0 - formula.beta_2)
            span.scatter((1, 2))
            if asks:
                steps, count = bound.seen[span.kind]
                squares.append(torch.dot(m, m))
                by_mean.append(correction(steps, options.beta_1[group]) ** -2)
                masses.append(v.sum())
                by_moment.append(1.0 / correction(count, formula.beta_2))
        if not asks:
            return None
        return float(weighted(squares, by_mean)), float(weighted(masses, by_moment))

    def _direction(self, bound: _Bound, k: int, options: Options, radius: float, scale: float) -> _Direction:
        group, (steps, count) = bound.groups[k], bound.seen[k]
        lr = float(options.lr[group])
        c1 = 1.0 / correction(steps, options.beta_1[group])
        c2 = 1.0 / correction(count, self.formula.beta_2)
        root = math.sqrt(c2)
        ratio = radius * c1 / root
        # q/η of the predicted reduction (``quadratic_weight``), which has no η to divide by
        weight = (0.5 * lr, 0.5, 0.5 * lr * scale)[self.rule]
        return _Direction(
            radius * scale * root, self.formula.eps / root, ratio, c1, c2, lr, weight * c2 * ratio / c1
        )

    def _walk(
        self, bound: _Bound, directions: Sequence[_Direction], parts: Sequence[int]
    ) -> Iterator[tuple[Span, _Direction, Tensor, Tensor]]:
        """Every span with its numbers, w, and a scratch block."""
        # Where all gathered tensors are in one span it is still in scratch memory.
        for span in bound.spans:
            to = directions[span.kind]
            span.gather(parts)
            _, m, v = span.views
            w, other = bound.scratch[0, : m.numel()], bound.scratch[1, : m.numel()]
            torch.sqrt(v, out=w)
            if self.formula.interior:
                torch.mul(v, to.curvature, out=other)
                torch.maximum(w, other, out=w)
            torch.div(m, w.add_(to.eps), out=w)
            yield span, to, w, other

    def _move_(self, bound: _Bound, directions: Sequence[_Direction], options: Options) -> float:
        """θ ← (1-ηλ)θ - ηu; P where the policy divides by it, else NaN."""
        parts, weights = [], []
        for span, to, w, other in self._walk(bound, directions, (0,) if bound.packs == 1 else (0, 1, 2)):
            p, m, v = span.views
            decay = options.weight_decay[bound.groups[span.kind]]
            if decay != 0.0:
                p.mul_(1.0 - to.lr * decay)
            p.add_(w, alpha=-to.lr * to.ratio)
            span.scatter((0,))
            if self.predicts:
                parts.append(torch.dot(w, torch.addcmul(m, v, w, value=-to.bent, out=other)))
                weights.append(to.lr * to.c1 * to.ratio)
        return float(weighted(parts, weights)) if self.predicts else math.nan

    def _looked(self, bound: _Bound, directions: Sequence[_Direction]) -> Tensor:
        """P, ‖ηu‖² and the elements inside the box, of the step that m and v are from; nothing is read."""
        parts, weights, norms, lengths = [], [], [], []
        inside = torch.zeros((), dtype=torch.int64)
        for span, to, w, other in self._walk(bound, directions, (1, 2)):
            _, m, v = span.views
            if self.formula.interior:
                inside += torch.count_nonzero(torch.mul(v, to.curvature, out=other) > v.sqrt())
            parts.append(torch.dot(w, torch.addcmul(m, v, w, value=-to.bent, out=other)))
            weights.append(to.lr * to.c1 * to.ratio)
            norms.append(torch.dot(w, w))
            lengths.append((to.lr * to.ratio) ** 2)
        return torch.stack([weighted(parts, weights), weighted(norms, lengths), inside.double()])


def weighted(sums: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ of sums, each with its weight, in double precision."""
    return torch.stack(list(sums)).double() @ torch.tensor(weights, dtype=torch.float64)
