"""Which likelihood a loss is the negative logarithm of, with what weights, and labels drawn from it.

Legend: z the outputs; f = Σ_n c_n ℓ_n with ℓ_n = -log p(y_n | z_n); H_z = ∂²f/∂z²; M_n the Fisher matrix of one unit
at its outputs; s the score ∂ℓ/∂z for a drawn label, E[s sᵀ] = M. So H_z = diag(c_n M_n), whatever the reduction, class
weights, masks or label smoothing of the loss, and σ = √c s has E[σ σᵀ] = H_z.

- ``"categorical"``: a unit is a position, with logits along one axis; M = diag(p) - p pᵀ, s = p - onehot(y).
- ``"bernoulli"``: a unit is an element, a logit; M = p (1 - p), s = p - y.
- ``"gaussian"``: a unit is an element, a mean, of variance 1; M = 1, s a standard normal.

c is measured on the loss's own graph, and the measurement is checked by a second product; nothing is assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from curvature.loss_graph import LossGraph
from curvature.probes import generator, probe
from curvature.sample_draws import normal, sample_numbers, uniform
from curvature.vectors import compute_dtype

Likelihood = Literal["categorical", "gaussian", "bernoulli"]


def check_likelihood(likelihood: str) -> None:
    """Refuse an unknown name."""
    if likelihood not in get_args(Likelihood):
        raise ValueError(f"likelihood must be 'categorical', 'gaussian' or 'bernoulli', got {likelihood!r}")


@dataclass(frozen=True)
class OutputLikelihood:
    """The weights c of a loss that was found to be this likelihood's.

    Args:
        likelihood: its name.
        axis: the axis of z along which the classes lie; ``None`` where every element is a unit.
        z: the outputs, detached, float32 or wider.
        weights: c >= 0, shaped like z, with size 1 along ``axis``.
    """

    likelihood: Likelihood
    axis: int | None
    z: Tensor
    weights: Tensor

    def draw(self, seed: int, index: int, first: int = 0) -> Tensor:
        """σ = √c s for labels drawn from the model's own likelihood: shaped like z, E[σ σᵀ] = H_z.

        Args:
            seed: the user's seed.
            index: which draw.
            first: the number of z's first sample in the batch; a sample draws by its number, wherever it comes.
        """
        z = self.z
        shape = z.shape if self.axis is None else z.movedim(self.axis, -1).shape[:-1]
        samples = sample_numbers(first, shape[0] if shape else 1, z.device)
        elements = math.prod(shape[1:])
        if self.likelihood == "gaussian":
            score = normal(seed, index, samples, elements, z.dtype).reshape(shape)
        elif self.likelihood == "bernoulli":
            p = torch.sigmoid(z)
            score = p - (uniform(seed, index, samples, elements, z.dtype).reshape(shape) < p).to(p.dtype)
        else:
            assert self.axis is not None
            p = torch.softmax(z, self.axis).movedim(self.axis, -1)
            total = p.cumsum(-1)
            u = uniform(seed, index, samples, elements, z.dtype).reshape(*shape, 1)
            # rounding may leave the last sum below 1: a class past the end is the last one
            labels = torch.searchsorted(total, u * total[..., -1:]).clamp(max=p.shape[-1] - 1)
            score = p.scatter_add(-1, labels, p.new_full(labels.shape, -1.0)).movedim(-1, self.axis)
        return score * self.weights.sqrt()


def output_likelihood(graph: LossGraph, likelihood: Likelihood, *, verify: bool = True) -> OutputLikelihood:
    """Measure c on a living graph.

    Args:
        graph: the loss and its outputs.
        likelihood: which one the caller says that the loss is.
        verify: whether c must also be independent of z, by a third derivative; once a run is enough.

    Raises:
        ValueError: where the loss's curvature is not that of ``likelihood``, or a weight is negative.

    Cost: two products with H_z, O(numel z) each; never a pass through the model.
    """
    check_likelihood(likelihood)
    z = graph.output
    wide = z.detach().to(compute_dtype(z.dtype))
    tolerance = 5 * float(torch.finfo(z.dtype).eps) ** 0.6
    v = probe([wide], 0x51C, 0)[0] * (
        1 + torch.rand(wide.shape, generator=generator(0x51C, 1, z.device), device=z.device)
    )
    product = graph.loss_hvp(v).to(wide.dtype)
    axes = class_axes(z) if likelihood == "categorical" else [None]
    for axis in axes:
        unit, where, size = sharpest_unit(likelihood, wide, axis)
        measured = (
            (graph.loss_hvp(unit).to(wide.dtype) * where).sum(axis, keepdim=True)
            if axis is not None
            else (graph.loss_hvp(unit).to(wide.dtype))
        )
        c = torch.where(
            size > 0, measured / size.clamp(min=torch.finfo(size.dtype).tiny), torch.zeros_like(size)
        )
        error = (product - c * unit_product(likelihood, wide, axis, v)).abs().max()
        scale = torch.maximum(c.abs().max(), product.abs().max())
        if not bool(error <= tolerance * scale):
            continue
        if bool((c < -tolerance * scale).any()):
            raise ValueError(
                "the loss gives some sample a negative weight, so it is no log-likelihood and has no Fisher matrix: "
                "use weights >= 0, or GaussNewtonDiagonal, which keeps the sign"
            )
        if verify and depends_on_outputs(graph, likelihood, axis, c, tolerance):
            continue
        return OutputLikelihood(likelihood, axis, wide, c.clamp(min=0.0))
    raise ValueError(
        f"the loss's curvature at the outputs is not that of likelihood={likelihood!r}: name the likelihood whose "
        "negative logarithm the loss is, and give the outputs from which it is computed (logits, not probabilities); a "
        "loss that is no likelihood has GaussNewtonDiagonal"
    )


def class_axes(z: Tensor) -> list[int]:
    """The axes along which classes may lie, the likelier first: last for sequences, second for images."""
    if z.dim() == 0 or max(z.shape[min(1, z.dim() - 1) :], default=1) < 2:
        raise ValueError(
            f"likelihood='categorical' needs at least 2 classes, got outputs of shape {tuple(z.shape)}"
        )
    if z.dim() <= 2:
        return [z.dim() - 1]
    last = z.dim() - 1
    axes = [last, 1] if z.dim() == 3 else [1, last]
    return [axis for axis in axes if z.shape[axis] > 1]  # one channel of an image is no axis of classes


def unit_product(likelihood: Likelihood, z: Tensor, axis: int | None, v: Tensor) -> Tensor:
    """M v at every unit."""
    if likelihood == "gaussian":
        return v
    if likelihood == "bernoulli":
        return torch.sigmoid(z) * torch.sigmoid(-z) * v
    assert axis is not None
    p = torch.softmax(z, axis)
    return p * (v - (p * v).sum(axis, keepdim=True))


def sharpest_unit(likelihood: Likelihood, z: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(v, where, m): a vector that reads c without cancellation, the entries to read, and what they are for c = 1.

    For a softmax v is the unit vector of the second likeliest class k: (M v)_k = p_k (1 - p_k) with p_k <= 1/2, which
    keeps its relative precision where the softmax saturates.
    """
    ones = torch.ones_like(z)
    if likelihood != "categorical":
        return ones, ones, unit_product(likelihood, z, None, ones)
    assert axis is not None
    p = torch.softmax(z, axis)
    # the maximum of what is left when the maximum is taken out: a third of what sorting the two out takes
    index = p.scatter(axis, p.argmax(axis, keepdim=True), -1.0).argmax(axis, keepdim=True)
    unit = torch.zeros_like(z).scatter(axis, index, 1.0)
    p_k = p.gather(axis, index)
    return unit, unit, p_k * (1 - p_k)


