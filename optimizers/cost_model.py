"""What a preset costs before it is run: memory, traffic and communication of one rank, from 1 M to 70 B parameters.

Counts, no measurements: which tensors a preset keeps, how often a step passes over them, what ranks tell each other.
The tests compare the state with real optimizers byte for byte, the messages with those that are sent, and the traffic
with what the operations of a real step read and write.

Legend: P parameters; a *vector* is P numbers; E = Σ n², the elements of a preset's square factors; R ranks. State is
float32 by default, whatever the parameters are. Messages go around a ring, so that of n bytes a rank sends (R-1)/R n to
gather, scatter or broadcast, and twice that to reduce for all.

>>> from optimizers.cost_model import SIZES, cost
>>> seven = cost("adamw", SIZES["7B"], ranks=64, sharded=True)
>>> f"{seven.state / 2**30:.2f} GiB of state, {seven.memory / 2**30:.2f} GiB in all"
'0.78 GiB of state, 1.57 GiB in all'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

FLOAT = 4
KFAC_LARGEST = 8192
SOAP_LARGEST = 10_000
SHAMPOO_BLOCK = 1024
INVERSES = 20
BASES = 10


@dataclass(frozen=True)
class Layer:
    """``count`` layers of one shape.

    Args:
        kind: ``"linear"``, ``"embedding"``, or ``"norm"`` (a scale a channel, and a shift with ``bias``).
        rows: outputs of a linear layer, entries of an embedding, channels of a norm.
        columns: inputs of a linear layer, width of an embedding; not used by a norm.
        bias: whether it has one.
        count: how many there are, >= 1.

    >>> Layer("linear", rows=3, columns=8).parameters
    27
    """

    kind: Literal["linear", "embedding", "norm"]
    rows: int
    columns: int = 1
    bias: bool = True
    count: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "embedding", "norm"):
            raise ValueError(f"kind must be 'linear', 'embedding' or 'norm', got {self.kind!r}")
        if min(self.rows, self.columns, self.count) < 1:
            raise ValueError(
                f"rows, columns and count must be >= 1, got {self.rows}, {self.columns}, {self.count}"
            )

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of one layer's parameters."""
        weight = (self.rows,) if self.kind == "norm" else (self.rows, self.columns)
        return (weight, (self.rows,)) if self.bias and self.kind != "embedding" else (weight,)

    @property
    def parameters(self) -> int:
        """P of all ``count`` layers."""
        return self.count * sum(prod(shape) for shape in self.shapes)


def decoder(
    layers: int,
    width: int,
    hidden: int,
    vocabulary: int,
    *,
    keys: int | None = None,
    gated: bool = False,
    bias: bool = True,
    context: int = 0,
) -> tuple[Layer, ...]:
    """Describe a decoder-only transformer, with a head of its own.

    Args:
        layers: blocks of attention and a feed-forward network.
        width: of the residual stream.
        hidden: of the feed-forward network.
        vocabulary: rows of the embedding and of the head.
        keys: width of the keys and of the values, less than ``width`` with grouped queries; ``None`` is ``width``.
        gated: a third matrix in the feed-forward network, as in Llama.
        bias: linear layers and norms have one; the head has none.
        context: rows of a learned position embedding; 0 for none.

    Returns:
        Its layers.
    """
    keys = width if keys is None else keys
    blocks = [
        Layer("linear", width, width, bias, 2 * layers),  # queries, and attention's output
        Layer("linear", keys, width, bias, 2 * layers),
        Layer("linear", hidden, width, bias, (2 if gated else 1) * layers),
        Layer("linear", width, hidden, bias, layers),
        Layer("norm", width, bias=bias, count=2 * layers + 1),
        Layer("embedding", vocabulary, width),
        Layer("linear", vocabulary, width, False),
    ]
    return (*blocks, *([Layer("embedding", context, width)] if context else []))


