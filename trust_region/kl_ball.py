"""The KL ellipsoid: steps bounded in the metric of the curvature itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.protocols import CurvatureOperator, State
from trust_region.projected import scaling
from trust_region.protocols import Solution, StepContext
from trust_region.unbounded import Shape


@dataclass(frozen=True)
class KLBall(Shape):
    """{p : pᵀBp <= Δ}: with B a Fisher matrix, twice the KL divergence between the model's outputs before and after.

    Choose it with Fisher or Gauss-Newton curvature (K-FAC, natural gradient). The step is the Newton step -(B+λI)⁻¹g,
    scaled into the ellipsoid; without damping that is the exact minimiser for every B. A scaled Newton step always
    reduces the model.

    Args:
        includes_lr: measure the step after the learning rate, (ηp)ᵀB(ηp) <= Δ: the "KL clip" of K-FAC optimizers,
            where Δ is the κ of the literature (often 0.001).
        includes_damping: measure by the damped matrix C that is solved with, pᵀCp <= Δ, where Cp = -g: what K-FAC
            optimizers clip. It also holds steps along which B is flat and the damping alone decides, and saves the
            product: the prediction is then the damped model's (Martens & Grosse 2015, section 6.5).

    Raises:
        ValueError: where the curvature is not positive along the step (on the CPU; an accelerator is not waited for,
            and there such a step predicts nothing and is rejected).

    >>> from curvature import DiagonalOperator
    >>> B = DiagonalOperator([torch.tensor([4.0, 1.0])])
    >>> KLBall().minimise({}, [torch.tensor([4.0, 0.0])], B, torch.tensor(1.0), 0.0, StepContext()).step
    [tensor([-0.5000, -0.0000])]

    Cost: one ``solve``, and one product unless ``includes_damping``.
    References: Schulman et al. 2015, arXiv 1502.05477, appendix C; Ba, Grosse & Martens 2017, section 5 (KL clip).
    """

    includes_lr: bool = False
    includes_damping: bool = False

    definite_only = True

    def minimise(
        self,
        state: State,
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        damping: Tensor | float,
        context: StepContext,
    ) -> Solution:
        """The Newton step, scaled."""
        newton = vectors.negative(curvature.solve(gradient, damping))
        product = vectors.negative(gradient) if self.includes_damping else curvature.matvec(newton)
        factor, energy = self._factor(newton, product, radius, context)
        noise = 1e3 * torch.finfo(energy.dtype).eps * vectors.norm(newton) * vectors.norm(product)
        if vectors.readable(energy) and bool(energy < -noise):
            raise ValueError(
                f"KLBall needs positive semi-definite curvature, and pᵀBp = {float(energy):.3g} < 0: use a Fisher or "
                "Gauss-Newton curvature, or L2Ball with SteihaugCG for an indefinite one"
            )
        whole = vectors.readable(factor) and bool(factor == 1)  # nothing to scale
        return Solution(
            step=newton if whole else vectors.scale(newton, factor),
            on_boundary=factor < 1,
            negative_curvature=energy < -noise,
            iterations=1,
            curvature_step=product if whole else vectors.scale(product, factor),
        )

    def project(
        self,
        state: State,
        step: Sequence[Tensor],
        gradient: Sequence[Tensor],
        curvature: CurvatureOperator,
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> list[Tensor]:
        """``step`` scaled into the ellipsoid: the nearest point in the metric of B."""
        return vectors.scale(step, self._factor(step, curvature.matvec(step), radius, context)[0])

    def _factor(
        self,
        step: Sequence[Tensor],
        product: Sequence[Tensor],
        radius: Tensor | Sequence[Tensor],
        context: StepContext,
    ) -> tuple[Tensor, Tensor]:
        bound = radius if isinstance(radius, Tensor) else radius[0]
        parts = vectors.dots(step, product)
        if self.includes_lr and context.lr is not None:
            parts = [eta**2 * x for eta, x in zip(context.lr, parts, strict=True)]
        energy = vectors.total(parts)
        bound = bound.to(energy.device, energy.dtype)
        return scaling(energy.clamp(min=0).sqrt(), bound.sqrt()), energy
