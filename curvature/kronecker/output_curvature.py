"""The loss's own curvature at the model's outputs, one block a position, read from the loss's graph.

Legend: z the outputs with the class axis last, (lead, C), lead = (N, T…) the positions; H_z = ∂²f/∂z² with the
diagonal blocks H_n; c_n the weight of position n in the loss (1/N for a mean, w_y / Σ w with class weights, 0 where
masked).

A likelihood is looked for first (:mod:`curvature.likelihood` measures c and proves it). Any other loss that is a sum
over positions is answered by its blocks, C products with H_z, verified on one more.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.likelihood import Likelihood, OutputLikelihood, output_likelihood
from curvature.loss_graph import LossGraph
from curvature.probes import generator

#: Only a square has a constant curvature, so the gaussian must come first: its c is then proven constant.
LIKELIHOODS: tuple[Likelihood, ...] = ("gaussian", "categorical", "bernoulli")

#: Largest C for which the blocks of an unknown loss are formed, and columns sent back.
MAX_CLASSES = 1024


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
        axis = self.axis % len(self.shape)
        moved = [n for i, n in enumerate(self.shape) if i != axis]
        return v.reshape(*moved, v.shape[-1]).movedim(-1, axis)


@dataclass(frozen=True)
class OutputCurvature:
    """H_z as one block a position.

    Args:
        layout: how z is laid out.
        z: the outputs, detached, (lead, C), float32 or wider.
        weights: c of every position, shaped ``lead``. For a loss of no known likelihood the trace of its block,
            which is proportional to c wherever all positions share one curvature, and zero where the loss masks.
        known: the likelihood with its weights, or ``None``.
        blocks: H_n, (lead, C, C), where no likelihood was found.
    """

    layout: OutputLayout
    z: Tensor
    weights: Tensor
    known: OutputLikelihood | None
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


def layout_of(z: Tensor, axis: int | None) -> OutputLayout:
    """The layout with the classes on ``axis``; the likeliest one where every element is a unit of its own."""
    if axis is None:
        return candidates(z)[0]
    axis = axis % z.dim()
    lead = tuple(n for i, n in enumerate(z.shape) if i != axis)
    return OutputLayout(z.shape, lead or (1,), axis)


def output_curvature(
    graph: LossGraph,
    likelihood: Likelihood | None,
    *,
    blocks: bool,
    verify: bool = True,
    proven: Likelihood | None = None,
) -> OutputCurvature:
    """Measure the positions' weights and curvature on a living graph.

    Args:
        graph: the loss and its outputs.
        likelihood: the only one to accept; ``None`` finds one.
        blocks: whether a loss of no known likelihood may be answered by its blocks.
        verify: whether a likelihood is also proven by a third derivative.
        proven: what an earlier loss of this run was found and proven to be.

    Raises:
        ValueError: for a loss that couples positions, or that has no known likelihood where one is needed.

    Cost: two to four products with H_z a likelihood tried; C more where blocks are formed. Never a pass through
    the model.
    """
    if not bool(torch.isfinite(graph.output).all()):
        raise ValueError("outputs must be finite, got NaN or an infinity: the model diverged")
    if likelihood is not None:
        return _from_likelihood(output_likelihood(graph, likelihood, verify=verify and likelihood != proven))
    if proven == "categorical":
        # Its blocks have a form that no other likelihood's have, so two products tell it from them.
        with suppress(ValueError):
            return _from_likelihood(output_likelihood(graph, proven, verify=False))
    for kind in LIKELIHOODS:
        try:
            return _from_likelihood(output_likelihood(graph, kind, verify=verify))
        except ValueError:  # not this one
            continue
    if not blocks:
        raise ValueError(
            "the loss is not the negative logarithm of a known likelihood of these outputs (categorical, gaussian, "
            "bernoulli): pass the outputs from which it is computed (logits), or use fisher='type-2'"
        )
    return _blocks(graph)


def _from_likelihood(found: OutputLikelihood) -> OutputCurvature:
    layout = layout_of(found.z, found.axis)
    weights = layout.last(found.weights).mean(-1)
    return OutputCurvature(layout, layout.last(found.z), weights, found)


def _blocks(graph: LossGraph) -> OutputCurvature:
    """The diagonal blocks of H_z, if it has no others."""
    z = graph.output.detach()
    wide = torch.promote_types(z.dtype, torch.float32)
    probe = torch.randn(z.shape, generator=generator(0xB10C, 0, z.device), device=z.device, dtype=wide)
    product = graph.loss_hvp(probe).to(wide)
    scale = torch.linalg.vector_norm(product)
    tolerance = 5 * float(torch.finfo(z.dtype).eps) ** 0.6
    for layout in candidates(z):
        C = layout.last(z).shape[-1]
        if C > MAX_CLASSES:
            continue
        columns = []
        for k in range(C):
            unit = torch.zeros(*layout.lead, C, dtype=wide, device=z.device)
            unit[..., k] = 1.0
            columns.append(layout.last(graph.loss_hvp(layout.back(unit))).to(wide))
        H = torch.stack(columns, -1)
        rest = layout.last(product) - (H @ layout.last(probe).unsqueeze(-1)).squeeze(-1)
        if bool(torch.linalg.vector_norm(rest) <= tolerance * scale):
            trace = H.diagonal(dim1=-2, dim2=-1).sum(-1)
            return OutputCurvature(layout, layout.last(z).to(wide), trace.clamp(min=0.0), None, H)
    raise ValueError(
        f"this loss couples the outputs of different positions, or has no known likelihood and more than {MAX_CLASSES} "
        "outputs a position, so its curvature has no block a sample: use a loss that is a sum over samples, or a "
        "matrix-free curvature (GaussNewton)"
    )
