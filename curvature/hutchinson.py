"""Hutchinson's estimate of the Hessian diagonal: E[z ⊙ Hz] over random signs z.

Legend: z a probe with E[z zᵀ] = I, H the Hessian, K probes, t the refreshes seen, h the running mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from curvature import vectors
from curvature.estimate import from_statistics
from curvature.loss_graph import LossGraph
from curvature.matrix_free.hessian import difference_product
from curvature.matrix_free.snapshot import Snapshot
from curvature.operators import DiagonalOperator
from curvature.probes import Distribution, probe
from curvature.problem import Problem
from curvature.protocols import (
    CurvatureEstimator,
    CurvatureOperator,
    Estimator,
    HessianProduct,
    Needs,
    Observation,
    State,
    Statistics,
)
from curvature.registry import estimators
from curvature.running_mean import check_beta, running_mean_

DiagonalMode = Literal["reverse", "finite-difference"]
"""How a probe's Hessian-vector product is taken."""


@dataclass(frozen=True)
class HutchinsonDiagonal(Estimator):
    """diag(H) by random probes, signed, as a running mean over refreshes.

    E[z ⊙ Hz] = diag(H), since E[z_i z_j] = 0 for i ≠ j. The variance of entry i is Σ_{j≠i} H_ij² for Rademacher
    probes, so one probe is exact where H is diagonal. Signs of an indefinite Hessian survive; a method that wants
    absolute values or root mean squares (AdaHessian) takes them after the mean.

    AdaHessian's spatial averaging trades resolution for variance: the estimate is replaced by its mean over small
    groups of entries whose curvature is alike, a convolution's kernel above all. It is linear, so signs stay what they
    are; but B is then no longer diag(H), only its mean over each group.

    Args:
        beta: decay of the running mean over refreshes, in [0, 1).
        probes: K >= 1, Hessian-vector products a refresh.
        distribution: ``"rademacher"`` or ``"gaussian"`` (whose variance is larger by 2 H_ii²).
        interval: steps between refreshes, >= 1.
        seed: of the probes; step t draws the same ones on every rank, micro-batch and after a resume.
        spatial_average: average over each convolution kernel, the dimensions after the second.
        block_size: with ``spatial_average``, average a matrix over runs of this many neighbours along its last
            dimension (the inputs of a linear layer), the last of a row shorter where it must be; 1 leaves them alone.
        hvp: ``"reverse"``, on the loss's graph; or ``"finite-difference"``, two gradients a probe, for a model without
            a double backward (sharded, compiled): in an optimizer it needs ``step(closure)``, and no graph.

    >>> import torch
    >>> from curvature import estimate
    >>> model = torch.nn.Conv1d(1, 1, 2, bias=False)  # two taps see 1 and 3
    >>> data = [(torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1, 1))]
    >>> estimate(HutchinsonDiagonal(probes=3000), model, torch.nn.MSELoss(), data).diagonal()[0].round()
    tensor([[[ 2., 18.]]])
    >>> averaged = HutchinsonDiagonal(probes=3000, spatial_average=True)
    >>> estimate(averaged, model, torch.nn.MSELoss(), data).diagonal()[0].round()
    tensor([[[10., 10.]]])

    Cost: K Hessian-vector products (about 2 gradients each) every ``interval`` steps; 4 bytes a parameter of state.
    References: Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007; Yao et al. 2021, arXiv 2006.00719 (equation (10) is the
    spatial average).
    """

    beta: float = 0.999
    probes: int = 1
    distribution: Distribution = "rademacher"
    interval: int = 10
    seed: int = 0
    spatial_average: bool = False
    block_size: int = 1
    hvp: DiagonalMode = "reverse"

    semidefinite = False

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.hvp not in get_args(DiagonalMode):
            raise ValueError(f"hvp must be 'reverse' or 'finite-difference', got {self.hvp!r}")
        if self.probes < 1:
            raise ValueError(f"probes must be >= 1, got {self.probes}")
        if self.interval < 1:
            raise ValueError(f"interval must be >= 1, got {self.interval}")
        if self.distribution not in ("rademacher", "gaussian"):
            raise ValueError(f"distribution must be 'rademacher' or 'gaussian', got {self.distribution!r}")
        size: object = self.block_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"block_size must be an integer >= 1, got {size!r}")
        if self.block_size > 1 and not self.spatial_average:
            raise ValueError(
                f"block_size={self.block_size} averages nothing without spatial_average=True: set that too, or leave "
                "block_size out"
            )

    @property
    def needs(self) -> Needs:
        """Hessian-vector products on the loss's graph; finite differences need only gradients."""
        return Needs.GRAD if self.evaluates_gradients else Needs.GRAD | Needs.HVP

    @property
    def evaluates_gradients(self) -> bool:  # type: ignore[override]
        """Finite differences run the closure again."""
        return self.hvp == "finite-difference"

    @property
    def shardable(self) -> bool:
        """Gradients of shards are at hand, a graph of them is not; runs of a matrix may cross a cut."""
        return self.evaluates_gradients and self.block_size == 1

    def init(self, params: Sequence[Tensor]) -> State:
        """h = 0; the step count is the host's, since it decides what is computed."""
        return {
            "diagonal": vectors.zeros_like(params),
            "count": [vectors.scalar_like([p]) for p in params],
            "step": 0,
        }

    def due(self, state: State) -> bool:
        """Every ``interval`` steps, beginning with the first."""
        return cast(int, state["step"]) % self.interval == 0

    def estimate(self, problem: Problem) -> CurvatureOperator:
        """One shot over batches."""
        return (
            diagonal_by_differences(self, problem)
            if self.evaluates_gradients
            else from_statistics(self, problem)
        )

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """Mean of z ⊙ Hz over the probes of this step."""
        remaining = self.probes

        def product(z: Sequence[Tensor]) -> list[Tensor]:
            nonlocal remaining
            remaining -= 1
            return graph.hvp(z, last=graph.gives_gradient and remaining == 0)

        return {"diagonal": self.probed(product, graph.params, cast(int, state["step"]))}

    def measured(self, state: State, seen: Observation) -> list[Tensor] | None:
        """This step's estimate, measured on the loss's graph or here by differences; ``None`` between refreshes."""
        if not self.evaluates_gradients:
            return cast("list[Tensor] | None", seen.statistics.get("diagonal"))
        if not self.due(state):
            return None
        if seen.gradient_at is None:
            raise RuntimeError(
                'hvp="finite-difference" evaluates gradients at shifted points: use step(closure)'
            )
        product = difference_product(seen.gradient_at, seen.parameters)
        return self.probed(product, seen.parameters, cast(int, state["step"]))

    def probed(self, hvp: HessianProduct, params: Sequence[Tensor], step: int) -> list[Tensor]:
        """Mean of z ⊙ Hz over the probes of a step."""
        estimate: list[Tensor] = []
        for k in range(self.probes):
            z = probe(params, self.seed, step * self.probes + k, self.distribution)
            product = hvp(z)
            if k == 0:  # the probe's own memory
                torch._foreach_mul_(z, [hz.to(z_i.dtype) for hz, z_i in zip(product, z, strict=True)])
                estimate = z
                continue
            for e, z_i, hz_i in zip(estimate, z, product, strict=True):
                e.addcmul_(z_i, hz_i.to(e.dtype))
        if self.probes > 1:
            torch._foreach_div_(estimate, float(self.probes))
        return estimate

    def update(self, state: State, seen: Observation) -> None:
        """Take mean(z ⊙ Hz), averaged over space if asked, into h on refresh steps."""
        measured = self.measured(state, seen)
        state["step"] = cast(int, state["step"]) + 1
        if measured is None:
            return
        diagonal, count = cast("list[Tensor]", state["diagonal"]), cast("list[Tensor]", state["count"])
        live = [i for i, g in enumerate(seen.gradient) if g is not None]
        values = [self.averaged(measured[i]) for i in live]
        running_mean_([diagonal[i] for i in live], values, [count[i] for i in live], self.beta)

    def averaged(self, h: Tensor) -> Tensor:
        """One parameter's estimate, over space if asked."""
        return over_space(h, self.block_size) if self.spatial_average else h

    def operator(self, state: State) -> DiagonalOperator:
        """diag(h)."""
        return DiagonalOperator(cast("list[Tensor]", state["diagonal"]))


