"""Sums of squares of every sample's own gradient, from layer inputs and the gradients of layer outputs.

Legend: N samples; u_n sample n's share of the gradient of one scalar (a loss, or ⟨z, U⟩ for a vector U at the outputs),
so Σ u_n is that gradient; r_n a weight a sample; the result is Σ_n r_n u_n², one tensor a parameter.

Layers are recorded as the loss is computed (``curvature/layer_io.py``), one backward pass gives the gradients of all
their outputs at once, and each layer's rule forms the squares (:mod:`curvature.per_sample_rules`). What a rule gives is
believed only where it is proven for this graph: the sum of its u_n must be autograd's own gradient, and the rows that
it ascribes to a sample must not feel the others' outputs. A parameter that no rule covers (used outside of its module,
in a layer that mixes samples' rows) takes one backward pass a sample, which is exact and slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from curvature.custom_functions import refuse_reentrant
from curvature.gradient_sweep import Sweep
from curvature.layer_io import Call, Recorder, Trace
from curvature.loss_graph import LossGraph
from curvature.measured_weights import leaves, rows
from curvature.per_sample_rules import Use, squares_of_uses
from curvature.probes import generator
from curvature.room import Room
from curvature.side_effects import coupled_by_batch_norm
from curvature.vectors import compute_dtype

#: The nodes of ``torch.nn.functional.linear`` that read the weight and the bias themselves.
LINEAR_NODES = ("AddmmBackward0", "MmBackward0", "LinearBackward0")


def recorder_for(model: nn.Module) -> Recorder:
    """A recorder of every module that holds a trainable parameter of its own."""
    names = [
        name
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    return Recorder(model, names)


def refuse_coupled(model: nn.Module) -> None:
    """Refuse a model in which one sample's loss depends on the others."""
    if (name := coupled_by_batch_norm(model)) is not None:
        raise ValueError(
            f"batch norm {name!r} is in training mode, where a sample has no gradient of its own: call "
            "model.eval(), or use samples='batch'"
        )


