"""Multi-head attention in every way it can be called: block for block that of attention written with linear layers.

``Written`` computes attention from four ``nn.Linear`` layers and an explicit softmax, with its own names; its blocks
are those of test_exact.py. Groups of the packed projection are compared with them one by one.
What has no Kronecker rule (``bias_k``, separate projections of other dimensions) is compared with the dense diagonal.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import EKFAC, KFAC, estimate
from curvature.kronecker import KroneckerOperator
from tests.curvature import dense

TIGHT = 1e-9
N, L, S, E, HEADS = 3, 4, 5, 4, 2
WEIGHT = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)
Y = torch.tensor([0, 2, 1])
LOSS = nn.CrossEntropyLoss(WEIGHT)


class Model(nn.Module):
    """Attention between two parts of the input, then a head."""

    def __init__(self, kind: str = "self", call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, **options)
        self.head = nn.Linear(E, 3)
        self.kind, self.call = kind, call or {}
        for p in self.parameters():
            nn.init.normal_(p, std=0.6)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(query, key, value), samples first: objects that are the same where the kind says so."""
        if self.kind == "self":
            q = x[:, :L, :E]
            return q, q, q
        k = x[:, L:, : self.attention.kdim]
        return (
            x[:, :L, :E],
            k,
            k if self.kind == "cross" else x[:, L:, : self.attention.vdim].sin(),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        if not self.attention.batch_first:
            moved: dict[int, Tensor] = {}
            q, k, v = (moved.setdefault(id(t), t.transpose(0, 1)) for t in (q, k, v))
        out, weights = self.attention(q, k, v, **self.call)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        z = self.head(torch.tanh(out)).mean(1)
        return (
            z
            if weights is None
            else z + weights.reshape(N, -1).square().sum(1, keepdim=True) * torch.arange(3)
        )


class Written(nn.Module):
    """The same function of the same input."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = [model]
        attention = model.attention
        bias = attention.in_proj_bias is not None
        self.q, self.k, self.v = (
            nn.Linear(n, E, bias=bias) for n in (E, attention.kdim or E, attention.vdim or E)
        )
        self.out, self.head = nn.Linear(E, E, bias=bias), nn.Linear(E, 3)
        with torch.no_grad():
            if attention._qkv_same_embed_dim:
                packed = attention.in_proj_weight.chunk(3)
            else:
                packed = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            for layer, w in zip((self.q, self.k, self.v), packed, strict=True):
                layer.weight.copy_(w)
            self.out.weight.copy_(attention.out_proj.weight)
            if bias:
                for layer, b in zip((self.q, self.k, self.v), attention.in_proj_bias.chunk(3), strict=True):
                    layer.bias.copy_(b)
                self.out.bias.copy_(attention.out_proj.bias)
            self.head.load_state_dict(model.head.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        (model,) = self.model
        attention, call = model.attention, model.call
        q, k, v = model.split(x)
        q, k, v = self.q(q), self.k(k), self.v(v)
        if attention.bias_k is not None:
            k = torch.cat([k, attention.bias_k.detach().expand(N, 1, E)], 1)
            v = torch.cat([v, attention.bias_v.detach().expand(N, 1, E)], 1)
        if attention.add_zero_attn:
            k, v = (torch.cat([t, torch.zeros(N, 1, E)], 1) for t in (k, v))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / math.sqrt(E / HEADS)
        extra = scores.shape[-1] - (L if model.kind == "self" else S)
        for name in ("attn_mask", "key_padding_mask"):
            mask = call.get(name)
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape).masked_fill(mask, -math.inf)
            mask = nn.functional.pad(mask, (0, extra))
            if name == "key_padding_mask":
                mask = mask[:, None, None]
            elif mask.dim() == 3:
                mask = mask.unflatten(0, (N, HEADS))
            scores = scores + mask
        weights = torch.softmax(scores, -1)
        out = self.out((weights @ v).transpose(1, 2).flatten(2))
        z = self.head(torch.tanh(out)).mean(1)
        if not call.get("need_weights", True):
            return z
        seen = weights.mean(1) if call.get("average_attn_weights", True) else weights
        return z + seen.reshape(N, -1).square().sum(1, keepdim=True) * torch.arange(3)


def blocks_of(operator: Any) -> dict[str, Tensor]:
    """Every block by the name of its module, (groups, n, n)."""
    assert isinstance(operator, KroneckerOperator)
    return {b.block.modules[0]: b.dense() for b in operator.blocks}


CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * L, [False] * (L - 1) + [True], [False, True, False, True]])
BIASED = torch.linspace(-1, 1, N * HEADS * L * L, dtype=torch.float64).reshape(N * HEADS, L, L)
ACROSS = torch.linspace(-2, 1, L * S, dtype=torch.float64).reshape(L, S)

CALLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "self": ("self", {}, {}),
    "cross": ("cross", {}, {}),
    "all different": ("all different", {}, {}),
    "without weights": ("self", {"need_weights": False}, {}),
    "cross, without weights": ("cross", {"need_weights": False}, {}),
    "weights of every head": ("self", {"average_attn_weights": False}, {}),
    "causal": ("self", {"attn_mask": CAUSAL}, {}),
    "causal hint": ("self", {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}, {}),
    "mask of numbers": ("self", {"attn_mask": BIASED}, {}),
    "mask of numbers, without weights": ("self", {"attn_mask": BIASED, "need_weights": False}, {}),
    "mask across": ("cross", {"attn_mask": ACROSS}, {}),
    "padding": ("self", {"key_padding_mask": PADDING}, {}),
    "padding, without weights": ("self", {"key_padding_mask": PADDING, "need_weights": False}, {}),
    "padding and mask": ("self", {"key_padding_mask": PADDING, "attn_mask": CAUSAL}, {}),
    "bias_kv": ("self", {}, {"add_bias_kv": True}),
    "bias_kv, masked, without weights": (
        "self",
        {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "need_weights": False},
        {"add_bias_kv": True},
    ),
    "zero attention": ("cross", {}, {"add_zero_attn": True}),
    "bias_kv and zero attention": ("self", {"need_weights": False}, {"add_bias_kv": True, "add_zero_attn": True}),
    "no bias": ("self", {}, {"bias": False}),
    "no bias, cross": ("cross", {}, {"bias": False}),
    "no bias, without weights": ("self", {"need_weights": False}, {"bias": False}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.filterwarnings("ignore:.*mismatched")
@pytest.mark.parametrize(("batch_first", "training"), [(True, False), (False, True)])
@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_every_call_has_the_blocks_of_attention_written_out(
    kind: type[KFAC], case: str, batch_first: bool, training: bool
) -> None:
    which, call, options = CALLS[case]
    model = Model(which, call, batch_first=batch_first, **options).train(training)
    twin, x = Written(model).train(training), torch.randn(N, L + S, E)
    torch.testing.assert_close(twin(x), model(x))  # the premise
    B = estimate(kind(model), model, LOSS, [(x, Y)])
    ours, theirs = blocks_of(B), blocks_of(estimate(kind(twin), twin, LOSS, [(x, Y)]))
    for group, name in enumerate("qkv"):
        assert dense.relative_error(ours["attention"][group], theirs[name][0]) < TIGHT, name
    assert dense.relative_error(ours["attention.out_proj"], theirs["out"]) < TIGHT
    assert dense.relative_error(ours["head"], theirs["head"]) < TIGHT
    check_the_rest(B, model, x)


def check_the_rest(operator: Any, model: nn.Module, x: Tensor) -> None:
    """Parameters without a block have the dense Gauss-Newton diagonal."""
    z = model(x)
    params = dense.trainable(model)
    exact = dense.split(dense.gauss_newton(LOSS(z, Y), z, params).diagonal(), params)
    diagonal = operator.diagonal()
    for i in operator.layout.diagonal:
        assert dense.relative_error(diagonal[i], exact[i]) < TIGHT, operator.layout.names[i]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_projections_of_other_dimensions_are_a_block_each_and_their_packed_bias_another(
    kind: type[KFAC], training: bool, bias: bool, batch_first: bool
) -> None:
    model = Model(
        "all different", {"need_weights": False}, kdim=3, vdim=2, bias=bias, batch_first=batch_first
    )
    model, x = model.train(training), torch.randn(N, L + S, E)
    B = estimate(kind(model), model, LOSS, [(x, Y)])
    assert not B.layout.diagonal
    ours = {B.layout.names[b.block.root]: b.dense() for b in B.blocks}
    for part in ("weight", "bias") if bias else ("weight",):  # in the twin each of the two alone
        twin = Written(model).train(training)
        torch.testing.assert_close(twin(x), model(x))
        for layer in (twin.q, twin.k, twin.v):
            for name, p in layer.named_parameters():
                p.requires_grad_(name == part)
        theirs = blocks_of(estimate(kind(twin), twin, LOSS, [(x, Y)]))
        for group, name in enumerate("qkv"):
            weight, biases = ours[f"attention.{name}_proj_weight"], ours.get("attention.in_proj_bias")
            found = weight[0] if part == "weight" else biases[group]
            scale = (
                theirs["q" if part == "weight" else "v"].abs().max()
            )  # a softmax does not feel the keys' bias
            assert float((found - theirs[name][0]).abs().max() / scale) < TIGHT, (name, part)
        assert dense.relative_error(ours["attention.out_proj.weight"], theirs["out"]) < TIGHT
    if kind is EKFAC:
        z = model(x)
        G = dense.gauss_newton(LOSS(z, Y), z, dense.trainable(model))
        assert abs(float(dense.flat(B.diagonal()).sum() / G.trace()) - 1) < TIGHT
    halves = [(x[:1], Y[:1]), (x[1:], Y[1:])]
    assert dense.relative_error(estimate(kind(model), model, LOSS, halves).to_dense(), B.to_dense()) < 1e-8


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "frozen",
    [
        ("in_proj_weight",),
        ("in_proj_bias",),
        ("out_proj.weight",),
        ("out_proj.bias",),
        ("in_proj_weight", "in_proj_bias"),
        ("in_proj_weight", "out_proj.weight", "out_proj.bias"),
        ("in_proj_weight", "in_proj_bias", "out_proj.weight"),
    ],
)
def test_parts_that_are_frozen(frozen: tuple[str, ...], training: bool) -> None:
    model = Model("self", {"need_weights": False}, batch_first=True).train(training)
    twin, x = Written(model), torch.randn(N, L + S, E)
    for name in frozen:
        model.attention.get_parameter(name).requires_grad_(False)
    for layer in (twin.q, twin.k, twin.v):
        layer.weight.requires_grad_("in_proj_weight" not in frozen)
        layer.bias.requires_grad_("in_proj_bias" not in frozen)
    twin.out.weight.requires_grad_("out_proj.weight" not in frozen)
    twin.out.bias.requires_grad_("out_proj.bias" not in frozen)
    ours = blocks_of(estimate(KFAC(model), model, LOSS, [(x, Y)]))
    theirs = blocks_of(estimate(KFAC(twin), twin, LOSS, [(x, Y)]))
    for group, name in enumerate("qkv"):
        assert ("attention" in ours) == (name in theirs)
        if name in theirs:
            assert dense.relative_error(ours["attention"][group], theirs[name][0]) < TIGHT, name
    assert ("attention.out_proj" in ours) == ("out" in theirs)
    if "out" in theirs:
        assert dense.relative_error(ours["attention.out_proj"], theirs["out"]) < TIGHT


def test_frozen_attention_on_the_fast_path_leaves_the_rest_exact() -> None:
    """In evaluation a frozen attention runs as one fused operation without a graph: nothing in it is asked for."""
    model, x = Model("self", {"need_weights": False}, batch_first=True).eval(), torch.randn(N, L + S, E)
    model.attention.requires_grad_(False)
    twin = Written(model)
    for layer in (twin.q, twin.k, twin.v, twin.out):
        layer.requires_grad_(False)
    ours = blocks_of(estimate(KFAC(model), model, LOSS, [(x, Y)]))
    theirs = blocks_of(estimate(KFAC(twin), twin, LOSS, [(x, Y)]))
    assert list(ours) == ["head"]
    assert dense.relative_error(ours["head"], theirs["head"]) < TIGHT


def test_unbatched_attention() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, HEADS)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model, x, y = Alone(), torch.randn(L, E), torch.randn(L, E)
    batched = nn.MultiheadAttention(E, HEADS)
    batched.load_state_dict(model.attention.state_dict())

    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = batched

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            return self.attention(x, x, x)[0].transpose(0, 1)

    twin = Batched()
    ours = blocks_of(estimate(KFAC(twin), twin, nn.MSELoss(), [(x.unsqueeze(0), y.unsqueeze(0))]))
    # The outputs of one unbatched sequence look like a batch of rows, which attention mixes.
    with pytest.raises(ValueError, match="'attention' belongs to several samples"):
        estimate(KFAC(model), model, nn.MSELoss(), [(x, y)])
    assert ours["attention"].shape == (3, E * (E + 1), E * (E + 1))


class Encoder(nn.Module):
    """PyTorch's own encoder or decoder layer on tokens, then a head; ``written`` puts ``Layer`` in its place."""

    def __init__(self, decoder: bool, **options: Any) -> None:
        super().__init__()
        make = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        self.layer = make(E, HEADS, dim_feedforward=6, dropout=0.0, **options)
        self.head, self.decoder = nn.Linear(E, 3), decoder
        self.call: dict[str, Any] = {}
        for p in self.parameters():
            nn.init.normal_(p, std=0.6)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer.self_attn.batch_first
        a, b = (t if first else t.transpose(0, 1) for t in (x[:, :L], x[:, L:]))
        h = self.layer(a, b, **self.call) if self.decoder else self.layer(a, **self.call)
        return self.head(h if first else h.transpose(0, 1)).mean(1)


class WrittenAttention(nn.Module):
    """Attention from four linear layers, called as PyTorch's."""

    def __init__(self, of: nn.MultiheadAttention) -> None:
        super().__init__()
        self.batch_first = of.batch_first
        self.q, self.k, self.v, self.out = (
            nn.Linear(E, E, bias=of.in_proj_bias is not None) for _ in range(4)
        )
        with torch.no_grad():
            for layer, w in zip((self.q, self.k, self.v), of.in_proj_weight.chunk(3), strict=True):
                layer.weight.copy_(w)
            self.out.weight.copy_(of.out_proj.weight)
            if of.in_proj_bias is not None:
                for layer, b in zip((self.q, self.k, self.v), of.in_proj_bias.chunk(3), strict=True):
                    layer.bias.copy_(b)
                self.out.bias.copy_(of.out_proj.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        if not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        q, k, v = (
            f(t).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for f, t in zip((self.q, self.k, self.v), (q, k, v), strict=True)
        )
        scores = q @ k.mT / math.sqrt(E / HEADS)
        if mask is not None:
            scores = scores.masked_fill(mask, -math.inf)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], -math.inf)
        out = self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))
        return out if self.batch_first else out.transpose(0, 1)


