"""A problem held at the θ of one moment: the loss of each batch as a function of parameters alone.

Legend: θ the parameters at the time of the observation, f_b the loss of batch b, ω_b its share, z the outputs.

The model is called through ``torch.func.functional_call`` on copies, so that the operator stays at the θ where it
was observed when the model moves on, and forward mode can put dual numbers in the parameters' place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from curvature.custom_functions import doubtful_nodes
from curvature.frame import Frame
from curvature.loss_graph import LossGraph
from curvature.problem import Problem, versions

Outputs = Any
T = TypeVar("T")


class Snapshot:
    """f_b(θ') for any θ', with everything but θ' as it was when this object was built.

    Trainable parameters and buffers are copied. Frozen parameters and batches are not (they may be most of the
    memory); if one was written to since, a later evaluation raises. Modes (``train``/``eval``) are put back for the
    time of a call.

    Args:
        problem: model, loss and batches.
        math_attention: compute attention by the one kernel that has second derivatives and forward mode.
        reuse_graph: keep the graph of the loss from product to product, where there is only one batch; ``"auto"``
            where it holds little beside the parameters.

    Raises:
        ValueError: for a loss that is not finite, that two evaluations disagree about, or that reads the model's
            parameters by another way than through the model.
    """

    def __init__(
        self, problem: Problem, *, math_attention: bool = True, reuse_graph: bool | Literal["auto"] = True
    ) -> None:
        self.problem = problem
        # A fully masked batch has no part in f, and a loss of its own that is 0/0.
        kept = [(w, b) for w, b in zip(problem.shares, problem.batches, strict=True) if float(w) != 0.0]
        self.shares: list[float | Tensor] = [w for w, _ in kept]
        self.batches = [b for _, b in kept]
        self.params = [p.detach().clone() for p in problem.params]
        self.uses_padding_idx = False
        self.has_doubtful_functions = False
        self._frame = Frame(problem.model)
        self._math_attention = math_attention
        known = {id(p): name for name, p in self._frame.named_parameters()}
        self._names = [known[id(p)] for p in problem.params]
        self._buffers = {name: b.detach().clone() for name, b in self._frame.named_buffers()}
        # Trainable, but not asked about (a part of the model's parameters has this curvature, another that).
        self._others = {
            name: p.detach().clone()
            for name, p in self._frame.named_parameters()
            if p.requires_grad and name not in self._names
        }
        self._modes = [(m, m.training) for m in problem.model.modules()]
        self._frozen = [
            (n, p, p._version) for n, p in problem.model.named_parameters() if not p.requires_grad
        ]
        self._cached: LossGraph | None = None
        self._versions: dict[int, list[int]] = {}
        self._evaluated: list[tuple[Any, Any]] = []
        graph_bytes = self._check()
        if reuse_graph == "auto":
            # The graph of the gradient holds about as much again as that of the loss.
            reuse_graph = 2 * graph_bytes <= sum(p.numel() * p.element_size() for p in self.params)
        self.reuses_graph = reuse_graph and len(self.batches) == 1
        self._versions = {id(batch): versions(batch) for batch in self.batches}

    def leaves(self) -> list[Tensor]:
        """Fresh leaves that hold θ and require grad; they share the copy's memory."""
        return [p.detach().requires_grad_() for p in self.params]

    def within(self, params: Sequence[Tensor], run: Callable[[], T]) -> T:
        """``run()`` while ``params`` stand in the model and everything else is as it was.

        A backward pass belongs inside too: activation checkpointing runs the model again there.
        """
        with self._as_it_was(), torch.enable_grad():
            return self._substituted(params, run)

    def evaluate(
        self, batch: tuple[Any, Any], between: Callable[[Outputs], None] | None = None
    ) -> tuple[Tensor, Outputs]:
        """(f_b, outputs), to be called inside :meth:`within`.

        Args:
            batch: ``(inputs, target)``.
            between: called with the outputs before the loss is computed.
        """
        self._check_unchanged(batch)
        self._evaluated.append(batch)
        inputs, target = batch
        outputs = self.problem.model(inputs)
        if between is not None:
            between(outputs)
        return self.problem.loss_fn(outputs, target), outputs

    def on_graph(self, batch: tuple[Any, Any], run: Callable[[LossGraph], T]) -> T:
        """``run(graph of f_b at θ)``; the graph is kept for the next call where :attr:`reuses_graph`."""
        self._check_unchanged(batch)
        graph = self._cached
        if graph is None:
            leaves = self.leaves()
            loss, outputs = self.within(leaves, lambda: self.evaluate(batch))
            graph = LossGraph(loss, leaves, outputs)
            if self.reuses_graph:
                self._cached = graph
        return self.within(graph.params, lambda: run(graph))

    def _check_unchanged(self, batch: tuple[Any, Any]) -> None:
        if self._versions.get(id(batch), versions(batch)) != versions(batch):
            raise RuntimeError(
                "a batch was written to since the curvature was observed: estimate it again, or give it a copy (clone)"
            )

    def weighted(self) -> Iterator[tuple[float | Tensor, tuple[Any, Any]]]:
        """(ω_b, batch) for every batch."""
        return zip(self.shares, self.batches, strict=True)

    def gradient_at(self, shift: Sequence[Tensor]) -> list[Tensor]:
        """∇f(θ + shift), over all batches."""
        total: list[Tensor] | None = None
        for share, batch in self.weighted():
            moved = [(p + s.to(p.dtype)).requires_grad_() for p, s in zip(self.params, shift, strict=True)]

            def gradient(batch: tuple[Any, Any] = batch, moved: list[Tensor] = moved) -> Sequence[Tensor]:
                loss, _ = self.evaluate(batch)
                return torch.autograd.grad(loss, moved, allow_unused=True, materialize_grads=True)

            total = accumulate(total, self.within(moved, gradient), share)
        assert total is not None  # a problem has at least one batch
        return total

    def _substituted(self, params: Sequence[Tensor], run: Callable[[], T]) -> T:
        tensors = dict(zip(self._names, params, strict=True)) | self._others
        tensors.update(
            {name: b.clone() for name, b in self._buffers.items()}
        )  # batch norm writes into its buffers
        with sdpa_kernel(SDPBackend.MATH) if self._math_attention else nullcontext():
            result: T = torch.func.functional_call(self._frame, tensors, (run,))
        return result

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        for name, p, version in self._frozen:
            if p._version != version:
                raise RuntimeError(
                    f"frozen parameter {name!r} has changed since the curvature was observed: estimate it again"
                )
        changed = [(m, m.training) for m, training in self._modes if m.training != training]
        devices = {p.device for p in self.params if p.device.type != "cpu"}
        with ExitStack() as stack:
            for kind in sorted({d.type for d in devices}) or ["cuda"]:
                of_kind = [d.index or 0 for d in devices if d.type == kind]
                stack.enter_context(torch.random.fork_rng(of_kind, device_type=kind))
            try:
                for m, training in changed:
                    m.training = not training
                yield
            finally:
                for m, training in changed:
                    m.training = training
                for (
                    batch
                ) in self._evaluated:  # a model may work in place on its input, here and in a checkpoint
                    self._versions[id(batch)] = versions(batch)
                self._evaluated.clear()

    def _check(self) -> int:
        """Refuse what would give another matrix without a word; how many bytes the graph of the loss holds."""
        batch = self.batches[0]
        spy = _PaddingSpy()
        with self._as_it_was(), torch.enable_grad():  # one stream of random numbers: dropout draws anew
            with torch.no_grad():
                first = self._substituted(self.params, lambda: self.evaluate(batch))[0].detach()
            leaves = self.leaves()
            held = _HeldBytes(leaves)
            with spy, torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
                loss, outputs = self._substituted(leaves, lambda: self.evaluate(batch))
        self.uses_padding_idx = spy.seen
        self.has_doubtful_functions = bool(doubtful_nodes(loss.grad_fn))
        LossGraph(loss, leaves, outputs)  # a scalar that requires grad, or a clear error
        second = loss.detach()
        if not bool(torch.isfinite(second).all()):
            raise ValueError(f"the loss must be finite where its curvature is taken, got {second.item()}")
        tolerance = 1e3 * torch.finfo(second.dtype).eps
        if not torch.allclose(first, second, rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"the loss must be deterministic, but two evaluations gave {first.item()} and {second.item()}: "
                "call model.eval(), or set the dropout to 0"
            )
        around = torch.autograd.grad(loss, self.problem.params, allow_unused=True, retain_graph=True)
        if any(g is not None for g in around):
            raise ValueError(
                "the loss reads a parameter by a reference of its own, past the model: read it as an attribute of "
                "the model within the loss, so that it is taken at the θ of the observation"
            )
        return held.total


class _HeldBytes:
    """Counts what a graph keeps for its backward pass, every storage once and the parameters' never."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.total = 0
        self._seen = {p.untyped_storage().data_ptr() for p in params}

    def pack(self, x: Tensor) -> Tensor:
        """Count ``x``, and keep it as it is."""
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return x

    @staticmethod
    def unpack(x: Tensor) -> Tensor:
        """``x`` itself."""
        return x


class _PaddingSpy(TorchFunctionMode):
    """Notices an embedding with ``padding_idx``, whose forward derivative in torch ignores it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Of the Python function None means no padding, of the one that it calls -1.
        position = {nn.functional.embedding: 2, torch.embedding: 2, nn.functional.embedding_bag: 10}.get(func)
        if position is not None:
            padding_idx = kwargs.get("padding_idx", args[position] if len(args) > position else None)
            self.seen = self.seen or (
                padding_idx is not None and not (func is torch.embedding and padding_idx < 0)
            )
        return func(*args, **kwargs)


def accumulate(total: list[Tensor] | None, part: Sequence[Tensor], share: float | Tensor) -> list[Tensor]:
    """total + share · part, in place where there is a total."""
    if total is None:
        if isinstance(share, Tensor) or share != 1.0:
            return [share * x for x in part]
        return list(part)
    for t, x in zip(total, part, strict=True):
        t.add_(share * x)
    return total
