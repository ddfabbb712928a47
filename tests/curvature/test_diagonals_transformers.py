"""Small random models of the library transformers: dict inputs and outputs, tied embeddings, positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import EmpiricalFisherDiagonal, GaussNewtonDiagonal, estimate
from tests.curvature import dense

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class WithDict(nn.Module):
    """``model(inputs)`` for a model that takes keywords."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return self.inner(**inputs)


def next_token(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)


def gpt2() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    config = transformers.GPT2Config(
        vocab_size=6, n_positions=4, n_embd=4, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WithDict(transformers.GPT2LMHeadModel(config)).double()
        tokens = torch.randint(0, 6, (3, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    return model, {"input_ids": tokens, "attention_mask": mask}, tokens.masked_fill(mask == 0, -100)


def test_gpt2_per_sample_empirical_fisher_equals_the_loop() -> None:
    model, inputs, labels = gpt2()
    params = dense.trainable(model)
    z = model(inputs)
    (pull,) = torch.autograd.grad(next_token(z, labels), z.logits, retain_graph=True)
    counted = (labels[:, 1:] >= 0).double()
    weights = counted.sum(1) / counted.sum()
    exact = sum(dense.gradient((z.logits[n] * pull[n]).sum(), params) ** 2 / weights[n] for n in range(3))
    found = estimate(EmpiricalFisherDiagonal(samples="per_sample"), model, next_token, [(inputs, labels)])
    torch.testing.assert_close(dense.flat(found.diagonal()), exact, rtol=1e-8, atol=1e-14)


def test_gpt2_gauss_newton_diagonal_is_exact() -> None:
    model, inputs, labels = gpt2()
    z = model(inputs)
    exact = dense.gauss_newton(next_token(z, labels), z.logits, dense.trainable(model)).diagonal()
    found = estimate(GaussNewtonDiagonal(), model, next_token, [(inputs, labels)])
    torch.testing.assert_close(dense.flat(found.diagonal()), exact, rtol=1e-7, atol=1e-12)


def test_vit_gauss_newton_and_per_sample_fisher() -> None:
    config = transformers.ViTConfig(
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config).double()
        x, y = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 2, 1])

    def loss_fn(outputs: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, target)

    params = dense.trainable(model)
    z = model(x)
    exact = dense.gauss_newton(loss_fn(z, y), z.logits, params).diagonal()
    found = dense.flat(estimate(GaussNewtonDiagonal(), model, loss_fn, [(x, y)]).diagonal())
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-12)
    own = [F.cross_entropy(z.logits[n : n + 1], y[n : n + 1]) for n in range(3)]
    exact = dense.empirical_fisher(own, [1 / 3] * 3, params).diagonal()
    found = dense.flat(
        estimate(EmpiricalFisherDiagonal(samples="per_sample"), model, loss_fn, [(x, y)]).diagonal()
    )
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-14)