@dataclass
class PerSample:
    """The samples' gradients on one living graph.

    Args:
        graph: the loss and its parameters.
        model: the model that made it.
        recorder: what recorded the model's layers during the forward pass.
        count: N; every recorded layer's rows are N equal runs, one a sample.
        of: the tensor whose gradients are taken: the loss, or the outputs.
        alone: what :func:`first_sample_alone` found; ``None`` where samples may feel each other.

    Cost: one backward pass without weight gradients, and the work of the weight gradients once more for their squares;
    one backward pass a sample for parameters that no rule covers.
    """

    graph: LossGraph
    model: nn.Module
    recorder: Recorder
    count: int
    of: Tensor
    alone: Mapping[str, Sequence[tuple[int, ...]]] | None = None
    covered: dict[int, list[Use]] = field(default_factory=dict)
    proven: bool = False

    def __post_init__(self) -> None:
        refuse_coupled(self.model)
        self._sweep: Sweep | None = None
        self.calls: list[Call] = []
        self.split_for_sure: set[int] = set()
        self.found: Trace = self.recorder.trace(self.of)
        refuse_reentrant(*self.found.opaque)
        modules = dict(self.model.named_modules())
        position = {id(p): i for i, p in enumerate(self.graph.params)}
        for name, calls in self.found.calls.items():
            alone = None if self.alone is None else self.alone.get(name)
            if alone is None or len(alone) != len(calls):
                alone = [()] * len(calls)
            names = {
                k: position[id(p)]
                for k, p in modules[name]._parameters.items()
                if p is not None and id(p) in position
            }
            for call, shape in zip(calls, alone, strict=True):
                if not names:
                    continue
                grows = tuple(call.record.shape) == (*(self.count * n for n in shape[:1]), *shape[1:])
                spread = self.found.broadcast(call, self.count) if self.count > 1 else None
                if any(isinstance(x, Tensor) for x in vars(modules[name]).values()):
                    # What it multiplies by is computed from its parameters when it is called (weight_norm by a hook).
                    use = Use(modules[name], len(self.calls), self.count, None)
                elif spread is None:
                    use = Use.of(modules[name], call.record, len(self.calls), self.count)
                else:
                    call = Call(call.record, spread)
                    use = Use.shared(modules[name], call.record, len(self.calls), self.count)
                if spread is not None or (shape and grows):
                    self.split_for_sure.add(use.index)
                self.calls.append(call)
                for key, i in names.items():
                    self.covered.setdefault(i, []).append(use.for_parameter(key))
        for i, uses in list(self.covered.items()):
            if any(use.inputs is None for use in uses):
                del self.covered[i]
        self.evident = {i for i, uses in self.covered.items() if self._evident(i, uses)}

    def _evident(self, i: int, uses: Sequence[Use]) -> bool:
        """Whether the graph itself shows that a plain linear layer's product is all that reads a parameter."""
        readers = self.found.uses.get(id(self.graph.params[i]), [])
        nodes = [self.calls[use.index].edge.node for use in uses]
        return (
            not self.found.opaque
            and all(
                type(use.module) is nn.Linear and node.name() in LINEAR_NODES
                for use, node in zip(uses, nodes, strict=True)
            )
            and len(readers) == len(nodes)
            and all(r.split is None and any(r.node is node for node in nodes) for r in readers)
        )

    def squares(self, weights: Tensor, seed: Tensor | None = None) -> list[Tensor]:
        """Σ_n r_n u_n² for the gradient of :attr:`of`, or of ⟨z, seed⟩.

        Args:
            weights: r, one a sample.
            seed: shaped like the outputs z.
        """
        params = self.graph.params
        asked: list[int] = []
        if not self.proven:
            self._refuse_mixed_rows()
            weights, seed = self._stretched(weights, seed)
            asked = [i for i, p in enumerate(params) if p.requires_grad and i not in self.evident]
        room = Room()
        total: dict[int, Tensor] = {}
        gradients, found_at_end = self._swept(total, weights, seed, [params[i] for i in asked], room)
        reference = dict(zip(asked, found_at_end, strict=True))
        rest = []
        was_enabled, self.recorder.enabled = self.recorder.enabled, False
        try:
            for i, p in enumerate(params):
                if i in total or not p.requires_grad:  # frozen at this moment: unused
                    continue
                expected = reference.get(i)
                if i in reference and expected is None:
                    self.covered[i] = []  # the gradient does not reach this parameter
                if i not in self.covered:
                    rest.append(i)
                    continue
                uses = [u for u in self.covered[i] if gradients[u.index] is not None]
                if not uses and (expected is None or not bool(torch.any(expected != 0))):
                    continue
                found = squares_of_uses(p, uses, gradients, weights, expected, room) if uses else None
                if found is None:
                    del self.covered[i]
                    rest.append(i)
                else:
                    total[i] = found
        finally:
            self.recorder.enabled = was_enabled
        self.proven = True
        for i, p in enumerate(params):
            if i not in total:
                total[i] = torch.zeros_like(p, dtype=compute_dtype(p.dtype), requires_grad=False)
        self._one_by_one(rest, total, weights, seed)
        return [total[i] for i in range(len(params))]

    def _stretched(self, weights: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """(r_n / s_n², s_n times sample n's rows of the seed): the same squares, by terms that cannot cancel in a sum.

        Two equal samples with opposite residuals would hide from Σ u_n that a rule gives each a wrong one.
        """
        z = self.graph.output
        if seed is None:
            (seed,) = torch.autograd.grad(self.of, z, retain_graph=True)
        s = 1 + torch.rand(
            self.count, generator=generator(0x57E7, 0, torch.device("cpu")), dtype=torch.float64
        )
        run = z.shape[0] // self.count if z.dim() else 1
        rows = s.repeat_interleave(run).reshape(-1, *[1] * (z.dim() - 1)).to(seed.device, seed.dtype)
        return weights / s.to(weights.device, weights.dtype).square(), seed * rows

    def _shaped(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The first of them, those of the recorded calls, in the shape of the output, which the node may not know."""
        found = list(gradients)
        for k in range(len(self.calls)):
            if (g := found[k]) is not None:
                found[k] = self._in_shape(k, g)
        return found

    def _in_shape(self, k: int, gradient: Tensor) -> Tensor:
        """The gradient of call k in the shape of its output."""
        shape = self.calls[k].record.shape
        alike = gradient.shape != shape and gradient.numel() == shape.numel()
        return gradient.reshape(shape) if alike else gradient

    def _swept(
        self,
        total: dict[int, Tensor],
        weights: Tensor,
        seed: Tensor | None,
        leaves: Sequence[Tensor],
        room: Room,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """One backward pass, which forms the squares of evident parameters as it meets their layers.

        Returns:
            The gradients at the calls that other parameters need too, and those of ``leaves``.
        """
        gradients: list[Tensor | None] = [None] * len(self.calls)
        if not self.calls and not leaves:
            return gradients, []
        readers: dict[int, list[int]] = {}
        for i, uses in self.covered.items():
            for use in uses:
                readers.setdefault(use.index, []).append(i)
        missing = {i: len(uses) for i, uses in self.covered.items() if i in self.evident}

        def take(k: int, gradient: Tensor) -> None:
            gradients[k] = self._in_shape(k, gradient)
            done = {k}
            for i in readers.get(k, ()):
                if i not in missing:
                    continue
                missing[i] -= 1
                if missing[i]:
                    continue
                uses = self.covered[i]
                squares = squares_of_uses(self.graph.params[i], uses, gradients, weights, None, room)
                if squares is not None:
                    total[i] = squares
                    done.update(use.index for use in uses)
            for use_number in done:
                if all(i in total for i in readers.get(use_number, ())):
                    gradients[use_number] = None

        if self._sweep is None:
            self._sweep = Sweep([call.edge for call in self.calls], self.found.readers)
        of = self.of if seed is None else self.graph.output
        return gradients, self._sweep.run(of, seed, take, leaves)

    def _one_by_one(
        self, which: Sequence[int], total: dict[int, Tensor], weights: Tensor, seed: Tensor | None
    ) -> None:
        """One backward pass a sample, from the sample's own rows of the outputs: exact for any model."""
        if not which:
            return
        params = [self.graph.params[i] for i in which]
        z = self.graph.output
        if seed is None:
            (seed,) = torch.autograd.grad(self.of, z, retain_graph=True)
        for n, run in enumerate(sample_rows(z, self.count)):
            if float(weights[n]) == 0.0:
                continue
            own = torch.zeros_like(z)
            own[run] = seed[run]
            for i, g in zip(
                which, torch.autograd.grad(z, params, own, retain_graph=True, allow_unused=True), strict=True
            ):
                if g is not None:
                    g = g.to(total[i].dtype)
                    total[i].add_(weights[n].to(g.device, g.dtype) * g * g)

    def _refuse_mixed_rows(self) -> None:
        """Leave to the slow way what depends on a layer whose rows feel another sample's outputs.

        Half of the samples' outputs, drawn at random, are given a gradient: rows of the others must get none. A row
        that is ascribed to the wrong sample shows in each of two draws with probability at least 1/4.
        """
        doubtful = [(i, use) for i, uses in self.covered.items() for use in uses if self._doubtful(use)]
        if not doubtful or self.count == 1:
            return
        z = self.graph.output
        edges = [call.edge for call in self.calls]
        bad: set[int] = set()
        for draw in range(2):
            g = generator(0x9A17, draw, torch.device("cpu"))
            inside = torch.zeros(self.count, dtype=torch.bool)
            inside[torch.randperm(self.count, generator=g)[: (self.count + 1) // 2]] = True
            own = torch.zeros_like(z)
            for n, run in enumerate(sample_rows(z, self.count)):
                if inside[n]:
                    own[run] = 1.0
            felt = self._gradients_of(z, edges, own)
            for _, use in doubtful:
                if (gradient := felt[use.index]) is not None and bool(
                    (use.split(gradient)[~inside] != 0).any()
                ):
                    bad.add(use.index)
        for i, uses in list(self.covered.items()):
            if any(use.index in bad for use in uses):
                del self.covered[i]

    def _doubtful(self, use: Use) -> bool:
        """Whether it is not known that run n of the rows along dim 0 is sample n's."""
        if self.alone is None or use.index not in self.split_for_sure:
            return True
        # A run of one row cannot be in another order, unless another axis is as long.
        return use.inputs is None or any(x.shape[1] != 1 or self.count in x.shape[2:3] for x in use.inputs)

    def _gradients_of(self, of: Tensor, edges: Sequence[GradientEdge], seed: Tensor) -> list[Tensor | None]:
        return self._shaped(torch.autograd.grad(of, edges, seed, retain_graph=True, allow_unused=True))


def first_sample_alone(
    model: nn.Module, inputs: Any, outputs: Any, count: int
) -> dict[str, list[tuple[int, ...]]] | None:
    """The shapes of every module's outputs where the first sample goes through the model alone, call by call.

    A layer that sees one row a sample sees N times as many rows in the batch; one that sees the same for all samples
    (an embedding of positions) does not, although its rows may happen to be N.

    Returns:
        ``None`` where the outputs are not those that the sample has in the batch, or where that cannot be tried.

    Cost: 1/N of a forward pass.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = next((x for x in leaves(output)), None)
            shapes.setdefault(name, []).append(() if first is None else tuple(first.shape))

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if m._parameters]
    try:
        with torch.no_grad():
            alone = list(leaves(model(rows(inputs, 0, count))))
        pairs = list(zip(alone, leaves(rows(outputs, 0, count)), strict=True))
        same = [
            bool((a - b.detach()).abs().max() <= 5 * torch.finfo(a.dtype).eps ** 0.6 * b.detach().abs().max())
            for a, b in pairs
            if a.is_floating_point() and a.numel()
        ]
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        return None
    finally:
        for handle in handles:
            handle.remove()
    return shapes if same and all(same) else None


def sample_rows(z: Tensor, count: int) -> list[slice]:
    """The rows of z that belong to each of ``count`` samples: equal runs along dim 0."""
    if z.dim() == 0 or z.shape[0] % count:
        raise ValueError(
            f"outputs of shape {tuple(z.shape)} must hold the {count} samples along dim 0: per-sample curvature needs "
            "batch-first outputs"
        )
    run = z.shape[0] // count
    return [slice(n * run, (n + 1) * run) for n in range(count)]
