"""Small random models of the library transformers: dict outputs, Conv1D layers, tied embeddings, masks and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import EKFAC, KFAC, estimate
from curvature.kronecker.operator import gather
from tests.curvature import dense

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treats these by the diagonal"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CLASSES = 6
WEIGHT = torch.tensor([1.0, 0.3, 2.0, 1.0, 0.5, 3.0], dtype=torch.float64)
LABELS = torch.tensor([[0, 2, -100, 5], [-100, -100, 1, 1], [4, 3, 2, 0]])
Loss = Callable[[Any, Tensor], Tensor]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=CLASSES, n_positions=4, n_embd=4, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, image_size=4, patch_size=2,
        num_channels=2, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).double()


def token_loss(weight: Tensor | None) -> Loss:
    return lambda outputs, labels: functional.cross_entropy(
        outputs.logits.flatten(0, 1), labels.flatten(), weight
    )


def image_loss(weight: Tensor | None) -> Loss:
    return lambda outputs, labels: functional.cross_entropy(outputs.logits, labels, weight)


CASES: dict[str, Any] = {
    "gpt2": lambda: (gpt2(), token_loss, torch.randint(0, CLASSES, (3, 4)), LABELS),
    "vit": lambda: (vit(), image_loss, torch.randn(3, 2, 4, 4), torch.tensor([0, -100, 5])),
}


def blocks_against(GN: Tensor, operator: Any, model: nn.Module) -> None:
    """The eigenvalues are the diagonal of Gauss-Newton in the block's basis; what has no block has its diagonal."""
    params = dense.trainable(model)
    places = dense.split(torch.arange(len(GN), dtype=torch.float64), params)
    for block in operator.blocks:
        index = gather(block.block, places).flatten(1).long()
        for k, at in enumerate(index):
            Q_G, Q_A = (
                torch.eye(size) if Q is None else Q[k]
                for Q, size in zip((block.Q_G, block.Q_A), block.values.shape[1:], strict=True)
            )
            basis = torch.kron(Q_G, Q_A)
            exact = (basis.T @ GN[at[:, None], at] @ basis).diagonal()
            scale = GN[at, at].max()
            error = (block.values[k].reshape(-1) - exact).abs().max() / scale
            assert float(error) < 1e-9, block.block.modules
    diagonal, exact_diagonal = operator.diagonal(), dense.split(GN.diagonal(), params)
    for i in operator.layout.diagonal:
        assert dense.relative_error(diagonal[i], exact_diagonal[i]) < 1e-9, operator.layout.names[i]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_masked_labels_and_class_weights_enter_every_layer(case: str, weighted: bool) -> None:
    model, loss_of, x, y = CASES[case]()
    loss = loss_of(WEIGHT if weighted else None)
    z = model(x)
    GN = dense.gauss_newton(loss(z, y), z.logits, dense.trainable(model))
    B = estimate(EKFAC(model), model, loss, [(x, y)])
    assert len(B.blocks) > 5
    blocks_against(GN, B, model)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("case", CASES)
def test_a_masked_sample_counts_as_removed_and_a_weight_of_two_as_two_samples(
    case: str, kind: type[KFAC]
) -> None:
    model, loss_of, x, y = CASES[case]()
    y = y.clone()
    y[1], y[2] = -100, 3
    twice = torch.ones(CLASSES, dtype=torch.float64)
    twice[3] = 2.0
    y[0] = torch.where(y[0] == 3, 0, y[0])
    ours = estimate(kind(model), model, loss_of(twice), [(x, y)]).to_dense()
    order = [0, 2, 2]
    theirs = estimate(kind(model), model, loss_of(None), [(x[order], y[order])]).to_dense()
    assert dense.relative_error(ours, theirs) < 1e-8


def test_gpt2_has_its_tied_embedding_as_a_block_and_by_its_exact_diagonal_where_excluded() -> None:
    model, loss_of, x, y = CASES["gpt2"]()
    loss = loss_of(None)
    names = {m for b in estimate(KFAC(model), model, loss, [(x, y)]).blocks for m in b.block.modules}
    assert {"transformer.h.0.attn.c_attn", "transformer.wpe", "lm_head"} <= names
    excluded = estimate(KFAC(model, exclude=("lm_head",)), model, loss, [(x, y)])
    z = model(x)
    params = dense.trainable(model)
    exact = dense.split(dense.gauss_newton(loss(z, y), z.logits, params).diagonal(), params)
    i = excluded.layout.names.index("transformer.wte.weight")
    assert i in excluded.layout.diagonal
    assert dense.relative_error(excluded.diagonal()[i], exact[i]) < 1e-9