SIZES: dict[str, tuple[Layer, ...]] = {
    "1M": decoder(4, 128, 512, 1000, context=128),
    "10M": decoder(6, 320, 1280, 5000, context=256),
    "163M": decoder(12, 768, 3072, 50257, context=1024),
    "1.4B": decoder(24, 2048, 8192, 50257, context=2048),
    "7B": decoder(32, 4096, 11008, 32000, gated=True, bias=False),
    "70B": decoder(80, 8192, 28672, 32000, keys=1024, gated=True, bias=False),
}
"""Transformers by size; from 163M on the shapes of GPT-2, GPT-3 XL, Llama 2 7B and 70B, heads untied."""


@dataclass(frozen=True)
class Cost:
    """What one step of a preset costs one rank.

    Args:
        preset: its name.
        parameters: P of the whole model.
        state: bytes of optimizer state that this rank keeps.
        memory: bytes of parameters, gradients, state and K-FAC's inverses that this rank keeps between two steps.
        traffic: bytes that the optimizer's step reads and writes at least, the mean over a refresh interval.
        reduced: bytes of the optimizer's own messages that are reduced over all ranks, the mean a step.
        shared: bytes of results that ranks compute for each other, the mean a step.
        sent: bytes that this rank sends a step, gradients and gathered parameters included.
        passes: extra passes through the model a step, each of the cost of about one gradient.
    """

    preset: str
    parameters: int
    state: int
    memory: int
    traffic: float
    reduced: float
    shared: float
    sent: float
    passes: float


@dataclass(frozen=True)
class _Factors:
    """Elements of a preset's matrices, and of what goes with them."""

    square: int = 0
    rows: int = 0
    extra: int = 0
    reduced: float = 0.0
    shared: float = 0.0
    cached: int = 0

    def __add__(self, other: _Factors) -> _Factors:
        return _Factors(
            self.square + other.square,
            self.rows + other.rows,
            self.extra + other.extra,
            self.reduced + other.reduced,
            self.shared + other.shared,
            self.cached + other.cached,
        )

    def times(self, count: int) -> _Factors:
        """Of ``count`` layers."""
        return _Factors(
            count * self.square,
            count * self.rows,
            count * self.extra,
            count * self.reduced,
            count * self.shared,
            count * self.cached,
        )


@dataclass(frozen=True)
class _Preset:
    """One row of the model.

    Args:
        vectors: kept.
        per_tensor: numbers kept for every parameter tensor.
        whole: bytes of scalars and other things kept once.
        passes_over: vectors read and written a step, counting θ and g.
        passes_over_factors: the same of the factors' elements.
        per_product: vectors read and written a product, where curvature is reached by products.
        by_model: a product is one with the model's graph, and the mean of those of all ranks.
        trial: passes through the model to judge a trial, in gradients (a forward pass is a third).
        gradients: passes through the model to measure curvature, a step.
        reduced: vectors reduced over ranks a step, beside factors and products.
        outputs: how often a step looks at the model's outputs, which ranks do only where every loss is finite.
        shardable: whether it works on shards.
        factors: what kind.
    """

    vectors: int
    per_tensor: int
    whole: int
    passes_over: float
    passes_over_factors: float = 0.0
    per_product: float = 0.0
    by_model: bool = True
    trial: float = 0.0
    gradients: float = 0.0
    reduced: float = 0.0
    outputs: float = 0.0
    shardable: bool = False
    factors: Literal["", "kfac", "ekfac", "shampoo", "soap"] = ""


