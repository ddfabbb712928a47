"""Small random models, losses and batches, and the dense curvature that each must have.

Everything is drawn from one seed: what goes in (vectors, sequences, tokens, signals, images), a stack of layers of
many kinds put together in many ways (residual, called twice, tied, read by a bare ``F.linear``, partly frozen), a head,
and a loss with its reduction, class weights, masks and label smoothing, shown or hidden in a function.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from tests.curvature.cases import seeded

#: Elements of parameters that a model may have: the dense reference takes a backward pass for each.
MOST = 60


class Step(nn.Module):
    """A layer between (N, …, width) and (N, …, width) tensors, called as ``use`` says."""

    def __init__(self, use: Callable[..., Tensor], **modules: Any) -> None:
        super().__init__()
        self.use = use
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


class Unit(nn.Module):
    """Rows of length 1; PyTorch's own ``weight_norm`` has a wrong second derivative, and is refused."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.norm(dim=1, keepdim=True)


class Attention(nn.Module):
    """Self-attention, samples first or second, with a mask or not."""

    def __init__(self, width: int, batch_first: bool, causal: bool, bias: bool) -> None:
        super().__init__()
        heads = 2 if width % 2 == 0 else 1
        self.inner = nn.MultiheadAttention(width, heads, bias=bias, batch_first=batch_first)
        self.batch_first, self.causal = batch_first, causal

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.causal else None
        h = x if self.batch_first else x.transpose(0, 1)
        out = self.inner(h, h, h, attn_mask=mask, need_weights=False)[0]
        return out if self.batch_first else out.transpose(0, 1)


class Recurrent(nn.Module):
    """A recurrent layer over the positions, whose weights no rule covers."""

    def __init__(self, width: int, kind: type[nn.Module]) -> None:
        super().__init__()
        self.inner = kind(width, 2, batch_first=True)
        self.back = nn.Linear(2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.inner(x)[0])


class Positions(nn.Module):
    """An embedding of positions, added to every sample."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1]))


def activation(r: random.Random) -> nn.Module:
    return r.choice([nn.Tanh, nn.GELU, nn.Softplus, nn.Sigmoid, nn.SiLU])()


def over_features(r: random.Random, width: int) -> nn.Module:
    """A layer over the last axis, of any number of axes."""
    bias = r.random() < 0.7
    kind = r.randrange(10)
    if kind == 0:
        return nn.LayerNorm(width, elementwise_affine=r.random() < 0.8, bias=bias)
    if kind == 1:
        return nn.RMSNorm(width)
    if kind == 2:  # one module twice
        return Step(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(width, width, bias=bias))
    if kind == 3:  # one weight in two modules
        a, b = nn.Linear(width, width, bias=bias), nn.Linear(width, width, bias=r.random() < 0.5)
        b.weight = a.weight
        return Step(lambda m, x: m.b(torch.tanh(m.a(x))), a=a, b=b)
    if kind == 4:  # a weight that is read past its module too
        return Step(
            lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight.t()), a=nn.Linear(width, width, bias=bias)
        )
    if kind == 5:
        layer = nn.Linear(width, width, bias=bias)
        parametrize.register_parametrization(layer, "weight", Unit())
        return layer
    if kind == 6:  # a bare parameter
        return Step(lambda m, x: x * m.scale, scale=nn.Parameter(torch.ones(width)))
    if kind == 7:  # an in-place activation after a view
        return Step(
            lambda m, x: torch.tanh_(m.a(x.flatten(0, -2))).view(x.shape),
            a=nn.Linear(width, width, bias=bias),
        )
    if kind == 8:
        return Step(
            lambda m, x: x + m.b(torch.tanh(m.a(x))), a=nn.Linear(width, 2, bias=bias), b=nn.Linear(2, width)
        )
    return nn.Linear(width, width, bias=bias)


def over_positions(r: random.Random, width: int, length: int) -> nn.Module:
    """A layer over (N, T, width)."""
    kind = r.randrange(6)
    if kind == 0:
        return Attention(width, r.random() < 0.5, r.random() < 0.5, r.random() < 0.7)
    if kind == 1:
        return Recurrent(width, r.choice([nn.LSTM, nn.GRU, nn.RNN]))
    if kind == 2:
        return Positions(length, width)
    if kind == 3:
        groups, mode = r.choice([1, width]), r.choice(["zeros", "circular"])
        conv = nn.Conv1d(width, width, 3, padding=1, groups=groups, padding_mode=mode)
        return Step(lambda m, x: m.c(x.transpose(1, 2)).transpose(1, 2), c=conv)
    return over_features(r, width)


def over_space(r: random.Random, channels: int, dims: int) -> nn.Module:
    """A layer over (N, channels, …) that keeps the channels."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    bias, groups = r.random() < 0.7, r.choice([1, channels])
    kind = r.randrange(6)
    if kind == 0:
        return nn.GroupNorm(r.choice([1, channels]), channels)
    if kind == 1:
        return batch(channels).eval()
    if kind == 2:
        return instance(channels, affine=True)
    if kind == 3:
        stride = r.choice([1, 2])
        extra = stride - 1
        return transposed(channels, channels, 2, stride, 1, output_padding=extra, groups=groups, bias=bias)
    if kind == 4:  # twice
        return Step(
            lambda m, x: m.a(torch.tanh(m.a(x))),
            a=conv(channels, channels, 3, padding=1, groups=channels, bias=bias),
        )
    mode = r.choice(["zeros", "circular", "replicate"])
    size, padding = r.choice([(1, 0), (2, 1), (3, 1)])
    return conv(
        channels,
        channels,
        size,
        padding=padding,
        stride=r.choice([1, 2]),
        dilation=r.choice([1, 1 if size == 3 else 2]),
        groups=groups,
        bias=bias,
        padding_mode=mode if padding else "zeros",
    )


