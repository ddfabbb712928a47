"""The exact diagonal of the asked kind, for parameters that no layer rule covers.

Legend: V_k what is sent back from the outputs (see :mod:`curvature.kronecker.fisher`); J_n = ∂z_n/∂θ of sample n;
the diagonal is Σ_n Σ_k (J_nᵀ V_nk)².
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.kronecker.fisher import Column
from curvature.loss_graph import LossGraph

#: Elements of per-sample gradients that may exist at once.
CHUNK = 1 << 24


def add_squares_(into: Sequence[Tensor], graph: LossGraph, params: Sequence[Tensor], column: Column) -> None:
    """into += Σ_n (J_nᵀ V_n)², elementwise.

    Cost: one backward pass a sample, batched where the operations allow it.
    """
    z, v = graph.output, column.value
    samples = v.shape[0] if v.dim() else 1
    size = max(sum(p.numel() for p in params), 1)
    step = max(1, min(samples, CHUNK // size))
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        seeds = torch.zeros(stop - start, *z.shape, dtype=v.dtype, device=v.device)
        if v.dim():
            index = torch.arange(stop - start, device=v.device)
            seeds[index, index + start] = v[start:stop]
        else:
            seeds[0] = v
        for s, gradients in zip(into, _per_sample(z, params, seeds), strict=True):
            if gradients is not None:
                # not in place: gradients of two parameters may share their memory (a sum of both, one sample)
                s.add_(gradients.to(s.dtype).square().sum(0))


def _per_sample(z: Tensor, params: Sequence[Tensor], seeds: Tensor) -> Sequence[Tensor | None]:
    """Gradients for every seed, stacked along dim 0."""
    with warnings.catch_warnings():
        # An operation without a batching rule is looped over by autograd, which warns about speed alone.
        warnings.simplefilter("ignore", UserWarning)
        try:
            return torch.autograd.grad(
                z, params, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:
            rows = [torch.autograd.grad(z, params, s, retain_graph=True, allow_unused=True) for s in seeds]
    stacked: list[Tensor | None] = []
    for column in zip(*rows, strict=True):
        present = [g for g in column if g is not None]
        stacked.append(torch.stack(present) if present else None)
    return stacked
