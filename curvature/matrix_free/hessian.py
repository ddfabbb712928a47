"""The Hessian by its products, in three ways.

Legend: f the loss, H = ∇²f, ε the relative step of a difference, u the unit roundoff of the parameters' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from curvature import vectors
from curvature.loss_graph import LossGraph, explain_missing_derivative
from curvature.matrix_free.estimator import MatrixFreeEstimator, Memory
from curvature.matrix_free.operator import MatrixFreeOperator
from curvature.matrix_free.snapshot import Snapshot
from curvature.measured_functions import prove_hessian
from curvature.problem import Problem
from curvature.protocols import HessianProduct, Needs, Observation, State
from curvature.registry import estimators

Mode = Literal["reverse", "forward", "finite-difference"]


@dataclass(frozen=True)
class Hessian(MatrixFreeEstimator):
    """H = ∇²f, exact and possibly indefinite, never formed.

    For Newton-type methods (with :class:`trust_region.SteihaugCG`), for spectra, and as the reference that
    approximations are measured against.

    Args:
        hvp: how a product is computed. ``"reverse"``: the gradient of ⟨∇f, v⟩; the fastest here where the first
            gradient is kept from product to product. ``"forward"``: a directional derivative of the gradient,
            with less memory where many products are taken; only in :func:`curvature.estimate`, which knows the
            model. ``"finite-difference"``: central differences of gradients, for a model without a double
            backward (compiled, flash attention, sharded); relative error about u^(2/3), 4e-5 in float32 and 4e-11
            in float64, more where f has kinks within the step; in an optimizer it needs ``step(closure)``.
        reuse_graph: for ``"reverse"`` in :func:`curvature.estimate` over one batch: ``True`` keeps the graph from
            product to product, ``False`` builds it anew and frees it on the way, which is slower and takes less
            memory; ``"auto"`` keeps it where it holds little beside the parameters. An optimizer's step keeps the
            graphs that it has; several batches keep none. A batch that is split in k parts gives the same products
            with a k-th of the memory.

    >>> from curvature import estimate
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> H = estimate(Hessian(), model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
    >>> H.matvec([torch.tensor([[1.0, 1.0]])])
    [tensor([[1., 4.]])]

    Cost: in gradients of the same model, time and peak memory, for an MLP of 1.3 M parameters (for a GPT of 0.8 M):
    with the graph kept 1.6 (2.2) and 1.4 (3.4); anew 2.7 (3.5) and 1.3 (2.5); forward 4.2 (4.4) and 3.4 (3.3);
    finite differences 3.2 (2.1) and 3.7 (1.3). ``tests/benchmarks/test_products.py`` measures them.
    References: Pearlmutter 1994; Griewank & Walther 2008; Andrei 2009 (the step of the difference).
    """

    hvp: Mode = "reverse"
    reuse_graph: bool | Literal["auto"] = "auto"

    semidefinite = False

    def __post_init__(self) -> None:
        check_mode(self.hvp, "hvp")
        if self.reuse_graph not in (True, False, "auto"):
            raise ValueError(f'reuse_graph must be True, False or "auto", got {self.reuse_graph!r}')

    @property
    def needs(self) -> Needs:
        """Products on the loss's graph; finite differences need only gradients."""
        return Needs.GRAD if self.hvp == "finite-difference" else Needs.GRAD | Needs.HVP

    @property
    def keeps_graph(self) -> bool:  # type: ignore[override]
        """Products are taken while the step is computed."""
        return self.hvp != "finite-difference"

    @property
    def evaluates_gradients(self) -> bool:  # type: ignore[override]
        """Finite differences run the closure again."""
        return self.hvp == "finite-difference"

    @property
    def shardable(self) -> bool:
        """Gradients of shards are at hand, a graph of them is not."""
        return self.hvp == "finite-difference"

    def loop_product(self, state: State, seen: Observation) -> HessianProduct:
        """Σ of the products of this step's losses, or a difference of gradients of the closure."""
        if self.hvp == "finite-difference":
            if seen.gradient_at is None:
                raise RuntimeError(
                    'hvp="finite-difference" evaluates gradients at shifted points: use step(closure)'
                )
            return difference_product(seen.gradient_at, seen.parameters)
        if self.hvp == "forward":
            raise ValueError(
                'hvp="forward" puts dual numbers in the place of the parameters, which only curvature.estimate can: '
                'use hvp="reverse" in an optimizer'
            )
        return super().loop_product(state, seen)

    def graph_product(self, graph: LossGraph, memory: Memory) -> HessianProduct:
        """v ↦ H v, reverse over reverse."""
        return graph.hvp

    def snapshot(self, problem: Problem) -> Snapshot:
        """Differences take the model as it is; derivatives of derivatives need the math attention kernel."""
        snapshot = Snapshot(
            problem, math_attention=self.hvp != "finite-difference", reuse_graph=self.reuse_graph
        )
        if self.hvp == "reverse" and snapshot.has_doubtful_functions:
            batch = snapshot.batches[0]
            prove_hessian(
                lambda leaves, then: snapshot.within(leaves, lambda: then(snapshot.evaluate(batch)[0])),
                snapshot.params,
            )
        return snapshot

    def estimate(self, problem: Problem) -> MatrixFreeOperator:
        """H of all batches of ``problem`` at its present θ."""
        if self.hvp != "finite-difference":
            return super().estimate(problem)
        snapshot = self.snapshot(problem)
        return MatrixFreeOperator(difference_product(snapshot.gradient_at, snapshot.params), snapshot.params)

    def snapshot_product(
        self, snapshot: Snapshot, batch: tuple[Any, Any], memory: Memory, v: Sequence[Tensor]
    ) -> list[Tensor]:
        """H v of one batch."""
        if self.hvp == "forward":
            return forward_product(snapshot, batch, v)
        return snapshot.on_graph(batch, lambda graph: graph.hvp(v, last=not snapshot.reuses_graph))


def check_mode(mode: str, name: str) -> None:
    """Refuse an unknown way to a product."""
    if mode not in get_args(Mode):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}")