class WrittenLayer(nn.Module):
    """The layer's equations, with its own linear and norm layers and attention written out."""

    def __init__(self, of: Any, decoder: bool) -> None:
        super().__init__()
        self.linear1, self.linear2, self.activation = of.linear1, of.linear2, of.activation
        self.norms = nn.ModuleList([of.norm1, of.norm2, *([of.norm3] if decoder else [])])
        self.norm_first, self.self_attn = of.norm_first, WrittenAttention(of.self_attn)
        self.across = WrittenAttention(of.multihead_attn) if decoder else None

    def forward(self, x: Tensor, memory: Tensor | None = None, **call: Any) -> Tensor:
        mask = call.get("src_mask", call.get("tgt_mask"))
        padding = call.get("src_key_padding_mask", call.get("tgt_key_padding_mask"))
        parts = [lambda h: self.self_attn(h, h, h, mask, padding)]
        if self.across is not None:
            parts.append(lambda h: self.across(h, memory, memory, None, call.get("memory_key_padding_mask")))
        parts.append(lambda h: self.linear2(self.activation(self.linear1(h))))
        for norm, part in zip(self.norms, parts, strict=True):
            x = x + part(norm(x)) if self.norm_first else norm(x + part(x))
        return x


LAYERS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "encoder": (False, {}, {}),
    "encoder, norm first": (False, {"norm_first": True, "activation": "gelu"}, {}),
    "encoder, no bias": (False, {"bias": False}, {}),
    "encoder, causal": (False, {}, {"src_mask": CAUSAL, "is_causal": True}),
    "encoder, padding": (False, {}, {"src_key_padding_mask": PADDING}),
    "encoder, padding and mask": (False, {"norm_first": True}, {"src_mask": CAUSAL, "src_key_padding_mask": PADDING}),
    "decoder": (True, {}, {}),
    "decoder, norm first, no bias": (True, {"norm_first": True, "bias": False}, {}),
    "decoder, masks": (
        True,
        {"activation": "gelu"},
        {
            "tgt_mask": CAUSAL,
            "tgt_key_padding_mask": PADDING,
            "memory_key_padding_mask": torch.tensor([[False] * S, [False] * 4 + [True], [True] + [False] * 4]),
        },
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*mismatched")
@pytest.mark.parametrize(("batch_first", "training"), [(True, False), (False, True)])
@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_transformer_layers(kind: type[KFAC], case: str, batch_first: bool, training: bool) -> None:
    decoder, options, call = LAYERS[case]
    model = Encoder(decoder, batch_first=batch_first, **options).train(training)
    model.call, x = call, torch.randn(N, L + S, E)
    expected = model(x)
    B = estimate(kind(model), model, LOSS, [(x, Y)])
    ours = blocks_of(B)
    check_the_rest(B, model, x)
    twin = Encoder(decoder, batch_first=batch_first, **options).train(training)
    twin.head, twin.call = model.head, call
    twin.layer = WrittenLayer(model.layer, decoder)
    torch.testing.assert_close(twin(x), expected)  # the premise
    theirs = blocks_of(estimate(kind(twin), twin, LOSS, [(x, Y)]))
    pairs = [("self_attn", "self_attn"), *([("multihead_attn", "across")] if decoder else [])]
    for name, other in pairs:
        for group, letter in enumerate("qkv"):
            one, two = ours[f"layer.{name}"][group], theirs[f"layer.{other}.{letter}"][0]
            assert dense.relative_error(one, two) < TIGHT, (name, letter)
        one, two = ours[f"layer.{name}.out_proj"], theirs[f"layer.{other}.out"]
        assert dense.relative_error(one, two) < TIGHT, name
    for name in ("layer.linear1", "layer.linear2", "head"):
        assert dense.relative_error(ours[name], theirs[name]) < TIGHT, name


class Stack(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, HEADS, 6, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, **options)
        self.head = nn.Linear(E, 3)
        for p in self.parameters():
            nn.init.normal_(p, std=0.6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x[:, :L], src_key_padding_mask=PADDING)
        return self.head(h[:, 0])


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("enable_nested_tensor", [True, False])
def test_encoder_whose_first_layers_are_frozen(
    enable_nested_tensor: bool, frozen: int, training: bool
) -> None:
    """In evaluation frozen layers take the fused path, on nested tensors of unpadded tokens; what follows is exact."""
    model, x = Stack(enable_nested_tensor=enable_nested_tensor).train(training), torch.randn(N, L + S, E)
    for layer in model.encoder.layers[:frozen]:
        layer.requires_grad_(False)
    plain = Stack(enable_nested_tensor=False).train(True)
    plain.load_state_dict(model.state_dict())
    for layer in plain.encoder.layers[:frozen]:
        layer.requires_grad_(False)
    theirs = estimate(KFAC(plain), plain, LOSS, [(x, Y)]).to_dense()
    try:
        ours = estimate(KFAC(model), model, LOSS, [(x, Y)]).to_dense()
    except (RuntimeError, NotImplementedError):  # PyTorch's own refusal to go on from a nested tensor
        with pytest.raises((RuntimeError, NotImplementedError)):
            LOSS(model(x), Y).backward()
        return
    assert dense.relative_error(ours, theirs) < 1e-8
