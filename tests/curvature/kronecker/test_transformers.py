"""Small random models of the library transformers: dict outputs, Conv1D layers, tied embeddings."""

from __future__ import annotations

import pytest
import torch

from curvature import KFAC, estimate
from tests.curvature import dense

transformers = pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gpt2_has_its_tied_embedding_as_a_block_and_norms_by_their_exact_diagonal() -> None:
    config = transformers.GPT2Config(
        vocab_size=6, n_positions=3, n_embd=4, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config).double()
    tokens = torch.randint(0, 6, (2, 3))

    def loss_fn(outputs: object, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), target.flatten())  # type: ignore[attr-defined]

    B = estimate(KFAC(model), model, loss_fn, [(tokens, tokens)])
    names = {m for b in B.blocks for m in b.block.modules}
    assert "transformer.h.0.attn.c_attn" in names
    assert "lm_head" in names
    excluded = estimate(KFAC(model, exclude=("lm_head",)), model, loss_fn, [(tokens, tokens)])
    z = model(tokens)
    GN = dense.gauss_newton(loss_fn(z, tokens), z.logits, dense.trainable(model))
    exact = dense.split(GN.diagonal(), dense.trainable(model))
    diagonal, by_itself = B.diagonal(), excluded.diagonal()
    for i, name in enumerate(B.layout.names):
        if ".ln_" in name:
            assert dense.relative_error(diagonal[i], exact[i]) < 1e-9, name
        if name == "transformer.wte.weight":
            assert dense.relative_error(by_itself[i], exact[i]) < 1e-9, name