def refuse_padding(snapshot: Snapshot, name: str) -> None:
    """Forward mode gives the padding row of an embedding a derivative that reverse mode does not."""
    if snapshot.uses_padding_idx:
        raise ValueError(
            f'{name}="forward" is wrong for an embedding with padding_idx, which forward mode in torch ignores: '
            f'use {name}="reverse"'
        )


def forward_product(snapshot: Snapshot, batch: tuple[Any, Any], v: Sequence[Tensor]) -> list[Tensor]:
    """d/dt ∇f(θ + t v) at t = 0, by dual numbers through the forward and the backward pass."""
    refuse_padding(snapshot, "hvp")
    leaves = snapshot.leaves()
    with explain_missing_derivative('use hvp="reverse" or hvp="finite-difference"'), forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, x.to(p.dtype)) for p, x in zip(leaves, v, strict=True)]

        def differentiate() -> Sequence[Tensor]:
            with _DualTargets():
                loss, _ = snapshot.evaluate(batch)
            return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

        gradient = snapshot.within(duals, differentiate)
        tangents = [forward_ad.unpack_dual(g).tangent for g in gradient]
        # The clone outlives the level; a gradient without a tangent does not depend on θ.
        return [
            torch.zeros_like(p) if t is None else t.detach().clone()
            for p, t in zip(leaves, tangents, strict=True)
        ]


class _DualTargets(TorchFunctionMode):
    """Gives the target of a squared error a tangent of zeros: the derivative in torch writes into a symbolic zero."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.nn.functional.mse_loss, torch._C._nn.mse_loss):
            named = dict(zip(("input", "target"), args, strict=False)) | kwargs
            target = named["target"]
            if forward_ad.unpack_dual(target).tangent is None:
                target = forward_ad.make_dual(target, torch.zeros_like(target))
            if len(args) > 1:
                args = (args[0], target, *args[2:])
            else:
                kwargs["target"] = target
        return func(*args, **kwargs)


def difference_product(
    gradient_at: Callable[[Sequence[Tensor]], list[Tensor]], params: Sequence[Tensor]
) -> HessianProduct:
    """v ↦ (∇f(θ + ε v) - ∇f(θ - ε v)) / 2ε.

    The error of the difference grows as ε², that of rounding as u/ε; ε‖v‖ = u^(1/3) (1 + ‖θ‖) balances them.

    Args:
        gradient_at: shift ↦ ∇f(θ + shift).
        params: θ, to read.
    """
    unit_roundoff = max(torch.finfo(p.dtype).eps for p in params)

    def product(v: Sequence[Tensor]) -> list[Tensor]:
        length = vectors.norm(v)
        if not bool(length > 0):
            return [torch.zeros_like(x) for x in v]
        step = (
            unit_roundoff ** (1 / 3) * (1.0 + vectors.norm([p.detach() for p in params]).to(length)) / length
        )
        ahead = gradient_at(vectors.scale(v, step))
        behind = gradient_at(vectors.scale(v, -step))
        return vectors.scale(vectors.add(ahead, behind, -1.0), 0.5 / step)

    return product


estimators.add("hessian", Hessian)