def diagonal_by_differences(estimator: CurvatureEstimator, problem: Problem) -> CurvatureOperator:
    """One shot over batches of an estimator that takes its products by differences of gradients."""
    snapshot = Snapshot(problem, math_attention=False)
    params = snapshot.params
    state = estimator.init(params)
    estimator.update(state, Observation(params, parameters=params, gradient_at=snapshot.gradient_at))
    return estimator.operator(state)


def over_space(h: Tensor, block_size: int = 1) -> Tensor:
    """The mean over a convolution's kernel, shaped like ``h``; of a matrix, over runs of its last dimension.

    Vectors (biases, norms) have no space.

    Args:
        h: an estimate shaped like its parameter.
        block_size: length of a matrix's runs; the last of a row may be shorter.

    >>> import torch
    >>> over_space(torch.tensor([[[1.0, 3.0]]]))
    tensor([[[2., 2.]]])
    >>> over_space(torch.tensor([[1.0, 3.0, 5.0]]), block_size=2)
    tensor([[2., 2., 5.]])
    """
    if h.dim() > 2:
        return h.mean(dim=tuple(range(2, h.dim())), keepdim=True).expand_as(h)
    if h.dim() < 2 or block_size == 1:
        return h
    runs = [run.mean(dim=1, keepdim=True).expand_as(run) for run in h.split(block_size, dim=1)]
    return torch.cat(runs, dim=1)


estimators.add("hutchinson-diagonal", HutchinsonDiagonal)
