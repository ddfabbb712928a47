"""The operator of a layout: Kronecker blocks in their eigenbases, and a diagonal for the rest.

Legend: for one block V (groups, d_out, size_in) is a vector as [weight, bias] matrices; A = Q_A diag(λ_A) Q_Aᵀ,
G = Q_G diag(λ_G) Q_Gᵀ; Λ (groups, d_out, size_in) the eigenvalues of the block, λ_G λ_Aᵀ for K-FAC. Then
B V = Q_G (Λ ∘ Q_Gᵀ V Q_A) Q_Aᵀ = G V A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import vectors
from curvature.kronecker.layout import Block, Layout
from curvature.operators import DiagonalOperator, Operator, check_damping
from curvature.protocols import SingularCurvatureError


@dataclass(frozen=True)
class Eigenblock:
    """A block in its eigenbasis.

    Args:
        block: its place in the model.
        values: Λ, (groups, d_out, size_in).
        Q_G: (groups, d_out, d_out), or ``None`` for the identity.
        Q_A: (groups, size_in, size_in), or ``None`` for the identity.
        eigenvalues_g: λ_G, (groups, d_out).
        eigenvalues_a: λ_A, (groups, size_in).
    """

    block: Block
    values: Tensor
    Q_G: Tensor | None
    Q_A: Tensor | None
    eigenvalues_g: Tensor
    eigenvalues_a: Tensor

    def to_basis(self, V: Tensor) -> Tensor:
        """Q_Gᵀ V Q_A."""
        V = V if self.Q_G is None else self.Q_G.mT @ V
        return V if self.Q_A is None else V @ self.Q_A

    def from_basis(self, V: Tensor) -> Tensor:
        """Q_G V Q_Aᵀ."""
        V = V if self.Q_G is None else self.Q_G @ V
        return V if self.Q_A is None else V @ self.Q_A.mT

    def diagonal(self) -> Tensor:
        """The diagonal of the block, as a (groups, d_out, size_in) matrix."""
        D = self.values if self.Q_G is None else self.Q_G.square() @ self.values
        return D if self.Q_A is None else D @ self.Q_A.square().mT

    def dense(self) -> Tensor:
        """The block of every group, (groups, n, n) with n = d_out · size_in, rows in C order."""
        groups, d_out, size_in = self.values.shape
        eye = torch.eye(d_out * size_in, dtype=self.values.dtype, device=self.values.device)
        unit = eye.reshape(-1, 1, d_out, size_in)
        columns = self.from_basis(self.values * self.to_basis(unit))
        return columns.reshape(-1, groups, d_out * size_in).permute(1, 2, 0)


def gather(block: Block, v: Sequence[Tensor]) -> Tensor:
    """The block's part of a vector as (groups, d_out, size_in)."""
    parts = []
    if block.weight is not None:
        parts.append(block.rule.to_matrix(v[block.weight], block.dims))
    if block.bias is not None:
        parts.append(v[block.bias].reshape(block.dims.groups, block.dims.d_out, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def scatter(block: Block, V: Tensor, like: Sequence[Tensor], into: list[Tensor]) -> None:
    """The inverse of :func:`gather`: write the block's part of a vector."""
    if block.bias is not None:
        into[block.bias] = V[..., -1].reshape(like[block.bias].shape)
        V = V[..., :-1]
    if block.weight is not None:
        into[block.weight] = block.rule.from_matrix(V, like[block.weight])


class KroneckerOperator(Operator):
    """B block-diagonal: a Kronecker product a layer, a diagonal elsewhere.

    Args:
        like: tensors shaped like the parameters.
        layout: the blocks.
        blocks: their eigenbases.
        diagonal: the diagonal at the parameters without a block; elements elsewhere are not read.
        factored: whether ``solve`` damps each factor (π damping) in place of the product.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        layout: Layout,
        blocks: Sequence[Eigenblock],
        diagonal: Sequence[Tensor],
        factored: bool = False,
    ) -> None:
        super().__init__(like)
        self.layout = layout
        self.blocks = list(blocks)
        self.factored = factored
        self._rest = DiagonalOperator([diagonal[i] for i in layout.diagonal]) if layout.diagonal else None

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """G V A a block: O(Σ d_out size_in (d_out + size_in))."""
        self.check_vector(v)
        out = list(v)
        self._apply(v, out, lambda block: block.values)
        if self._rest is not None:
            self._put(out, self._rest.matvec([v[i] for i in self.layout.diagonal]))
        return out

    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        """(B + λI)⁻¹ v, exactly, at the cost of a ``matvec``.

        With factored damping a block's inverse is (A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹ instead, with
        π² = (tr A / size_in) / (tr G / d_out) (Martens & Grosse 2015, arXiv 1503.05671, section 6.3).
        """
        self.check_vector(v)
        check_damping(damping)
        out = list(v)
        self._apply(v, out, lambda block: self._inverse(block, damping))
        if self._rest is not None:
            self._put(out, self._rest.solve([v[i] for i in self.layout.diagonal], damping))
        return out

    def diagonal(self) -> list[Tensor]:
        """The diagonal of B: (Q_G ∘ Q_G) Λ (Q_A ∘ Q_A)ᵀ a block."""
        out = list(self.like)
        for block in self.blocks:
            scatter(block.block, block.diagonal(), self.like, out)
        if self._rest is not None:
            self._put(out, self._rest.diagonal())
        return out

    def to_dense(self) -> Tensor:
        """B as a (P, P) matrix."""
        self._check_size("to_dense")
        offsets, places = 0, []
        device = self.like[0].device
        for p in self.like:
            places.append(torch.arange(offsets, offsets + p.numel(), device=device).reshape(p.shape))
            offsets += p.numel()
        dtype = self.blocks[0].values.dtype if self.blocks else vectors.compute_dtype(self.like[0].dtype)
        B = torch.zeros(offsets, offsets, dtype=dtype, device=device)
        for block in self.blocks:
            index = gather(block.block, places).flatten(1)
            for at, dense in zip(index, block.dense(), strict=True):
                B[at.unsqueeze(1), at] = dense.to(device)
        if self._rest is not None:
            for i, values in zip(self.layout.diagonal, self._rest.diagonal(), strict=True):
                at = places[i].reshape(-1)
                B[at, at] = values.reshape(-1).to(device, dtype)
        return B

    def _put(self, out: list[Tensor], values: Sequence[Tensor]) -> None:
        for i, x in zip(self.layout.diagonal, values, strict=True):
            out[i] = x

    def _apply(
        self, v: Sequence[Tensor], out: list[Tensor], multiplier: Callable[[Eigenblock], Tensor]
    ) -> None:
        for block in self.blocks:
            V = gather(block.block, v).to(block.values.dtype)
            scatter(block.block, block.from_basis(multiplier(block) * block.to_basis(V)), self.like, out)

    def _inverse(self, block: Eigenblock, damping: float | Tensor) -> Tensor:
        if isinstance(damping, Tensor):
            damping = damping.to(block.values.device, block.values.dtype)
        if not self.factored:
            denominator = block.values + damping
        else:
            pi = balance(block.eigenvalues_a.mean(-1), block.eigenvalues_g.mean(-1))[:, None, None]
            root = damping**0.5
            denominator = (block.eigenvalues_g.unsqueeze(-1) + root / pi) * (
                block.eigenvalues_a.unsqueeze(-2) + root * pi
            )
        self._check_regular(block, denominator, damping)
        return denominator.reciprocal()

    def _check_regular(self, block: Eigenblock, denominator: Tensor, damping: float | Tensor) -> None:
        """A tensor of damping on an accelerator is trusted: reading it would wait, and inf shows in the step."""
        if isinstance(damping, Tensor) and damping.device.type != "cpu":
            return
        refuse_singular(block.block, denominator, float(damping))


def balance(mean_A: Tensor, mean_G: Tensor) -> Tensor:
    """π = √(mean_A / mean_G) of every group, by the means of the factors' diagonals; 1 where one of them is zero."""
    both = (mean_A > 0) & (mean_G > 0)
    one = torch.ones_like(mean_A)
    return (torch.where(both, mean_A, one) / torch.where(both, mean_G, one)).sqrt()


def refuse_singular(block: Block, denominator: Tensor, damping: float) -> None:
    """Raise where a damped eigenvalue is zero."""
    # The eigenvalues are clamped at 0, so any λ > 0 leaves nothing to divide by 0. Without one, an eigenvalue of
    # the size of rounding beside the largest is a 0.
    rounding = torch.finfo(denominator.dtype).eps * denominator.shape[-1]
    smallest = 0.0 if damping > 0 else float(rounding * denominator.amax())
    if not bool(denominator.amin() > smallest):
        names = ", ".join(repr(m) for m in block.modules)
        raise SingularCurvatureError(
            f"the damped curvature of {names} is singular; use a damping > 0 (or a larger one)"
        )
