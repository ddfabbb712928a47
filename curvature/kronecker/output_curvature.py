"""The loss's own curvature at the model's outputs, as blocks H_n = c_n M_n, read from the loss's graph.

Legend: z the outputs with the class axis last, ``lead`` its other axes (N, T…), one position n each; C classes;
H_z = ∂²f/∂z²; p = softmax(z); σ = sigmoid(z); c_n the weight of position n in the loss (1/N for a mean, w_y / Σ w
with class weights, 0 where masked); M_n the curvature of its negative log-likelihood: I (gaussian), diag(p) - p pᵀ
(categorical), diag(σ(1-σ)) (bernoulli).

Nothing is assumed of the loss. A structure is fitted to one product with H_z and verified on another, so
reduction, class weights, ``ignore_index``, smoothing and masks come out exactly, or nothing does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvature.loss_graph import LossGraph
from curvature.probes import generator

Likelihood = Literal["categorical", "gaussian", "bernoulli"]
LIKELIHOODS: tuple[Likelihood, ...] = ("gaussian", "categorical", "bernoulli")


@dataclass(frozen=True)
class OutputLayout:
    """Which axis of z holds the classes.

    Args:
        shape: the shape of z.
        lead: the shape of the other axes, the sample first.
        axis: the class axis; ``None`` where every element stands alone (C = 1).
    """

    shape: torch.Size
    lead: tuple[int, ...]
    axis: int | None

    def last(self, v: Tensor) -> Tensor:
        """A tensor shaped like z as (lead, C)."""
        return v.unsqueeze(-1) if self.axis is None else v.movedim(self.axis, -1).reshape(*self.lead, -1)

    def back(self, v: Tensor) -> Tensor:
        """The inverse of :meth:`last`."""
        if self.axis is None:
            return v.reshape(self.shape)
        moved = [n for i, n in enumerate(self.shape) if i != self.axis % len(self.shape)]
        return v.reshape(*moved, v.shape[-1]).movedim(-1, self.axis)


@dataclass(frozen=True)
class OutputCurvature:
    """H_z as one block a position.

    Args:
        layout: how z is laid out.
        likelihood: the structure found, or ``None`` for a loss of no known likelihood.
        weights: c, shaped ``lead``; for an unknown likelihood the trace of the block, which is proportional to it
            wherever all positions share one curvature, and zero where the loss masks.
        z: the outputs, detached, (lead, C), float32 or wider.
        blocks: H_n, (lead, C, C), where no likelihood was found.
    """

    layout: OutputLayout
    likelihood: Likelihood | None
    weights: Tensor
    z: Tensor
    blocks: Tensor | None = None


def candidates(z: Tensor) -> list[OutputLayout]:
    """The layouts that z may have, the likelier first: losses put classes last, or second for images."""
    shape = z.shape
    if z.dim() == 0:
        return [OutputLayout(shape, (), None)]
    if z.dim() == 1:
        return [OutputLayout(shape, tuple(shape), None), OutputLayout(shape, (1,), 0)]
    last = OutputLayout(shape, tuple(shape[:-1]), -1)
    if z.dim() == 2:
        return [last]
    second = OutputLayout(shape, (shape[0], *shape[2:]), 1)
    return [last, second] if z.dim() == 3 else [second, last]


def unit_product(likelihood: Likelihood, z: Tensor, v: Tensor) -> Tensor:
    """M v at every position: O(N C)."""
    if likelihood == "gaussian":
        return v
    if likelihood == "bernoulli":
        s = torch.sigmoid(z)
        return s * (1 - s) * v
    p = torch.softmax(z, -1)
    return p * (v - (p * v).sum(-1, keepdim=True))


def output_curvature(
    graph: LossGraph, likelihood: Likelihood | None = None, *, blocks: bool = True, columns_limit: int = 1024
) -> OutputCurvature:
    """Measure c and the structure of H_z on a living graph.

    Args:
        graph: the loss and its outputs.
        likelihood: the only structure to accept; ``None`` finds one.
        blocks: whether a loss of no known likelihood may be answered by its blocks.
        columns_limit: largest C for which blocks are formed.

    Raises:
        ValueError: for a loss that couples positions, is concave somewhere, or is not of ``likelihood``.

    Cost: two products with H_z; C more where blocks are formed. Never a pass through the model.
    """
    z = graph.output.detach()
    wide = torch.promote_types(z.dtype, torch.float32)
    probes = [_probe(z, k) for k in range(2)]
    products = [graph.loss_hvp(v).to(wide) for v in probes]
    scale = torch.linalg.vector_norm(products[1])
    if not bool(torch.isfinite(scale)):
        raise ValueError("the loss has a non-finite curvature at the model's outputs")
    tolerance = 30 * float(torch.finfo(z.dtype).eps) ** 0.5
    constant = _constant_curvature(graph, probes[0])
    kinds = LIKELIHOODS if likelihood is None else (likelihood,)
    for layout in candidates(z):
        zl = layout.last(z).to(wide)
        v, r = ([layout.last(x).to(wide) for x in both] for both in (probes, products))
        for kind in kinds:
            # With one class every loss fits every structure: only the third derivative tells a square apart.
            if likelihood is None and (kind == "gaussian") != constant:
                continue
            c = _fit(unit_product(kind, zl, v[0]), r[0])
            error = torch.linalg.vector_norm(r[1] - c.unsqueeze(-1) * unit_product(kind, zl, v[1]))
            if bool(error <= tolerance * scale):
                return OutputCurvature(layout, kind, _non_negative(c, tolerance), zl)
    if likelihood is not None or not blocks:
        what = f"likelihood={likelihood!r}" if likelihood is not None else "a known likelihood"
        raise ValueError(
            f"this loss does not have the curvature of {what} in the model's outputs: give the likelihood that it "
            "is the negative log of, pass the outputs it is computed from (logits), or use fisher='type-2'"
        )
    return _blocks(graph, z, probes[1], products[1], tolerance, columns_limit)


def _blocks(
    graph: LossGraph, z: Tensor, v: Tensor, product: Tensor, tolerance: float, columns_limit: int
) -> OutputCurvature:
    wide = torch.promote_types(z.dtype, torch.float32)
    scale = torch.linalg.vector_norm(product)
    for layout in candidates(z):
        C = layout.last(z).shape[-1]
        if columns_limit < C:
            continue
        columns = []
        for k in range(C):
            unit = torch.zeros(*layout.lead, C, dtype=z.dtype, device=z.device)
            unit[..., k] = 1.0
            columns.append(layout.last(graph.loss_hvp(layout.back(unit))).to(wide))
        H = torch.stack(columns, -1)
        error = torch.linalg.vector_norm(
            layout.last(product) - (H @ layout.last(v).to(wide).unsqueeze(-1)).squeeze(-1)
        )
        if bool(error <= tolerance * scale):
            trace = H.diagonal(dim1=-2, dim2=-1).sum(-1)
            return OutputCurvature(layout, None, trace.clamp(min=0.0), layout.last(z).to(wide), H)
    raise ValueError(
        "this loss couples the outputs of different positions (or has more than "
        f"{columns_limit} outputs a position and no known likelihood), so its curvature has no block a sample: "
        "use a loss that is a sum over samples, or a matrix-free curvature (GaussNewton)"
    )


def _fit(unit: Tensor, product: Tensor) -> Tensor:
    """c_n = ⟨M v, r⟩ / ⟨M v, M v⟩; where M_n vanishes (a saturated softmax) c_n cannot be seen: the others' mean."""
    square = (unit * unit).sum(-1)
    floor = (1e4 * torch.finfo(unit.dtype).eps) ** 2
    seen = square > floor
    c = torch.where(seen, (unit * product).sum(-1) / square.clamp(min=floor), torch.zeros_like(square))
    mean = c.sum() / seen.sum().clamp(min=1)
    return torch.where(seen, c, mean)


