"""Models, losses and batches on which exact curvature is compared with the dense reference.

Every case is small (some tens of parameters), in float64 and seeded. ``LOSSES`` varies the loss over one model;
``LAYERS`` varies the model under one loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
N = 5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reals(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def classes(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, 3, shape, generator=generator(seed))


def masked(target: Tensor, seed: int = 3) -> Tensor:
    target = target.clone()
    target[torch.rand(target.shape, generator=generator(seed)) < 0.4] = -100
    return target


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with parameters and buffers drawn from a generator of its own."""
    model = model.double()
    g = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        for name, b in model.named_buffers():
            if b.is_floating_point():
                noise = torch.rand(b.shape, generator=g, dtype=b.dtype)
                b.copy_(noise + 0.5 if "var" in name else noise)
    return model


@dataclass(frozen=True)
class Case:
    """A model factory, a loss, a batch, and each sample's weight c_n in the loss."""

    make: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Any], Tensor]
    inputs: Any
    target: Any
    weights: Tensor
    likelihood: str | None = None

    @property
    def batch(self) -> tuple[Any, Any]:
        return self.inputs, self.target


class Swap(nn.Module):
    """(N, T, C) logits as (N, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Dict(nn.Module):
    """Outputs as a dict, as transformers' models give them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x), "hidden": x}


class Call(nn.Module):
    """A model from a function of its submodules, to write odd uses of layers in one line."""

    def __init__(self, function: Callable[..., Tensor], **modules: Any) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def mlp(outputs: int = 3) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))


def even(count: int = N) -> Tensor:
    return torch.full((count,), 1.0 / count, dtype=torch.float64)


def by_class(target: Tensor) -> Tensor:
    """c_n of a mean with class weights and masks, a sequence being one sample."""
    w = torch.where(target >= 0, WEIGHT[target.clamp(min=0)], 0.0).reshape(target.shape[0], -1)
    return w.sum(1) / w.sum()


def by_mask(target: Tensor) -> Tensor:
    w = (target >= 0).double().reshape(target.shape[0], -1)
    return w.sum(1) / w.sum()


def masked_mean(z: Any, target: dict[str, Tensor]) -> Tensor:
    each = F.cross_entropy(z["logits"].transpose(1, 2), target["labels"], reduction="none")
    return (each * target["mask"]).sum() / target["mask"].sum()


MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 0, 1]], dtype=torch.float64)
X, S = reals(N, 3), reals(N, 3, 3)
Y, YM, YS = classes(N), masked(classes(N)), masked(classes(N, 3))
BITS = (reals(N, 2, seed=6) > 0).double()
PROBABILITIES = torch.softmax(reals(N, 3, seed=7), 1)


def sequence() -> nn.Module:
    return nn.Sequential(mlp(), Swap())


LOSSES: dict[str, Case] = {
    "cross entropy": Case(mlp, nn.CrossEntropyLoss(), X, Y, even(), "categorical"),
    "sum": Case(mlp, nn.CrossEntropyLoss(reduction="sum"), X, Y, torch.ones(N), "categorical"),
    "class weights": Case(mlp, nn.CrossEntropyLoss(weight=WEIGHT), X, Y, by_class(Y), "categorical"),
    "class weights, sum": Case(
        mlp, nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), X, Y, WEIGHT[Y], "categorical"
    ),
    "ignore_index": Case(mlp, nn.CrossEntropyLoss(), X, YM, by_mask(YM), "categorical"),
    "label smoothing": Case(mlp, nn.CrossEntropyLoss(label_smoothing=0.3), X, Y, even(), "categorical"),
    "everything": Case(
        mlp, nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3), X, YM, by_class(YM), "categorical"
    ),
    "probabilities": Case(mlp, nn.CrossEntropyLoss(weight=WEIGHT), X, PROBABILITIES, even(), "categorical"),
    "sequence": Case(sequence, nn.CrossEntropyLoss(weight=WEIGHT), S, YS, by_class(YS), "categorical"),
    "padding mask": Case(
        lambda: Dict(mlp()),
        masked_mean,
        S,
        {"labels": classes(N, 3), "mask": MASK},
        MASK.sum(1) / MASK.sum(),
        "categorical",
    ),
    "flattened": Case(
        mlp,
        lambda z, y: F.cross_entropy(z.reshape(-1, 3), y.reshape(-1)),
        S,
        classes(N, 3),
        even(),
        "categorical",
    ),
    "regression": Case(lambda: mlp(2), nn.MSELoss(), X, reals(N, 2, seed=5), even(), "gaussian"),
    "regression, sum": Case(
        lambda: mlp(2), nn.MSELoss(reduction="sum"), X, reals(N, 2, seed=5), torch.ones(N), "gaussian"
    ),
    "half squares": Case(
        lambda: mlp(2),
        lambda z, y: 0.5 * (z - y).square().sum(1).mean(),
        X,
        reals(N, 2, seed=5),
        even(),
        "gaussian",
    ),
    "binary": Case(lambda: mlp(2), nn.BCEWithLogitsLoss(), X, BITS, even(), "bernoulli"),
    "binary, pos_weight": Case(
        lambda: mlp(2),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 0.5], dtype=torch.float64)),
        X,
        BITS,
        even(),
        "bernoulli",
    ),
    "huber": Case(lambda: mlp(2), nn.HuberLoss(delta=0.4), X, reals(N, 2, seed=5), even()),
    "poisson": Case(lambda: mlp(2), nn.PoissonNLLLoss(), X, reals(N, 2, seed=5).abs(), even()),
    "not convex": Case(
        lambda: mlp(2), lambda z, y: torch.sin(z * y).sum(1).mean(), X, reals(N, 2, seed=5), even()
    ),
    "coupled outputs": Case(
        lambda: mlp(2),
        lambda z, y: ((z.square().sum(1) - y[:, 0]) ** 2).mean(),
        X,
        reals(N, 2, seed=5),
        even(),
    ),
}


