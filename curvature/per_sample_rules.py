"""How one layer's inputs and output gradients give the squares of the samples' weight gradients.

Legend: a (N, r, …) a layer's input, r rows a sample; δ (N, r, …) the gradient of its output; u_n sample n's gradient of
the layer's weight; r_n a weight a sample. For a linear layer with one row a sample, u_n = δ_n a_nᵀ and
Σ_n r_n u_n² = (r δ²)ᵀ a²: no per-sample gradient is formed. For sequences, embeddings and layer norms u_n is formed, in
chunks of samples. Every other layer pulls δ_n back through its own forward function under ``torch.func.vmap``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature.layer_io import Record
from curvature.probes import probe
from curvature.room import Room
from curvature.vectors import compute_dtype

#: Elements of per-sample gradients that are formed at a time.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Use:
    """One use of one parameter: a call of the module that holds it.

    Args:
        module: that module.
        index: which of the recorded calls.
        count: N.
        inputs: the call's inputs, (N, r, …); ``None`` where dim 0 cannot be split into samples.
        key: the parameter's name in the module.
    """

    module: nn.Module
    index: int
    count: int
    inputs: tuple[Tensor, ...] | None
    key: str = ""

    @classmethod
    def of(cls, module: nn.Module, record: Record, index: int, count: int) -> Use:
        """The use that ``record`` describes, with its inputs split into samples where that is possible."""
        try:
            record.check_unchanged()
        except RuntimeError:
            return cls(module, index, count, None)
        shapes = [x.shape for x in record.inputs] + [record.shape]
        if not record.inputs or any(len(s) == 0 or s[0] % count or s[0] == 0 for s in shapes):
            return cls(module, index, count, None)
        return cls(module, index, count, tuple(split(x, count) for x in record.inputs))

    @classmethod
    def shared(cls, module: nn.Module, record: Record, index: int, count: int) -> Use:
        """The use of a call that is one for all samples, each of which has an output gradient of its own."""
        try:
            record.check_unchanged()
        except RuntimeError:
            return cls(module, index, count, None)
        own = (
            len(record.shape) > 0 and record.shape[0] == 1 and all(x.shape[:1] == (1,) for x in record.inputs)
        )
        rows = tuple((x if own else x.unsqueeze(0)).unsqueeze(0) for x in record.inputs)
        return cls(module, index, count, tuple(x.expand(count, *x.shape[1:]) for x in rows))

    def for_parameter(self, key: str) -> Use:
        """The same call, as a use of the parameter ``key``."""
        return dataclasses.replace(self, key=key)

    def split(self, gradient: Tensor) -> Tensor:
        """The gradient of the output as (N, r, …)."""
        return split(gradient, self.count)

    @property
    def single_row_linear(self) -> bool:
        """Whether this is a linear layer that each sample passes in one row."""
        return (
            type(self.module) is nn.Linear and self.inputs is not None and self.inputs[0].dim() == 3
        ) and self.inputs[0].shape[1] == 1


def split(x: Tensor, count: int) -> Tensor:
    """(N r, …) as (N, r, …)."""
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])


def squares_of_uses(
    parameter: Tensor,
    uses: Sequence[Use],
    gradients: Sequence[Tensor | None],
    weights: Tensor,
    reference: Tensor | None,
    room: Room | None = None,
) -> Tensor | None:
    """Σ_n r_n u_n², u_n summed over all uses of the parameter.

    Args:
        parameter: the parameter.
        uses: its uses.
        gradients: the gradient at each recorded call.
        weights: r.
        reference: autograd's gradient; where given, Σ u_n must equal it.
        room: memory for u_n, which one parameter after the other may use.

    Returns:
        The sum, float32 or wider, or ``None`` where the uses do not explain the gradient.
    """
    deltas = [shaped(gradients[use.index], use) for use in uses]
    dtype = compute_dtype(parameter.dtype)
    weights = weights.to(parameter.device, dtype)
    if len(uses) == 1 and uses[0].single_row_linear:
        return linear_squares(uses[0], deltas[0].to(dtype), weights, reference)
    total = torch.empty_like(
        parameter, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format
    )
    count = uses[0].count
    step = max(1, CHUNK_ELEMENTS // max(1, parameter.numel()))
    sums, power = torch.zeros_like(total) if reference is not None else total, total.new_zeros(())
    alone = (
        room if len(uses) == 1 else None
    )  # with several, u_n is a sum, and the next part must not overwrite it
    for begin in range(0, count, step):
        part = slice(begin, min(begin + step, count))
        u: Tensor | None = None
        for use, delta in zip(uses, deltas, strict=True):
            try:
                own = pulled_back(use, delta, part, alone)
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, IndexError):
                return None
            u = own if u is None else u + own
        assert u is not None
        u = u.to(total.dtype)
        if reference is not None:
            sums.add_(u.sum(0))
            power = power + torch.linalg.vector_norm(u).square()
        squares = u.square_().reshape(len(u), -1).mT
        total.view(-1).addmv_(
            squares, weights[part], beta=0 if begin == 0 else 1
        )  # 0: what lies there is not read
    if reference is None or agree(sums, reference.to(total.dtype), power, deltas[0].dtype, parameter.dtype):
        return total
    return None


def shaped(gradient: Tensor | None, use: Use) -> Tensor:
    """The gradient at a call's node, in the shape (N, r, …) of its output."""
    assert gradient is not None
    return use.split(gradient)