def with_activation(r: random.Random, layer: nn.Module) -> nn.Module:
    """As it is, followed by an activation, or as the branch of a residual sum where shapes allow it."""
    way = r.randrange(3)
    if way == 0:
        return nn.Sequential(layer, activation(r))
    if way == 1:

        def residual(m: Any, x: Tensor) -> Tensor:
            y = m.act(m.layer(x))
            return x + y if y.shape == x.shape else y

        return Step(residual, layer=layer, act=activation(r))
    return layer


@dataclass
class Drawn:
    """A model, its loss and one batch.

    Args:
        weights: w of every element that the loss counts, with the samples in front.
        mean: whether the loss divides by their sum.
        likelihood: the loss's, or ``None``.
        hidden: whether the loss is a function that cannot be inspected: its weights are measured.
        text: what was drawn.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    inputs: Tensor
    target: Tensor
    weights: Tensor
    mean: bool
    likelihood: str
    hidden: bool
    text: str

    @property
    def sample_weights(self) -> Tensor:
        """c_n as DESIGN.md section 4 has it."""
        w = self.weights.reshape(len(self.weights), -1)
        if self.hidden and not self.mean:  # a sample's own loss is what the function gives for it alone
            return (w.sum(1) > 0).double()
        return w.sum(1) / w.sum() if self.mean else w.sum(1) / (w != 0).sum(1).clamp(min=1)


def body(r: random.Random, kind: str, count: int) -> tuple[list[nn.Module], Tensor, int, bool]:
    """(layers, inputs, width of their last axis, whether positions are left)."""
    g = torch.Generator().manual_seed(r.randrange(1 << 30))
    width, length = r.choice([2, 3, 4]), r.choice([2, 3, count])
    depth = r.choice([0, 1, 2])
    if kind == "vectors":
        x = torch.randn(count, width, generator=g, dtype=torch.float64)
        return [with_activation(r, over_features(r, width)) for _ in range(depth)], x, width, False
    if kind in ("sequences", "tokens"):
        layers: list[nn.Module] = []
        x = torch.randn(count, length, width, generator=g, dtype=torch.float64)
        if kind == "tokens":
            x = torch.randint(0, 4, (count, length), generator=g)
            layers.append(nn.Embedding(4, width, padding_idx=r.choice([None, 0])))
        layers += [with_activation(r, over_positions(r, width, length)) for _ in range(max(depth, 1))]
        if r.random() < 0.5:
            return layers, x, width, True
        return [*layers, Step(lambda m, x: x.mean(1))], x, width, False
    dims = r.choice([1, 2, 2, 3])
    channels = r.choice([1, 2])
    x = torch.randn(count, channels, *[3 if dims < 3 else 2] * dims, generator=g, dtype=torch.float64)
    channels_last = dims == 2 and r.random() < 0.3
    layers = [with_activation(r, over_space(r, channels, dims)) for _ in range(max(depth, 1))]
    # PyTorch's own gradient of an instance norm's scale is wrong for one sample in this layout.
    if channels_last and not any(isinstance(m, _InstanceNorm) for layer in layers for m in layer.modules()):
        x = x.to(memory_format=torch.channels_last)
    if r.random() < 0.5:
        return [*layers, Step(lambda m, x: x.flatten(2).mean(2))], x, channels, False
    return [*layers, Step(lambda m, x: x.flatten(2).transpose(1, 2))], x, channels, True


def draw(seed: int, count: int | None = None) -> Drawn:
    """A model of at most :data:`MOST` parameter elements with a loss and a batch."""
    r = random.Random(seed)
    while True:
        kind = r.choice(["vectors", "sequences", "tokens", "space"])
        n = count or r.choice([3, 4, 5])
        layers, x, width, positions = body(r, kind, n)
        name = r.choice(["categorical", "gaussian", "bernoulli"])
        outputs = 3 if name == "categorical" else 2
        model = nn.Sequential(*layers, nn.Linear(width, outputs, bias=r.random() < 0.7))
        params = [p for p in model.parameters() if p.requires_grad]
        if r.random() < 0.2 and len(params) > 2:
            params[r.randrange(len(params))].requires_grad_(False)
        if sum(p.numel() for p in model.parameters()) <= MOST:
            break
    modes = [(m, m.training) for m in model.modules()]
    model = seeded(model, seed)
    for m, mode in modes:
        m.training = mode
    try:
        with torch.no_grad():
            z = model(x)
    except (ValueError, RuntimeError):  # one position has nothing to normalise, or none is left for a kernel
        return draw(seed + 1_000_003, count)
    return with_loss(r, model, x, z, name, positions, f"seed {seed}: {kind}, {model}")


def with_loss(
    r: random.Random, model: nn.Module, x: Tensor, z: Tensor, name: str, positions: bool, text: str
) -> Drawn:
    """The model with a loss of this likelihood, and targets."""
    g = torch.Generator().manual_seed(r.randrange(1 << 30))
    reduction = r.choice(["mean", "sum"])
    lead = z.shape[:-1]
    hidden = r.random() < 0.3
    if name == "categorical":
        y = torch.randint(0, 3, lead, generator=g)
        if r.random() < 0.4:
            y[torch.rand(lead, generator=g) < 0.3] = -100
            y.view(-1)[0] = 1
        class_weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64) if r.random() < 0.4 else None
        options: dict[str, Any] = {"weight": class_weights, "reduction": reduction}
        if r.random() < 0.3:
            options["label_smoothing"] = 0.2
        w = (y >= 0).double()
        if class_weights is not None:
            w = w * class_weights[y.clamp(min=0)]
        if positions:
            if hidden:
                model = nn.Sequential(model, Step(lambda m, x: x))

                def loss(z: Tensor, y: Tensor) -> Tensor:
                    return F.cross_entropy(z.flatten(0, 1), y.flatten(), **options)

                return Drawn(
                    model, loss, x, y, w, reduction == "mean", name, True, f"{text}, measured, {options}"
                )
            model = nn.Sequential(model, Step(lambda m, x: x.transpose(1, 2)))
        text = f"{text}, {options}"
        return _finished(model, nn.CrossEntropyLoss(**options), hidden, x, y, w, reduction, name, text)
    y = torch.randn(z.shape, generator=g, dtype=torch.float64)
    loss_fn: nn.Module = nn.MSELoss(reduction=reduction)
    if name == "bernoulli":
        y, loss_fn = (y > 0).double(), nn.BCEWithLogitsLoss(reduction=reduction)
    w = torch.ones(z.shape, dtype=torch.float64)
    return _finished(model, loss_fn, hidden, x, y, w, reduction, name, f"{text}, {name} {reduction}")


def _finished(
    model: nn.Module,
    loss_fn: Any,
    hidden: bool,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    reduction: str,
    name: str,
    text: str,
) -> Drawn:
    shown = (lambda z, t: loss_fn(z, t)) if hidden else loss_fn
    return Drawn(
        model, shown, x, y, w, reduction == "mean", name, hidden, text + (", hidden" if hidden else "")
    )