# Every step reads g once to find numbers that are not finite: 1. The update reads g, updates means in place (2 each)
# and θ (2). A sum over its own result that a step waits for costs one more pass over what it is formed from.
_ADAM = _Preset(2, 2, 12, passes_over=8, shardable=True)
_BY_PRODUCTS = _Preset(0, 1, 8, passes_over=8, per_product=10, trial=1 / 3)
# 3: the steps, and the last update that saw a gradient, an int64
_MEMORY = _Preset(22, 3, 8 + 80, passes_over=12, per_product=10 + 42, by_model=False, trial=1 / 3)
_KRONECKER = _Preset(
    1, 2, 16, passes_over=15, passes_over_factors=5.1, gradients=2 / 3, trial=1 / 3, outputs=1, factors="kfac"
)
PRESETS: dict[str, _Preset] = {
    "adahessian": replace(_ADAM, passes_over=12, gradients=2, reduced=1, shardable=False),
    "adam": _ADAM,
    "adamw": _ADAM,
    "adamw-replay": replace(_ADAM, whole=16),
    "arc": replace(_BY_PRODUCTS, per_product=12),
    "cat": replace(_BY_PRODUCTS, trial=1.0),
    "ekfac": replace(_KRONECKER, passes_over=19, factors="ekfac"),
    "hessian-free": replace(_BY_PRODUCTS, whole=16, outputs=1),
    "kfac": _KRONECKER,
    "lamb": replace(_ADAM, passes_over=11, shardable=False),
    "lars": _Preset(1, 1, 12, passes_over=7),
    "lbfgs-trust-region": _MEMORY,
    "lsr1-trust-region": _MEMORY,
    "muon": _Preset(1, 1, 12, passes_over=14),
    "natural-gradient": replace(_BY_PRODUCTS, whole=12, outputs=1),
    "shampoo": _Preset(2, 5, 12, passes_over=20, passes_over_factors=4.2, factors="shampoo"),
    "soaa": replace(_ADAM, whole=24, passes_over=9),
    "soap": _Preset(2, 2, 12, passes_over=18, passes_over_factors=5.2, factors="soap"),
    "sophia-g": _Preset(2, 2, 12, passes_over=7.4, gradients=1 / 15, reduced=0.1, outputs=0.1),
    "sophia-h": _Preset(2, 2, 12, passes_over=7.6, gradients=0.2, reduced=0.1),
    "tadam": _Preset(4, 3, 32, passes_over=16, shardable=True),
    "trust-region-newton": _BY_PRODUCTS,
}


