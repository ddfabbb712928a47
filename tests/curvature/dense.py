"""The reference: every matrix formed densely by a loop of ``torch.autograd.grad``, to be used in float64.

Nothing here shares code with the package, and nothing uses ``torch.func``, whose nested Jacobians are wrong
for ``layer_norm``. ``test_dense.py`` checks these against finite differences and closed forms.

Legend: θ the parameters flattened in order, P elements; z the outputs, M elements; J = ∂z/∂θ, (M, P).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def trainable(model: nn.Module) -> list[Tensor]:
    """Parameters that require grad, shared ones once, in the order that the package promises."""
    return [p for p in model.parameters() if p.requires_grad]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def split(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of ``flat``."""
    sizes = [p.numel() for p in params]
    return [piece.reshape(p.shape).clone() for piece, p in zip(vector.split(sizes), params, strict=True)]


def _row(of: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """∂of/∂θ as one vector, with zeros where ``of`` does not reach."""
    if not of.requires_grad:
        return torch.cat([torch.zeros_like(p).reshape(-1) for p in params])
    parts = torch.autograd.grad(of, params, retain_graph=True, create_graph=create_graph, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, params, strict=True)]
    return torch.cat([g.reshape(-1) for g in filled])


def gradient(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    """(P,)."""
    return _row(loss, params).detach()


def hessian(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    """(P, P): the derivative of every entry of the gradient. Not symmetrised: a test may see asymmetry."""
    first = _row(loss, params, create_graph=True)
    return torch.stack([_row(entry, params).detach() for entry in first])


def jacobian(z: Tensor, params: Sequence[Tensor]) -> Tensor:
    """(M, P)."""
    return torch.stack([_row(entry, params).detach() for entry in z.reshape(-1)])


def gauss_newton(loss: Tensor, z: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Jᵀ H_z J, with H_z = ∂²loss/∂z² taken from the loss itself."""
    J = jacobian(z, params)
    return J.T @ hessian(loss, [z]) @ J


def output_fisher(z: Tensor, likelihood: str) -> Tensor:
    """E_y[s sᵀ] for one unit with parameters ``z`` (a vector), s the score -∇_z log p(y | z), by enumeration.

    ``"categorical"``: z are logits, y runs over the classes. ``"bernoulli"``: every entry of z is a logit of
    its own, y over {0, 1}. ``"gaussian"``: -log p = ½ ‖y - z‖², so s = z - y has E[s sᵀ] = I.
    """
    z = z.detach()
    size = z.numel()
    if likelihood == "categorical":
        p = torch.softmax(z, 0)
        scores = p - torch.eye(size, dtype=z.dtype)  # row y: the score of label y
        return torch.einsum("y,yi,yj->ij", p, scores, scores)
    if likelihood == "bernoulli":
        p = torch.sigmoid(z)
        return torch.diag(p * (p - 1) ** 2 + (1 - p) * p**2)
    if likelihood == "gaussian":
        return torch.eye(size, dtype=z.dtype)
    raise ValueError(likelihood)


def fisher(
    units: Sequence[Tensor], weights: Sequence[float] | Tensor, params: Sequence[Tensor], likelihood: str
) -> Tensor:
    """Σ_n c_n J_nᵀ E_y[s sᵀ] J_n over units (a sample, or a position), each a vector of ``z``."""
    total = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype).diag()
    for z, c in zip(units, weights, strict=True):
        J = jacobian(z, params)
        total = total + float(c) * J.T @ output_fisher(z, likelihood) @ J
    return total


def empirical_fisher(
    losses: Sequence[Tensor], weights: Sequence[float] | Tensor, params: Sequence[Tensor]
) -> Tensor:
    """Σ_n c_n g_n g_nᵀ, g_n the gradient of sample n's own loss; a weight of 0 removes the sample."""
    total = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype).diag()
    for loss, c in zip(losses, weights, strict=True):
        if float(c) != 0.0:
            g = gradient(loss, params)
            total = total + float(c) * torch.outer(g, g)
    return total


def relative_error(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖ in the maximum norm (absolute where b = 0)."""
    scale = float(b.abs().max()) or 1.0
    return float((a - b).abs().max()) / scale
