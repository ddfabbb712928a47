"""What is sent back from the outputs: vectors V_k with Σ_k V_k V_kᵀ = H_z, or its estimate, for each kind of Fisher.

Legend: z the outputs, (lead, C), lead = (N, T…); H_n = c_n M_n = S_n S_nᵀ the block of position n; u_n the part of
∂f/∂z at sample n. With V_k sent back, the gradient of a layer's output at sample n is g_nk, and G = Σ_n Σ_k g_nk g_nkᵀ.

- ``type-2``: the columns of S_n, so G is that of the Gauss-Newton matrix (the exact Fisher of the likelihood).
- ``mc``: √(c_n/K) times the score of a label drawn from the model, K draws.
- ``empirical``: u_n / √c_n, the gradient for the label of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvature.kronecker.output_curvature import MAX_CLASSES, OutputCurvature
from curvature.loss_graph import LossGraph
from curvature.sample_draws import sample_numbers, uniform

FisherKind = Literal["type-2", "mc", "empirical", "forward-only"]
FISHER_KINDS: tuple[FisherKind, ...] = ("type-2", "mc", "empirical", "forward-only")

#: Largest number of backward passes for which every position of a sequence output is sent back on its own.
EXACT_COLUMNS = 256


@dataclass(frozen=True)
class Column:
    """One vector to send back from the outputs.

    Args:
        value: V_k, shaped like z.
        position: the one position (an index into T…, flattened) where it is not zero, or ``None`` for all.
    """

    value: Tensor
    position: int | None = None


def columns(
    kind: FisherKind,
    graph: LossGraph,
    found: OutputCurvature,
    samples: int,
    seed: int,
    draw: int,
    own_weights: Tensor | None = None,
    first: int = 0,
) -> Iterator[Column]:
    """The vectors V_k of one loss; each is one backward pass, without weight gradients.

    Args:
        kind: which Fisher.
        graph: the loss.
        found: its curvature at the outputs.
        samples: K, for ``"mc"``.
        seed: of labels and signs.
        draw: the number of this step's first draw.
        own_weights: c of every sample, for ``"empirical"``, where the caller knows it.
        first: the number of the loss's first sample in the step's batch.

    Raises:
        ValueError: where C is too large for a backward pass each.
    """
    if kind == "forward-only":
        return iter(())
    if kind == "empirical":
        return _empirical(graph, found, own_weights)
    if kind == "mc":
        return _sampled(graph, found, samples, seed, draw, first)
    if found.z.shape[-1] > MAX_CLASSES:
        raise ValueError(
            f"fisher='type-2' sends back one vector a class, and there are {found.z.shape[-1]} classes (more than "
            f"{MAX_CLASSES}): use fisher='mc' with a few samples"
        )
    return _factor_columns(graph, found, seed, draw, first)


def sample_weights(weights: Tensor) -> Tensor:
    """c of each sample, (N,): a sample's positions added up."""
    return weights.reshape(weights.shape[0], -1).sum(1) if weights.dim() else weights.reshape(1)


def _factor_columns(
    graph: LossGraph, found: OutputCurvature, seed: int, draw: int, first: int
) -> Iterator[Column]:
    """The columns of S_n. Positions of one sequence may meet in a layer, where their vectors must not interfere.

    Few positions are sent back one by one, which is exact. Many go together, each with a random sign: the cross
    terms then vanish in the mean, and vanish exactly where positions do not mix.
    """
    z = found.z
    lead, C = z.shape[:-1], z.shape[-1]
    positions = math.prod(lead[1:])
    root = _root(found)
    alone = positions > 1 and positions * C <= EXACT_COLUMNS
    if positions > 1 and not alone:
        numbers = sample_numbers(first, lead[0], z.device)
        signs = uniform(seed, draw, numbers, positions, torch.float32).sub_(0.5).sign_()
        root = root * signs.to(z.dtype).reshape(*lead, 1, 1)
    for k in range(C):
        column = root[..., k].expand(z.shape)
        if not alone:
            yield Column(_back(graph, found, column))
            continue
        flat = column.reshape(lead[0], positions, C)
        for t in range(positions):
            one = torch.zeros_like(flat)
            one[:, t] = flat[:, t]
            yield Column(_back(graph, found, one.reshape(z.shape)), t)


def _root(found: OutputCurvature) -> Tensor:
    """S_n with H_n = S_n S_nᵀ, (lead, C, C)."""
    z = found.z
    if found.blocks is not None:
        values, vectors = torch.linalg.eigh((found.blocks + found.blocks.mT) / 2)
        size = values.abs().amax()
        if bool((values < -30 * torch.finfo(values.dtype).eps ** 0.5 * size).any()):
            raise ValueError(
                "the loss is concave in some output, so its Gauss-Newton matrix is indefinite and has no Kronecker "
                "factors: use fisher='empirical', or a matrix-free curvature (GaussNewton)"
            )
        root: Tensor = vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)
        return root
    assert found.known is not None
    weight = found.layout.last(found.known.weights).sqrt()
    if found.known.likelihood == "gaussian":
        return torch.diag_embed(weight.expand(z.shape))
    if found.known.likelihood == "bernoulli":
        return torch.diag_embed(weight * (torch.sigmoid(z) * torch.sigmoid(-z)).sqrt())
    p = torch.softmax(z, -1)
    # diag(p) - p pᵀ = S Sᵀ for S = diag(√p) - p √pᵀ, since Σ p = 1
    factor: Tensor = torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
    return weight.unsqueeze(-1) * factor


def _sampled(
    graph: LossGraph, found: OutputCurvature, samples: int, seed: int, draw: int, first: int
) -> Iterator[Column]:
    """√(c_n/K) times the score of a label drawn from the model."""
    assert found.known is not None
    for k in range(samples):
        sigma = found.known.draw(seed, draw + k, first) / math.sqrt(samples)
        yield Column(sigma.to(graph.output.dtype))


def _empirical(graph: LossGraph, found: OutputCurvature, own_weights: Tensor | None) -> Iterator[Column]:
    """u_n / √c_n, with c_n of the whole sample: a sequence is one sample."""
    u = found.layout.last(graph.output_gradient().detach()).to(found.z.dtype)
    c = own_sample_weights(found) if own_weights is None else own_weights.to(u.device, u.dtype)
    root = torch.where(c > 0, c, torch.ones_like(c)).rsqrt() * (c > 0)
    yield Column(_back(graph, found, u * root.reshape(-1, *[1] * (u.dim() - 1))))


def own_sample_weights(found: OutputCurvature) -> Tensor:
    """c_n with which sample n's own mean loss enters the batch's, as far as the graph tells.

    A categorical position counts with its c. Elementwise losses are means over elements, so a sample counts with
    the sum of its elements' c, halved for a square, whose second derivative is 2. So a mean over N samples gives 1/N.
    """
    assert found.known is not None
    if found.known.likelihood == "categorical":
        return sample_weights(found.weights)
    total = sample_weights(found.weights) * found.z.shape[-1]
    return total / 2 if found.known.likelihood == "gaussian" else total


def _back(graph: LossGraph, found: OutputCurvature, v: Tensor) -> Tensor:
    return found.layout.back(v).to(graph.output.dtype)