def cost(
    preset: str,
    layers: Sequence[Layer],
    *,
    ranks: int = 1,
    sharded: bool = False,
    products: float = 10.0,
    parameter_bytes: int = 4,
) -> Cost:
    """Return what a preset with its default options costs one rank.

    Args:
        preset: one of ``available()["optimizers"]``.
        layers: of the model; see :func:`decoder` and :data:`SIZES`.
        ranks: R >= 1, data-parallel processes.
        sharded: parameters, gradients and state are spread over the ranks (FSDP2); else every rank has all (DDP).
        products: Hessian-like products a step, where curvature is reached by products alone; they depend on the
            problem, and ``step_info`` does not know them beforehand.
        parameter_bytes: of one parameter and of one gradient: 4 for float32, 2 for bfloat16.

    Returns:
        The counts.

    Raises:
        ValueError: for an unknown preset, a number out of range, or a preset that does not work on shards.

    >>> cost("soaa", [Layer("linear", 10, 99)]).state  # 8 bytes a parameter, and 10 scalars
    8040

    Cost: O(number of layers).
    """
    row = PRESETS.get(preset)
    if row is None:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if ranks < 1 or products < 0 or parameter_bytes not in (2, 4, 8):
        raise ValueError(
            "ranks must be >= 1, products >= 0 and parameter_bytes 2, 4 or 8, "
            f"got {ranks}, {products}, {parameter_bytes}"
        )
    if sharded and not row.shardable:
        raise ValueError(f"{preset} does not work on sharded parameters: use sharded=False (DDP)")
    size = sum(layer.parameters for layer in layers)
    tensors = sum(layer.count * len(layer.shapes) for layer in layers)
    factors = sum((_factors(row.factors, layer).times(layer.count) for layer in layers), _Factors())
    scalars = FLOAT * row.per_tensor * tensors + row.whole
    kept = FLOAT * (row.vectors * size + 2 * factors.square + factors.rows + factors.extra)
    share = ranks if sharded else 1
    state = -(-kept // share) + scalars
    by_products = products if row.per_product else 0.0
    through_model = by_products if row.by_model else 0.0
    touched = (row.passes_over + by_products * row.per_product) * size
    touched += row.passes_over_factors * factors.square
    reduced = FLOAT * ((row.reduced + through_model) * size + factors.reduced) + _agreed(row)
    shared = FLOAT * factors.shared if ranks > 1 else 0.0
    ring = (ranks - 1) / ranks
    # DDP reduces the gradient; FSDP2 gathers the parameters before forward and backward, and scatters the gradient
    model = (3 if sharded else 2) * parameter_bytes * size
    return Cost(
        preset=preset,
        parameters=size,
        state=state,
        memory=state + FLOAT * factors.cached + 2 * parameter_bytes * -(-size // share),
        traffic=FLOAT * touched / share,
        reduced=reduced if ranks > 1 else 0.0,
        shared=shared,
        sent=ring * (model + 2 * reduced + shared),
        passes=row.gradients + row.trial + 2 * through_model,
    )


def _agreed(row: _Preset) -> float:
    """Bytes of the numbers that ranks agree on: the loss, its count, finiteness; the loss at a trial point."""
    return 24.0 + (4.0 if row.trial else 0.0) + 4.0 * row.outputs


def _factors(kind: str, layer: Layer) -> _Factors:
    """The matrices of one layer."""
    if kind == "kfac":
        return _kronecker(layer, in_eigenbases=False)
    if kind == "ekfac":
        return _kronecker(layer, in_eigenbases=True)
    if kind == "shampoo":
        sides = [n for shape in layer.shapes for n in _pieces(shape, SHAMPOO_BLOCK)]
        square, rows = sum(n * n for n in sides), sum(sides)
        return _Factors(square, rows, shared=(square + rows) / BASES)
    if kind == "soap":
        matrices = (shape for shape in layer.shapes if len(shape) > 1)
        sides = [n for shape in matrices for n in shape if n <= SOAP_LARGEST]
        square = sum(n * n for n in sides)
        # the order of a basis's columns goes along, in int64
        return _Factors(square, shared=(square + 2 * sum(sides)) / BASES)
    return _Factors()


def _kronecker(layer: Layer, *, in_eigenbases: bool) -> _Factors:
    """A and G of a linear layer, the diagonal A and G of an embedding; else a diagonal.

    In eigenbases with their eigenvalues and measured moments (EK-FAC); else the factors once more, as they were at the
    last refresh, with the inverses beside the state (K-FAC).
    """
    size = sum(prod(shape) for shape in layer.shapes)
    linear = layer.kind == "linear"
    outputs = layer.rows if linear else layer.columns
    if layer.kind == "norm" or max(outputs, layer.columns + 1 if linear else 0) > KFAC_LARGEST:
        return _Factors(extra=size, reduced=size)
    inputs = layer.columns + layer.bias if linear else layer.rows
    square = outputs**2 + (inputs**2 if linear else 0)
    diagonal = 0 if linear else inputs
    triangles = (square + outputs + (inputs if linear else 0)) // 2  # of symmetric matrices half is sent
    measured = triangles + diagonal + 1
    if not in_eigenbases:
        return _Factors(
            square,
            diagonal,
            extra=diagonal,
            reduced=measured,
            shared=(square + diagonal) / INVERSES,
            cached=square + diagonal,
        )
    rows = outputs + inputs
    return _Factors(
        square,
        rows,
        extra=diagonal + size,
        reduced=measured + size,
        shared=(square + rows - diagonal) / INVERSES,
    )


def _pieces(shape: Sequence[int], block: int) -> list[int]:
    """The sides of all blocks of a tensor."""
    cut = [[min(block, n - i) for i in range(0, n, block)] for n in shape]
    total = prod(len(pieces) for pieces in cut)
    return [n for pieces in cut for n in pieces for _ in range(total // len(pieces))]
