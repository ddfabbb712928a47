"""The small problem on which the laws are checked, and the comparisons that they share."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from curvature import vectors
from curvature.estimate import add_statistics, estimate
from curvature.loss_graph import LossGraph
from curvature.protocols import (
    CurvatureEstimator,
    CurvatureOperator,
    Observation,
    State,
    Statistics,
)

SAMPLES = 7


class Witness:
    """Something to refer to weakly."""


class Counting(nn.Module):
    """Passes its input on, and moves a buffer as batch norm does."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return x


@dataclass
class Subject:
    """An estimator and a small problem: seven points, three classes, a network of 31 weights, float64.

    Args:
        factory: the estimator, its class, or ``factory(model=…)``.
        options: of the class.
        semidefinite: whether B must be positive semidefinite.
        splits: whether several batches must equal the one concatenated batch (a sampled curvature need not).
        refreshes: whether a first update must equal :func:`curvature.estimate` on the same batch.
        dtype: of the parameters.
    """

    factory: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    semidefinite: bool = False
    splits: bool = True
    refreshes: bool = True
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, 3, generator=g, dtype=torch.float64).to(self.dtype)
        self.y = torch.randint(0, 3, (SAMPLES,), generator=g)

    def model(self, layout: str = "contiguous") -> nn.Module:
        """The network, the same at every call.

        Args:
            layout: ``"transposed"`` stores its weights with swapped strides, ``"counting"`` has a buffer that moves.
        """
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(self.dtype)
        if layout == "counting":
            model.append(Counting())
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
        if layout == "transposed":
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)
        return model

    def estimator(self, model: nn.Module) -> CurvatureEstimator:
        """The estimator for ``model``."""
        if not callable(self.factory):
            return cast(CurvatureEstimator, self.factory)
        options = dict(self.options)
        if "model" in inspect.signature(self.factory).parameters:
            options.setdefault("model", model)
        return cast(CurvatureEstimator, self.factory(**options))

    def loss(self, model: nn.Module, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(loss, outputs)."""
        outputs = model(self.x[part])
        return nn.functional.cross_entropy(outputs, self.y[part]), outputs

    def estimate(self, model: nn.Module, parts: Sequence[slice] = (slice(None),)) -> CurvatureOperator:
        """The one-shot estimate over parts of the samples."""
        batches = [(self.x[part], self.y[part]) for part in parts]
        return estimate(self.estimator(model), model, nn.CrossEntropyLoss(), batches)

    def observe(
        self, estimator: CurvatureEstimator, state: State, model: nn.Module, without: Collection[int] = ()
    ) -> weakref.ref[Witness]:
        """One update, as an optimizer gives it.

        Args:
            estimator: see :meth:`estimator`.
            state: changed in place.
            model: see :meth:`model`.
            without: indices of parameters whose gradient is None.

        Returns:
            A reference that is dead once the loss's graph is freed.
        """
        params = list(model.parameters())
        loss, outputs = self.loss(model)
        assert outputs.grad_fn is not None
        witness = Witness()  # it lives exactly as long as the node that made the outputs
        cast("dict[str, Witness]", outputs.grad_fn.metadata)["soaa.testing"] = witness
        graph = LossGraph(loss, params, outputs)
        gradient = [None if i in without else g for i, g in enumerate(graph.gradient())]
        statistics: Statistics = {}
        if estimator.needs.graph and is_due(estimator, state) and hasattr(estimator, "measure"):
            add_statistics(statistics, estimator.measure(state, graph))
        graphs = [graph] if getattr(estimator, "keeps_graph", False) else []
        changes = [torch.zeros_like(p) for p in params] if getattr(estimator, "tracks_steps", False) else None
        estimator.update(
            state,
            Observation(gradient, loss.detach(), SAMPLES, statistics, graphs, params, step_change=changes),
        )
        return weakref.ref(witness)


def is_due(estimator: CurvatureEstimator, state: State) -> bool:
    """Whether the coming step measures."""
    due = getattr(estimator, "due", None)
    return True if due is None else bool(due(state))


def flat(v: Sequence[Tensor]) -> Tensor:
    """All elements in C order, float64."""
    return vectors.flatten([x.detach() for x in v]).double()


def split_columns(op: CurvatureOperator, B: Tensor) -> list[Tensor]:
    """Zeros shaped like the parameters."""
    return [torch.zeros_like(d, dtype=B.dtype) for d in op.diagonal()]


def random_vector(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """A vector of standard normals."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in like]


def close(ours: Tensor, theirs: Tensor, message: str, scale: Tensor, tolerance: float = 1e-8) -> None:
    """Assert equality up to ``tolerance`` of the largest entry of ``scale``."""
    error = float((ours - theirs).abs().max())
    size = float(scale.abs().max())
    assert error <= tolerance * (size or 1.0), f"{message}: off by {error:.3g}, largest entry {size:.3g}"