def _non_negative(c: Tensor, tolerance: float) -> Tensor:
    if bool((c < -tolerance * c.abs().max()).any()):
        raise ValueError(
            "the loss gives some sample a negative weight, so its Gauss-Newton matrix is indefinite and has no "
            "Kronecker factors: use non-negative weights, or a matrix-free curvature (GaussNewton)"
        )
    return c.clamp(min=0.0)


def _probe(z: Tensor, index: int) -> Tensor:
    # Uniform in [1, 2] with a random sign: no entry is near 0, so no position hides from the fit.
    g = generator(0x5EED, index, z.device)
    size = 1.0 + torch.rand(z.shape, generator=g, device=z.device, dtype=torch.float32)
    sign = torch.randint(0, 2, z.shape, generator=g, device=z.device) * 2 - 1
    return (size * sign).to(z.dtype)


def _constant_curvature(graph: LossGraph, v: Tensor) -> bool:
    """Whether ∂³f/∂z³ vanishes (along a probe): the mark of a squared loss."""
    gradient = graph.output_gradient()
    if not gradient.requires_grad:
        return True
    product = torch.autograd.grad(gradient, graph.output, v, create_graph=True, materialize_grads=True)[0]
    if not product.requires_grad:
        return True
    third: Tensor | None = torch.autograd.grad(
        product, graph.output, v, retain_graph=True, allow_unused=True
    )[0]
    if third is None:
        return True
    size = torch.linalg.vector_norm(third.detach())
    tiny = float(torch.finfo(third.dtype).eps) * 100
    return bool(size <= tiny * torch.linalg.vector_norm(product.detach()))
