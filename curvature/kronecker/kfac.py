"""K-FAC: one Kronecker product A ⊗ G a layer.

Legend: a a layer's inputs, g the gradients of its outputs, A = E[a aᵀ], G = E[g gᵀ], λ the damping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from curvature.kronecker import inverses as formed
from curvature.kronecker import learning, owned
from curvature.kronecker.divided_bases import DividedBases
from curvature.kronecker.gradient_rows import Watch, most_rows, watch
from curvature.kronecker.layout import Block, Layout
from curvature.kronecker.learning import held
from curvature.kronecker.operator import KroneckerOperator
from curvature.outputs import output_tensor
from curvature.protocols import State
from curvature.registry import estimators


@dataclass(frozen=True)
class KFAC(DividedBases):
    """Kronecker-factored curvature: each layer's block is A ⊗ G, with weight and bias one block.

    The approximation to choose when matrices dominate the model: it holds the correlations between a layer's
    parameters at the cost of two small matrices. It *equals* the Gauss-Newton block for a deep linear network with
    squared loss, for one sample without weight sharing, and in the settings of ``sharing``. It need not be nearer to
    Gauss-Newton than the diagonal everywhere: the block of an embedding tied to the head is one product for a sum of
    two, which with many classes, few samples and positions that mix is further off than the diagonal; name the head in
    ``exclude`` there.

    Args:
        model: the model whose layers are observed, by hooks that vanish with this estimator.
        fisher: ``"type-2"`` (the exact Fisher, a backward pass an output), ``"mc"`` (labels drawn from the model,
            a backward pass a sample), ``"empirical"`` (the labels of the data) or ``"forward-only"`` (G = I).
        sharing: positions of a sequence or an image are samples (``"expand"``, exact for a loss at every position)
            or are first brought to one row (``"reduce"``, exact for a loss on their mean).
        samples: labels drawn a sample, with ``fisher="mc"``.
        seed: of the drawn labels; step t draws the same ones after a resume.
        likelihood: ``"categorical"``, ``"gaussian"`` or ``"bernoulli"``: what the loss is the negative logarithm of,
            for ``"mc"`` and ``"empirical"``; ``None`` reads it from the loss's own curvature.
        beta: decay of the running means of A and G, in [0, 1); bias-corrected.
        factor_interval: steps between measurements of A and G, >= 1.
        inverse_interval: steps between refreshes of a layer's eigenbasis or inverses, >= 1; layers take turns, so that
            after the first step none refreshes more than ⌈layers / inverse_interval⌉; sooner while steps are few.
        max_dim: largest factor; a layer that needs a larger one is treated by the diagonal.
        exclude: names of modules to treat by the diagonal, with all below them.
        between_samples: where a batch norm in training mode, or anything else, mixes samples: ``"refuse"`` is an error;
            with ``"drop"`` the curvature is what each sample's row of a layer contributes by itself, with the gradient
            that reaches it through the batch's statistics. Terms between the rows of two samples are left out, as
            ``"expand"`` leaves out those between two positions of a sequence. It is exact nowhere, and what K-FAC for
            residual networks commonly is. Samples must be in dim 0 of every layer; not with ``"type-2"``.
        damping_kind: ``"exact"``: (B + λI)⁻¹ through the eigenbasis; ``"factored"``: each factor is damped by
            itself, split by π, the approximation of the original paper. It keeps two formed inverses a layer and no
            eigenbasis (with ``inverses="everywhere"``), for half the products and a fraction of the refresh.
        inverses: where data-parallel ranks keep eigenbases. ``"everywhere"``: a rank decomposes its share and sends it
            to all. ``"owner"``: it keeps its share alone and multiplies its blocks for the others, who never see the
            bases: 1/R of the memory on R ranks, for a message of the gradient's size at every product and solve. The
            bases are then no part of ``state_dict()``: to go on bit for bit save ``optimizer.gathered_state_dict()``,
            which every rank calls. With ``inverse_interval=1`` no basis outlives a step, and either will do.

    >>> import torch
    >>> from curvature import estimate
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> B = estimate(KFAC(model), model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
    >>> torch.allclose(B.to_dense(), torch.tensor([[2.0, 2.0], [2.0, 4.0]]))
    True

    Cost: per refresh O(N Σ (d_in² + K d_out²)) beside K backward passes without weight gradients, K = C
    (``type-2``), ``samples`` (``mc``) or 1; an eigendecomposition O(d_in³ + d_out³) a layer; four factors a layer of
    state.
    References: Martens & Grosse 2015, arXiv 1503.05671; Grosse & Martens 2016, arXiv 1602.01407 (convolutions);
    Eschenhagen et al. 2023, arXiv 2311.00636 (weight sharing); Benzing 2022, arXiv 2201.12250 (G = I); Pauloski et al.
    2021, arXiv 2107.01739 (``inverses="owner"``).
    """

    damping_kind: Literal["exact", "factored"] = "exact"
    inverses: Literal["everywhere", "owner"] = "everywhere"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping_kind not in ("exact", "factored"):
            raise ValueError(f"damping_kind must be 'exact' or 'factored', got {self.damping_kind!r}")

    @property
    def _factored(self) -> bool:
        return self.damping_kind == "factored"

    @property
    def _formed(self) -> bool:
        """Whether inverses are formed: their owners alone keep eigenbases, to multiply by them for the others."""
        return self._factored and not self._owned

    def _keys(self) -> tuple[str, ...]:
        keys = super()._keys()
        if self._formed:
            return tuple(k for k in keys if not k.endswith(("_vectors", "_values"))) + formed.KEYS
        return tuple(k for k in keys if not k.endswith("_vectors")) if self._owned else keys

    def _shapes(self, block: Block) -> dict[str, tuple[int, ...]]:
        keys = (*self._keys(), *learning.TRANSPOSED_KEYS)
        shapes = super()._shapes(block)
        if self._formed:
            shapes["A_used"] = shapes["A"]
            if "G_vectors" in shapes:
                shapes["G_used"] = shapes["G_vectors"]
        return {k: v for k, v in shapes.items() if k in keys}

    def _refresh(self, state: State, blocks: Sequence[Block]) -> None:
        if self._formed:
            formed.refresh_(state, blocks)
        elif self._owned:
            owned.refresh_(state, self._layout_of(state, None), blocks)
        else:
            super()._refresh(state, blocks)

    def _watches(self, layout: Layout) -> bool:
        return self._formed and any(most_rows(b) >= 1 for b in layout.blocks)

    def watch(self, loss: Tensor, outputs: object, params: Sequence[Tensor]) -> Watch | None:
        """The layers whose gradients ``loss.backward()`` will form of few rows; ``None`` where none is worth it.

        Args:
            loss: a scalar with a graph.
            outputs: the model's outputs.
            params: the parameters.
        """
        live = self._live
        if live.recorder is None or live.layout is None or not self._watches(live.layout):
            return None
        z = output_tensor(outputs)
        positions = z.numel() // max(z.shape[-1], 1) if z.dim() > 1 else z.numel()
        return watch(loss, live.layout, params, live.recorder, live.rows, max(positions, 1))

    def operator(self, state: State) -> KroneckerOperator:
        """B from the eigenbases, or the factors, at hand."""
        if self._formed:
            layout = self._layout_of(state, None)
            return formed.FactoredKroneckerOperator(
                self._like(state, layout),
                layout,
                [formed.factorblock(state, b) for b in layout.blocks],
                [d.clone() if d.numel() else d for d in held(state, "diagonal")],
                formed.inverses_of(state),
            )
        if self._owned:
            return self._owned_operator(state, self._factored)
        return super().operator(state)


estimators.add("kfac", KFAC)