def classify(model: Callable[[], nn.Module], inputs: Tensor) -> Case:
    return Case(
        lambda: seeded(model()), nn.CrossEntropyLoss(weight=WEIGHT), inputs, Y, by_class(Y), "categorical"
    )


def net(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def frozen_first() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    return model


def tied() -> nn.Module:
    first, second = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    second.weight = first.weight
    return Call(lambda m, x: m.second(torch.tanh(m.first(x))).mean(1)[:, :3], first=first, second=second)


class Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        out, _ = self.attention(x, x, x, need_weights=False)
        out = out if self.batch_first else out.transpose(0, 1)
        return self.head(out.mean(1))


TOKENS = torch.randint(0, 6, (N, 4), generator=generator(8))
IMAGES, VOLUMES, SIGNALS = reals(N, 2, 5, 5), reals(N, 1, 3, 3, 3), reals(N, 2, 6)
WORDS = reals(N, 3, 4)

LAYERS: dict[str, Case] = {
    "linear": classify(net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), X),
    "linear on positions": classify(
        lambda: Call(lambda m, x: m.b(torch.tanh(m.a(x))).mean(1), a=nn.Linear(3, 4), b=nn.Linear(4, 3)), S
    ),
    "positions flattened": classify(
        lambda: Call(lambda m, x: m.a(x.reshape(-1, 3)).reshape(N, 3, 3).mean(1), a=nn.Linear(3, 3)), S
    ),
    "positions first": classify(lambda: Call(lambda m, x: m.a(x.transpose(0, 1)).sin().mean(0), a=nn.Linear(3, 3)), S),
    "positions first, as many as samples": classify(
        lambda: Call(lambda m, x: m.a(x.transpose(0, 1)).sin().mean(0), a=nn.Linear(3, 3)), reals(N, N, 3)
    ),
    "positions first, flattened": classify(
        lambda: Call(
            lambda m, x: m.a(x.transpose(0, 1).reshape(-1, 3)).reshape(3, N, 3).sin().mean(0), a=nn.Linear(3, 3)
        ),
        S,
    ),
    "conv1d": classify(net(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)), SIGNALS),
    "conv2d": classify(
        net(nn.Conv2d(2, 4, 3, padding=1, dilation=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)), IMAGES
    ),
    "conv2d, circular": classify(
        net(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGES
    ),
    "conv3d": classify(net(nn.Conv3d(1, 3, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten()), VOLUMES),
    "transposed conv": classify(
        net(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGES
    ),
    "embedding": classify(
        lambda: Call(lambda m, x: m.b(m.a(x).mean(1)), a=nn.Embedding(6, 4, padding_idx=0), b=nn.Linear(4, 3)), TOKENS
    ),
    "layer norm": classify(net(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)), X),
    "rms norm": classify(net(nn.Linear(3, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 3)), X),
    "group norm": classify(
        net(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        IMAGES,
    ),
    "batch norm, evaluating": classify(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).eval(), X
    ),
    "attention": classify(lambda: Attention(True), WORDS),
    "attention, positions first": classify(lambda: Attention(False), WORDS),
    "called twice": classify(
        lambda: Call(lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(3, 3), b=nn.Linear(3, 3)), X
    ),
    "tied": classify(tied, TOKENS),
    "frozen": classify(frozen_first, X),
    "in-place activation": classify(net(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), X),
    "residual": classify(
        lambda: Call(
            lambda m, x: x + torch.tanh(m.a(x)) * m.s, a=nn.Linear(3, 3), s=nn.Parameter(torch.ones(3))
        ),
        X,
    ),
    "checkpointed": classify(
        lambda: Call(
            lambda m, x: m.b(checkpoint(lambda h: torch.tanh(m.a(h)), x, use_reentrant=False)),
            a=nn.Linear(3, 4),
            b=nn.Linear(4, 3),
        ),
        X,
    ),
    "weight of another layer": classify(
        lambda: Call(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight), a=nn.Linear(3, 3)), X
    ),
    "weight of another layer, on positions": classify(
        lambda: Call(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight).mean(1), a=nn.Linear(3, 3)), S
    ),
    "kernel used twice, once outside its layer": classify(
        lambda: Call(
            lambda m, x: F.conv1d(torch.tanh(m.a(x)), m.a.weight).mean(2)[:, :1] * m.b,
            a=nn.Conv1d(2, 2, 2),
            b=nn.Parameter(torch.ones(3)),
        ),
        SIGNALS,
    ),
    "unused parameter": classify(
        lambda: Call(lambda m, x: m.a(x), a=nn.Linear(3, 3), b=nn.Linear(2, 2)), X
    ),
}  # fmt: skip