def linear_squares(use: Use, delta: Tensor, weights: Tensor, reference: Tensor | None) -> Tensor | None:
    """(r δ²)ᵀ a² for a weight, (r δ²)ᵀ 1 for a bias; checked on a random projection, without forming δᵀ a."""
    assert use.inputs is not None
    d = delta.reshape(use.count, -1)
    scaled = d.square().mul_(weights.unsqueeze(1))
    if use.key == "bias":
        found, ours, theirs = scaled.sum(0), d.sum(0), reference
        seen = d.square().sum()
    else:
        a = use.inputs[0].reshape(use.count, -1).to(d.dtype)
        squares = a.square()
        found = scaled.T @ squares
        if reference is None:
            return found
        v = probe([a[0]], 0x11EA, 0)[0]
        ours, theirs = d.T @ (a @ v), reference.to(d.dtype) @ v
        seen = (d.square().sum(1) * squares.sum(1)).sum()
    if theirs is None or agree(ours, theirs.to(d.dtype), seen, delta.dtype, use.inputs[0].dtype):
        return found
    return None


def agree(ours: Tensor, theirs: Tensor, power: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether two gradients are one to the rounding of ``dtypes``, measured against what was summed."""
    tolerance = 5 * max(float(torch.finfo(dtype).eps) for dtype in dtypes) ** 0.6
    scale = torch.maximum(torch.linalg.vector_norm(theirs), power.sqrt())
    return bool(torch.linalg.vector_norm(ours - theirs) <= tolerance * scale)


def pulled_back(use: Use, delta: Tensor, part: slice, room: Room | None = None) -> Tensor:
    """u_n for the samples of ``part``, (n, …): the pull-back of the module's own forward function, sample by sample."""
    assert use.inputs is not None
    a, d = use.inputs[0][part], delta[part]
    module: Any = use.module
    kind = type(module)
    if kind is nn.Linear:
        rows = d.flatten(1, -2)
        if use.key == "bias":
            return rows.sum(1)
        a = a.flatten(1, -2).to(rows.dtype)
        out = None if room is None else room.take((len(a), rows.shape[-1], a.shape[-1]), rows)
        return torch.bmm(rows.mT, a, out=out)
    if kind is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
        return token_sums(a.reshape(len(a), -1), d.reshape(len(a), -1, d.shape[-1]), module)
    if kind is nn.LayerNorm:
        shape = cast("tuple[int, ...]", module.normalized_shape)
        d = d.reshape(a.shape)
        if use.key == "weight":
            d = d * functional.layer_norm(a, shape, eps=module.eps)
        return d.reshape(len(a), -1, *shape).sum(1)
    parameter = use.module.get_parameter(use.key).detach()

    def one(inputs: tuple[Tensor, ...], d: Tensor) -> Tensor:
        def forward(p: Tensor) -> Tensor:
            out = torch.func.functional_call(use.module, {use.key: p}, inputs)
            return out if isinstance(out, Tensor) else out[0]

        pull = torch.func.vjp(forward, parameter)[1]
        return pull(d)[0]  # type: ignore[no-any-return]

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # vmap warns where it loops
        u = torch.func.vmap(one, randomness="error")(tuple(x[part] for x in use.inputs), d)
        return u.clone()  # a shift's is the gradient itself, which others still read


def token_sums(index: Tensor, d: Tensor, module: nn.Embedding) -> Tensor:
    """u_n[v] = Σ_{r: token v} δ_nr, (n, V, D); a token that is padding has no gradient."""
    count, size = index.shape[0], module.num_embeddings
    if module.padding_idx is not None:
        d = d * (index != module.padding_idx).unsqueeze(-1)
    places = index.long() + size * torch.arange(count, device=index.device).unsqueeze(1)
    u = d.new_zeros(count * size, d.shape[-1])
    return u.index_add_(0, places.reshape(-1), d.reshape(-1, d.shape[-1])).reshape(count, size, -1)
