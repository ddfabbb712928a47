"""Hutchinson's estimate of the Hessian diagonal: E[z ⊙ Hz] over random signs z.

Legend: z a probe with E[z zᵀ] = I, H the Hessian, K probes, t the refreshes seen, h the running mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from curvature import vectors
from curvature.loss_graph import LossGraph
from curvature.operators import DiagonalOperator
from curvature.probes import Distribution, probe
from curvature.protocols import Estimator, Needs, Observation, State, Statistics
from curvature.registry import estimators
from curvature.running_mean import check_beta, running_mean_


@dataclass(frozen=True)
class HutchinsonDiagonal(Estimator):
    """diag(H) by random probes, signed, as a running mean over refreshes.

    E[z ⊙ Hz] = diag(H), since E[z_i z_j] = 0 for i ≠ j. The variance of entry i is Σ_{j≠i} H_ij² for Rademacher
    probes, so one probe is exact where H is diagonal. Signs of an indefinite Hessian survive; a method that wants
    absolute values or root mean squares (AdaHessian) takes them after the mean.

    Args:
        beta: decay of the running mean over refreshes, in [0, 1).
        probes: K >= 1, Hessian-vector products a refresh.
        distribution: ``"rademacher"`` or ``"gaussian"`` (whose variance is larger by 2 H_ii²).
        interval: steps between refreshes, >= 1.
        seed: of the probes; step t draws the same ones on every rank, micro-batch and after a resume.

    Cost: K Hessian-vector products (about 2 gradients each) every ``interval`` steps; 4 bytes a parameter of state.
    References: Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007; Yao et al. 2021, arXiv 2006.00719.
    """

    beta: float = 0.999
    probes: int = 1
    distribution: Distribution = "rademacher"
    interval: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.probes < 1:
            raise ValueError(f"probes must be >= 1, got {self.probes}")
        if self.interval < 1:
            raise ValueError(f"interval must be >= 1, got {self.interval}")
        if self.distribution not in ("rademacher", "gaussian"):
            raise ValueError(f"distribution must be 'rademacher' or 'gaussian', got {self.distribution!r}")

    @property
    def needs(self) -> Needs:
        """Hessian-vector products."""
        return Needs.GRAD | Needs.HVP

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

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """Mean of z ⊙ Hz over the probes of this step."""
        step = cast(int, state["step"])
        estimate: list[Tensor] = vectors.zeros_like(graph.params)
        for k in range(self.probes):
            z = probe(graph.params, self.seed, step * self.probes + k, self.distribution)
            for e, z_i, hz_i in zip(estimate, z, graph.hvp(z), strict=True):
                e.addcmul_(z_i, hz_i.to(e.dtype), value=1.0 / self.probes)
        return {"diagonal": estimate}

    def update(self, state: State, seen: Observation) -> None:
        """Take mean(z ⊙ Hz) into h on refresh steps."""
        state["step"] = cast(int, state["step"]) + 1
        if not seen.statistics:
            return
        measured = cast("list[Tensor]", seen.statistics["diagonal"])
        diagonal, count = cast("list[Tensor]", state["diagonal"]), cast("list[Tensor]", state["count"])
        live = [i for i, g in enumerate(seen.gradient) if g is not None]
        running_mean_(
            [diagonal[i] for i in live], [measured[i] for i in live], [count[i] for i in live], self.beta
        )

    def operator(self, state: State) -> DiagonalOperator:
        """diag(h)."""
        return DiagonalOperator(cast("list[Tensor]", state["diagonal"]))


estimators.add("hutchinson-diagonal", HutchinsonDiagonal)
