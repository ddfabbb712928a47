"""K-FAC written literally, and blocks of dense matrices: oracles that share no code with the package.

Legend: per sample n: c_n its weight, H_n = ∂²f/∂z_n² / c_n, J_n = ∂z_n/∂y_n with y a layer's output, a_n its input.
K-FAC: A = Σ c_n [a; 1][a; 1]ᵀ / Σ c_n, G = Σ c_n J_nᵀ H_n J_n, block = G ⊗ A in the order of [W, b] rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.curvature import dense


def module_blocks(model: nn.Module) -> list[Tensor]:
    """For every module with trained parameters, its indices in the flat vector."""
    params = dense.trainable(model)
    offsets, start = {}, 0
    for p in params:
        offsets[id(p)] = torch.arange(start, start + p.numel())
        start += p.numel()
    blocks = []
    for module in model.modules():
        own = [offsets.pop(id(p)) for p in module._parameters.values() if p is not None and id(p) in offsets]
        if own:
            blocks.append(torch.cat(own))
    return blocks


def block_diagonal(matrix: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """The matrix with everything outside the blocks set to zero."""
    kept = torch.zeros_like(matrix)
    for index in blocks:
        kept[index[:, None], index] = matrix[index[:, None], index]
    return kept


def module_gauss_newton(model: nn.Module, loss: Tensor, z: Tensor) -> Tensor:
    """The dense Gauss-Newton matrix, block by module."""
    return block_diagonal(dense.gauss_newton(loss, z, dense.trainable(model)), module_blocks(model))


def capture(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[nn.Linear, tuple[Tensor, Tensor]]]:
    """(z, {layer: (input, output)}) of a model of linear layers called once each."""
    seen: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

    def hook(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        seen[module] = (args[0].detach(), output)

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Linear)]
    z = model(x)
    for handle in handles:
        handle.remove()
    return z, seen


def literal_kfac(
    model: nn.Module, x: Tensor, weights: Tensor, output_hessian: Callable[[Tensor], Tensor]
) -> Tensor:
    """The dense K-FAC matrix of a chain of linear layers and activations, sample by sample.

    ``output_hessian(z_n)`` is H_n, the curvature of the sample's own loss.
    """
    params = dense.trainable(model)
    layers: dict[nn.Linear, list[Tensor]] = {}
    for n in range(x.shape[0]):
        z, seen = capture(model, x[n : n + 1])
        H = output_hessian(z[0].detach())
        for layer, (a, y) in seen.items():
            J = torch.stack(
                [torch.autograd.grad(z[0, k], y, retain_graph=True)[0][0] for k in range(z.shape[1])]
            )
            row = a[0] if layer.bias is None else torch.cat([a[0], a.new_ones(1)])
            sums = layers.setdefault(layer, [a.new_zeros(())] * 2)
            sums[0] = sums[0] + weights[n] * torch.outer(row, row)
            sums[1] = sums[1] + weights[n] * J.T @ H @ J
    offsets, start = {}, 0
    for p in params:
        offsets[id(p)] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    B = torch.zeros(start, start, dtype=x.dtype)
    for layer, (A, G) in layers.items():
        index = offsets[id(layer.weight)]
        if layer.bias is not None:
            index = torch.cat([index, offsets[id(layer.bias)][:, None]], 1)
        index = index.reshape(-1)
        B[index[:, None], index] = torch.kron(G, A / weights.sum())
    return B


def softmax_hessian(z: Tensor) -> Tensor:
    p = torch.softmax(z, 0)
    return torch.diag(p) - torch.outer(p, p)
