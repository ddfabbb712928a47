"""Models that people bring: small random GPT-2 and ViT from transformers, with dicts in and out.

The reference is a difference of gradients: a column of the dense matrix would be right too, and far dearer.
"""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import EmpiricalFisher, Fisher, GaussNewton, Hessian, estimate
from curvature.vectors import flatten
from tests.curvature import dense
from tests.curvature.matrix_free import cases

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")


def gpt2() -> tuple[nn.Module, Any, Any, Tensor]:
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.1,
        attn_pdrop=0.1,
        embd_pdrop=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double().eval()
    cases.randomise(model, 1, scale=0.3)
    tokens = torch.randint(0, 11, (3, 6), generator=cases.generator())
    target = tokens.roll(-1, 1)
    target[:, -1] = -100

    class Keywords(nn.Module):
        """Takes a dict of inputs, as a data collator gives it, and returns the model's own output class."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, batch: dict[str, Tensor]) -> Any:
            return self.inner(**batch, use_cache=False)

    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def loss_fn(outputs: Any, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), target.flatten())

    return Keywords().eval(), loss_fn, inputs, target


def vit() -> tuple[nn.Module, Any, Any, Tensor]:
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config).double().eval()
    cases.randomise(model, 1, scale=0.3)
    x = torch.randn(4, 3, 8, 8, generator=cases.generator(), dtype=torch.float64)
    return model, lambda out, y: nn.functional.cross_entropy(out["logits"], y), x, torch.tensor([0, 1, 2, 1])


MODELS = pytest.mark.parametrize("make", [gpt2, vit])


def direction(model: nn.Module, seed: int = 5) -> list[Tensor]:
    g = cases.generator(seed)
    return [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in model.parameters()]


def gradient(model: nn.Module, loss_fn: Any, x: Any, y: Tensor) -> Tensor:
    return dense.gradient(loss_fn(model(x), y), dense.trainable(model))


def moved(model: nn.Module, v: list[Tensor], step: float) -> None:
    with torch.no_grad():
        for p, x in zip(model.parameters(), v, strict=True):
            p.add_(x, alpha=step)


@MODELS
@pytest.mark.parametrize("mode", ["reverse", "forward", "finite-difference"])
def test_hessian_product_is_the_derivative_of_the_gradient(make: Any, mode: str) -> None:
    model, loss_fn, x, y = make()
    v = direction(model)
    Hv = flatten(estimate(Hessian(hvp=mode), model, loss_fn, [(x, y)]).matvec(v))  # type: ignore[arg-type]
    step, gradients = 1e-5, []
    for factor in (1, -2):
        moved(model, v, factor * step)
        gradients.append(gradient(model, loss_fn, x, y))
    expected = (gradients[0] - gradients[1]) / (2 * step)
    assert dense.relative_error(Hv, expected) < 1e-6


@MODELS
@pytest.mark.parametrize("mode", ["reverse", "forward", "finite-difference"])
def test_gauss_newton_product_is_the_loss_curvature_between_jacobians(make: Any, mode: str) -> None:
    model, loss_fn, x, y = make()
    v = direction(model)
    B = estimate(GaussNewton(jvp=mode), model, loss_fn, [(x, y)])  # type: ignore[arg-type]
    step, logits = 1e-6, []
    for factor in (1, -2):
        moved(model, v, factor * step)
        logits.append(model(x).logits.detach())
    moved(model, v, step)
    Jv = (logits[0] - logits[1]) / (2 * step)
    z = model(x)
    p = z.logits.detach().softmax(-1)
    c = (y != -100).double() / (y != -100).sum()
    u = c[..., None] * (p * Jv - p * (p * Jv).sum(-1, keepdim=True))
    params = dense.trainable(model)
    expected = dense.flat(torch.autograd.grad(z.logits, params, u, allow_unused=True, materialize_grads=True))
    assert dense.relative_error(flatten(B.matvec(v)), expected) < 1e-6
    F = estimate(Fisher("categorical"), model, loss_fn, [(x, y)])
    assert dense.relative_error(flatten(F.matvec(v)), expected) < 1e-6


@MODELS
def test_empirical_fisher_product_is_the_sum_over_samples(make: Any) -> None:
    model, loss_fn, x, y = make()
    v = direction(model)
    expected = torch.zeros_like(flatten(v))
    for n in range(len(y)):
        row = {k: t[n : n + 1] for k, t in x.items()} if isinstance(x, dict) else x[n : n + 1]
        g = gradient(model, loss_fn, row, y[n : n + 1])
        expected += g * (g @ flatten(v)) / len(y)  # equally many tokens in each
    F = estimate(EmpiricalFisher(), model, loss_fn, [(x, y)])
    assert dense.relative_error(flatten(F.matvec(v)), expected) < 1e-9


def test_dropout_in_training_mode_is_refused() -> None:
    model, loss_fn, x, y = gpt2()
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval"):
        estimate(Hessian(), model, loss_fn, [(x, y)])


def test_memory_does_not_grow_over_products_of_a_transformer() -> None:
    model, loss_fn, x, y = gpt2()
    B = estimate(Hessian(), model, loss_fn, [(x, y)])
    v = direction(model)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    B.matvec(v)
    before = alive()
    for _ in range(50):
        B.matvec(v)
    assert alive() <= before
