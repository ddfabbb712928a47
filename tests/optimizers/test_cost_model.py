"""The cost model against real optimizers: state byte for byte, messages as they are sent, traffic as it is counted.

Oracles: the storage of a real optimizer's state after real steps, and of one made on the meta device where the model
does not fit; every all-reduce and broadcast of a real step; what every operation of a real step reads and writes; the
times in docs/results/step_cost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvature import shared_work
from optimizers import SecondOrder, available, build
from optimizers.cost_model import PRESETS, SIZES, Layer, cost, decoder
from optimizers.distributed import GroupTeam, Ranks, check_shardable

ROOT = Path(__file__).resolve().parents[2]
NAMES = available()["optimizers"]
MEASURED = json.loads((ROOT / "docs" / "results" / "step_cost" / "cpu.json").read_text(encoding="utf-8"))
TINY = (
    Layer("embedding", 50, 40),
    Layer("norm", 40),
    Layer("linear", 60, 40),
    Layer("linear", 50, 60, bias=False),
)


def module(layers: tuple[Layer, ...], **options: Any) -> nn.Sequential:
    """The layers one after another, as many as the counts say."""
    made: list[nn.Module] = []
    for layer in layers:
        for _ in range(layer.count):
            if layer.kind == "embedding":
                made.append(nn.Embedding(layer.rows, layer.columns, **options))
            elif layer.kind == "norm":
                made.append(nn.LayerNorm(layer.rows, bias=layer.bias, **options))
            else:
                made.append(nn.Linear(layer.columns, layer.rows, bias=layer.bias, **options))
    return nn.Sequential(*made)


def state_bytes(optimizer: SecondOrder) -> int:
    tensors = [x for entries in optimizer.state.values() for x in entries.values() if isinstance(x, Tensor)]
    return sum(x.untyped_storage().nbytes() for x in tensors)


def trainer(name: str) -> tuple[SecondOrder, Callable[[], Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = module(TINY)
        x, y = torch.randint(0, 50, (64,)), torch.randint(0, 50, (64,))
    optimizer = build(model, optimizer=name, lr=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        optimizer.backward(loss, outputs)
        return loss

    return optimizer, closure


def test_every_preset_has_a_row() -> None:
    assert sorted(PRESETS) == sorted(NAMES)
    assert len(NAMES) >= 22


@pytest.mark.parametrize("name", NAMES)
def test_state_equals_that_of_a_real_optimizer_after_steps(name: str) -> None:
    optimizer, closure = trainer(name)
    for _ in range(3):
        optimizer.step(closure)
    assert cost(name, TINY).state == state_bytes(optimizer)


@pytest.mark.filterwarnings("ignore:E?KFAC treats these by the diagonal")  # what has more than 8192 rows
@pytest.mark.parametrize("size", ["163M", "70B"])
@pytest.mark.parametrize("name", NAMES)
def test_state_equals_that_of_an_optimizer_made_without_memory(name: str, size: str) -> None:
    # one block of the model, and all that is there once: real widths, on the meta device
    layers = tuple(Layer(x.kind, x.rows, x.columns, x.bias, min(x.count, 2)) for x in SIZES[size])
    optimizer = build(module(layers, device="meta"), optimizer=name, lr=1e-3)
    assert cost(name, layers).state == state_bytes(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_float32_beside_bfloat16_parameters(name: str) -> None:
    model = module(TINY, device="meta", dtype=torch.bfloat16)
    optimizer = build(model, optimizer=name, lr=1e-3)
    assert cost(name, TINY, parameter_bytes=2).state == state_bytes(optimizer)


def test_layers_have_the_parameters_of_their_modules() -> None:
    for size in ("1M", "10M"):
        made = module(SIZES[size], device="meta")
        assert sum(p.numel() for p in made.parameters()) == sum(x.parameters for x in SIZES[size])


def test_sizes_are_what_their_names_say() -> None:
    scale = {"M": 1e6, "B": 1e9}
    for name, layers in SIZES.items():
        size = sum(layer.parameters for layer in layers)
        assert size == pytest.approx(float(name[:-1]) * scale[name[-1]], rel=0.08), name
    # Llama 2's own numbers
    assert sum(x.parameters for x in SIZES["7B"]) == 6_738_415_616
    assert sum(x.parameters for x in SIZES["70B"]) == 68_976_648_192


# -- messages --------------------------------------------------------------------------------------------------


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """What this rank of two sends: the other one has the same batch, and all shared work is done here."""
    if distributed.is_initialized():
        pytest.skip("a process group exists already")
    log: list[tuple[str, int]] = []

    def all_reduce(x: Tensor, *_: Any, **__: Any) -> None:
        log.append(("reduce", x.numel() * x.element_size()))
        x.mul_(2)

    def broadcast(x: Tensor, *_: Any, **__: Any) -> None:
        log.append(("share", x.numel() * x.element_size()))

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "broadcast", broadcast)
    monkeypatch.setattr(shared_work, "owners", lambda costs, size: [0] * len(costs))
    monkeypatch.setattr(GroupTeam, "any", lambda self, flag, device: flag)
    yield log
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_messages_are_those_of_a_real_step(name: str, messages: list[tuple[str, int]]) -> None:
    optimizer, closure = trainer(name)
    by_products = bool(PRESETS[name].per_product)
    for _ in range(2 if by_products else 86):  # K-FAC refreshes more often at first
        optimizer.step(closure)
    messages.clear()
    steps = 3 if by_products else 20  # a multiple of every interval
    for _ in range(steps):
        optimizer.step(closure)
    reduced = [size for kind, size in messages if kind == "reduce"]
    vector = 4 * sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    products = reduced.count(vector) / steps if optimizer.curvature.needs.graph and by_products else 7.0
    expected = cost(name, TINY, ranks=2, products=products)
    assert sum(reduced) / steps == pytest.approx(expected.reduced, abs=8)
    shared = sum(size for kind, size in messages if kind == "share") / steps
    assert shared == pytest.approx(expected.shared, abs=1e-6)


def test_a_ring_of_two_sends_each_message_once() -> None:
    alone, two, many = (cost("soaa", TINY, ranks=n) for n in (1, 2, 1000))
    assert alone.sent == alone.reduced == 0.0
    assert two.sent == 4 * two.parameters + two.reduced
    assert many.sent == pytest.approx(2 * two.sent, rel=2e-3)


# -- shards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_presets_that_shard_are_those_that_the_optimizer_takes(name: str) -> None:
    optimizer, _ = trainer(name)
    sharded = Ranks((), shards=object())  # type: ignore[arg-type]
    try:
        check_shardable(sharded, optimizer.curvature, optimizer.trust_region)
    except ValueError:
        with pytest.raises(ValueError, match="does not work on sharded"):
            cost(name, TINY, ranks=4, sharded=True)
    else:
        assert cost(name, TINY, ranks=4, sharded=True).state < cost(name, TINY).state / 3


# -- traffic ---------------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Bytes that operations read and write; a view moves none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or "empty" in func.name() or "_local_scalar" in func.name():
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.total += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        return out


def counted(optimizer: SecondOrder, closure: Callable[[], Tensor], steps: int = 20) -> float:
    """Bytes a step, that of the closure not counted."""
    loss = closure()
    with Counter() as counter:
        for _ in range(steps):
            optimizer.step(loss=loss)
    return counter.total / steps


BY_GRADIENTS = [n for n in NAMES if not PRESETS[n].per_product and not PRESETS[n].gradients]


@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_traffic_is_a_floor_under_what_the_operations_move(name: str) -> None:
    optimizer, closure = trainer(name)
    for _ in range(3):
        optimizer.step(closure)
    ratio = counted(optimizer, closure) / cost(name, TINY).traffic
    assert 2.0 < ratio < 6.0, ratio  # operations one by one move every intermediate result


@pytest.mark.parametrize("name", ["soaa", "adamw"])
def test_compiled_step_takes_the_time_of_its_traffic(name: str) -> None:
    """At 50 M parameters, where memory is what a step waits for; 28 bytes are those of the fused AdamW."""
    row = {"soaa": "SOAA compiled", "adamw": "AdamW composed, compiled"}[name]
    measured = MEASURED["models"]["flat-50M"]["contenders"][row]["ratio"]
    flat = (Layer("norm", 50_000_000, bias=False),)
    predicted = cost(name, flat).traffic / (28 * 50_000_000)
    assert predicted / 1.1 <= measured <= 1.5 * predicted


@pytest.mark.parametrize("name", ["soaa", "adamw"])
def test_eager_step_takes_no_more_than_what_its_operations_move(name: str) -> None:
    """And no less than what must pass memory: blocks stay in the cache, as far as other work leaves them there."""
    row = {"soaa": "SOAA eager", "adamw": "AdamW composed, eager"}[name]
    measured = MEASURED["models"]["flat-50M"]["contenders"][row]["ratio"]
    optimizer, closure = trainer(name)
    moved = counted(optimizer, closure) / (28 * cost(name, TINY).parameters)
    flat = (Layer("norm", 50_000_000, bias=False),)
    assert cost(name, flat).traffic / (28 * 50_000_000) <= measured <= 1.25 * moved


def test_soaa_to_adamw_is_the_ratio_of_their_traffic_at_every_size() -> None:
    flat = (Layer("norm", 1000, bias=False),)
    predicted = cost("soaa", flat).traffic / cost("adamw", flat).traffic
    both = {"SOAA compiled", "AdamW composed, compiled"}
    for model in (x for x in MEASURED["models"].values() if both <= x["contenders"].keys()):
        times = {name: row["milliseconds"] for name, row in model["contenders"].items()}
        measured = times["SOAA compiled"] / times["AdamW composed, compiled"]
        assert predicted <= measured * 1.1
        assert measured <= 1.35 * predicted or model["parameters"] < 2_000_000  # small ones wait for launches


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "sgd"}, "preset must be one of"),
        ({"ranks": 0}, "ranks must be >= 1"),
        ({"products": -1.0}, "products >= 0"),
        ({"parameter_bytes": 3}, "parameter_bytes 2, 4 or 8"),
    ],
)
def test_bad_arguments_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost(**{"preset": "soaa", "layers": TINY, **arguments})


def test_bad_layers_raise() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        Layer("conv", 3, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be >= 1"):
        Layer("linear", 0, 3)
    assert sum(x.parameters for x in decoder(1, 8, 16, 10)) == 4 * 72 + 144 + 136 + 3 * 16 + 2 * 80