@torch.enable_grad()  # a step runs without a graph of its own, and its products are proven there too
def depends_on_outputs(
    graph: LossGraph, likelihood: Likelihood, axis: int | None, c: Tensor, tolerance: float
) -> bool:
    """Whether c changes with z: every diagonal H_z fits a gaussian pointwise, but only a square has constant c."""
    z = graph.output
    if torch.finfo(z.dtype).eps > 1e-5:  # a third derivative in half precision tells nothing
        return False
    unit, where, _ = sharpest_unit(likelihood, z.detach(), axis)
    gradient = graph.output_gradient()
    if not gradient.requires_grad:
        return False
    try:
        (product,) = torch.autograd.grad(
            gradient, z, unit, create_graph=True, allow_unused=True, materialize_grads=True
        )
        if likelihood == "gaussian":
            size = torch.ones_like(z)
        else:
            size = unit_product(likelihood, z, axis, unit)
        sure = (where != 0) & (size.detach().abs() > 0.02)
        if not bool(sure.any()):
            return False
        signs = probe([z], 0x51C, 2)[0].to(z.dtype)
        total = (torch.where(sure, product / torch.where(sure, size, 1.0), 0.0) * signs).sum()
        if not total.requires_grad:
            return False
        (third,) = torch.autograd.grad(total, z, retain_graph=True, allow_unused=True, materialize_grads=True)
    except (RuntimeError, NotImplementedError):  # no third derivative: the two products must do
        return False
    return not bool(third.abs().max() <= 100 * tolerance * c.abs().max())
