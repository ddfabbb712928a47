"""The compiled elementwise step: the numbers of the general one, no graph break, no recompilation, no host read."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvature import EmpiricalFisherDiagonal
from optimizers import SOAA, Adam, AdamW, SecondOrder
from optimizers.blocked import BlockedPasses
from optimizers.compiled import elementwise_path, kernels, native, native_library
from optimizers.compiled.rows import SMALLEST_LEAF, WIDTH, Layout
from optimizers.step_paths import StepPaths
from trust_region import RmsBox, SOAARadius, TrustRegion

Make = Callable[[nn.Module, Any], SecondOrder]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of ``torch.compile``, which an accelerator uses."""
    monkeypatch.setattr(elementwise_path, "serves", lambda kind: False)


@pytest.fixture(params=["native", "torch.compile"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of passes, one after the other."""
    name: str = request.param
    if name != "native":
        monkeypatch.setattr(elementwise_path, "serves", lambda kind: False)
    return name


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Leaves with and without a rest, and tensors that are pooled."""
    torch.manual_seed(0)
    sizes = (40, 900, 130, 3)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    sizes_of = [p.numel() for p in model.parameters()]
    assert any(n >= SMALLEST_LEAF and n % WIDTH for n in sizes_of)
    assert any(n < SMALLEST_LEAF for n in sizes_of)
    return model


def train(
    model: nn.Module,
    optimizer: SecondOrder,
    steps: int,
    at: Callable[[int, nn.Module], None] | None = None,
    look: bool = True,
    first: int = 0,
) -> list[dict[str, float]]:
    """Steps on random batches, each of its own seed; ``at`` may change gradients before a step."""
    records = []
    dtype = next(model.parameters()).dtype
    for t in range(first, first + steps):
        g = torch.Generator().manual_seed(t)
        x, y = torch.randn(16, 40, generator=g), torch.randn(16, 3, generator=g)
        optimizer.zero_grad()
        loss = (model(x.to(dtype)) - y.to(dtype)).square().mean() * 20.0
        optimizer.backward(loss)
        if at is not None:
            at(t, model)
        optimizer.step()
        if look:
            records.append(optimizer.step_info.as_floats())
    return records


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def composed(model: nn.Module, compiles: Any, **region: bool) -> SecondOrder:
    """SOAA from its parts, so that its box can be changed."""
    return SecondOrder(
        model.parameters(),
        lr=1e-2,
        curvature=EmpiricalFisherDiagonal(),
        trust_region=TrustRegion(region=RmsBox(**region), radius=SOAARadius(total_steps=30)),
        momentum=0.9,
        compile=compiles,
    )


MAKES: dict[str, Make] = {
    "SOAA": lambda m, c: SOAA(m.parameters(), lr=1e-2, total_steps=30, weight_decay=0.1, compile=c),
    "SOAA, model's prediction": lambda m, c: SOAA(m.parameters(), lr=1e-2, prediction="model", compile=c),
    "SOAA, two groups": lambda m, c: SOAA(
        [
            {"params": m[0].parameters(), "lr": 3e-3, "weight_decay": 0.2, "momentum": 0.8},
            {"params": m[2].parameters(), "lr": 2e-2},
            {"params": m[4].parameters()},
        ],
        lr=1e-2,
        compile=c,
    ),
    "SOAA, tensor lr": lambda m, c: SOAA(m.parameters(), lr=torch.tensor(1e-2), compile=c),
    "SOAA without the first branch": lambda m, c: composed(m, c, interior=False),
    "SOAA without the scale": lambda m, c: composed(m, c, rank_one_scale=False),
    "SOAA, the scale of the step before": lambda m, c: SOAA(
        m.parameters(), lr=1e-2, total_steps=30, fisher_scale="lagged", prediction="model", compile=c
    ),
    "AdamW": lambda m, c: AdamW(m.parameters(), lr=1e-2, weight_decay=0.1, compile=c),
    "AdamW, one group climbs": lambda m, c: AdamW(
        [{"params": m[:3].parameters()}, {"params": m[4].parameters(), "maximize": True}], lr=1e-3, compile=c
    ),
    "Adam": lambda m, c: Adam(m.parameters(), lr=1e-2, compile=c),
}


def state_differs(a: SecondOrder, b: SecondOrder) -> float:
    """The largest relative difference between two states."""
    worst = 0.0
    for (_, x), (_, y) in zip(a.state_dict()["state"].items(), b.state_dict()["state"].items(), strict=True):
        assert x.keys() == y.keys()
        for name, value in x.items():
            scale = value.abs().max().clamp(min=1e-30)
            worst = max(worst, float((value - y[name]).abs().max() / scale))
    return worst


@pytest.mark.parametrize("name", MAKES)
def test_equals_the_step_in_blocks(name: str, passes: str) -> None:
    models = [network(), network()]
    optimizers = [MAKES[name](m, c) for m, c in zip(models, (False, True), strict=True)]
    records = [train(m, o, 30) for m, o in zip(models, optimizers, strict=True)]
    assert isinstance(optimizers[0]._paths._path.passes, BlockedPasses)
    # one pass with the scale of the step before is native; elsewhere it is a graph's
    assert (optimizers[1]._paths._path is not None) == (passes == "native" or "before" not in name)
    torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-11, atol=1e-13)
    assert state_differs(*optimizers) < 1e-11
    for plain, fast in zip(*records, strict=True):
        assert plain == pytest.approx(fast, rel=1e-10, nan_ok=True)


def test_the_first_branch_is_live_somewhere_in_these_runs() -> None:
    model = network()
    records = train(model, MAKES["SOAA"](model, True), 30)
    assert any(0.0 < r["fisher_active_fraction"] < 1.0 for r in records)


@pytest.mark.usefixtures("passes")
def test_nobody_looking_changes_nothing() -> None:
    models = [network(), network()]
    optimizers = [MAKES["SOAA"](m, True) for m in models]
    train(models[0], optimizers[0], 12, look=True)
    train(models[1], optimizers[1], 12, look=False)
    assert torch.equal(vector(models[0]), vector(models[1]))
    assert state_differs(*optimizers) == 0.0
    seen = [o.step_info.as_floats() for o in optimizers]
    assert seen[0] == pytest.approx(seen[1], rel=0.0, abs=0.0, nan_ok=True)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(value: float) -> None:
    def spoil(t: int, model: nn.Module) -> None:
        if t in (3, 4):
            next(model.parameters()).grad[-1, -1] = value  # in the rest of a leaf

    models = [network(), network()]
    optimizers = [MAKES["SOAA"](m, c) for m, c in zip(models, (False, True), strict=True)]
    records = [train(m, o, 9, at=spoil) for m, o in zip(models, optimizers, strict=True)]
    torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-11, atol=1e-13)
    assert state_differs(*optimizers) < 1e-11
    for plain, fast in zip(*records, strict=True):
        assert plain == pytest.approx(fast, rel=1e-10, nan_ok=True)
    assert [r["accepted"] for r in records[1]] == [1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert records[1][-1]["skipped_steps"] == 2.0


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("make", [AdamW, SOAA])
def test_a_gradient_so_large_that_its_square_overflows_is_taken_and_poisons_nothing(make: Any) -> None:
    def enlarge(t: int, model: nn.Module) -> None:
        if t == 2:
            next(model.parameters()).grad[0, 0] = 1e25

    models = [network(torch.float32), network(torch.float32)]
    optimizers = [
        make(m.parameters(), lr=1e-3, compile=c) for m, c in zip(models, (False, True), strict=True)
    ]
    records = [train(m, o, 4, at=enlarge) for m, o in zip(models, optimizers, strict=True)]
    assert [r["accepted"] for r in records[0]] == [r["accepted"] for r in records[1]] == [1, 1, 1, 1]
    assert bool(vector(models[0]).isfinite().all())
    torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("passes")
def test_a_missing_gradient_goes_the_general_way_and_back() -> None:
    def drop(t: int, model: nn.Module) -> None:
        if t in (4, 5):
            next(model.parameters()).grad = None

    models = [network(), network()]
    optimizers = [MAKES["SOAA"](m, c) for m, c in zip(models, (False, True), strict=True)]
    records = [train(m, o, 10, at=drop, look=False) for m, o in zip(models, optimizers, strict=True)]
    assert records == [[], []]
    torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-11, atol=1e-13)
    assert state_differs(*optimizers) < 1e-11


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("missing", [torch.tensor(float("nan")), None])
@pytest.mark.filterwarnings("ignore:SOAARadius adapts by the loss")
def test_a_loss_that_is_missing_or_not_finite_leaves_radius_and_prediction(missing: Tensor | None) -> None:
    models = [network(), network()]
    optimizers = [MAKES["SOAA"](m, c) for m, c in zip(models, (False, True), strict=True)]
    for m, o in zip(models, optimizers, strict=True):
        for t in range(8):
            o.zero_grad()
            loss = m(torch.full((2, 40), 0.1 * t, dtype=torch.float64)).square().sum()
            loss.backward()
            o.step(loss=missing if t in (3, 5) else loss.detach())
    torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-11, atol=1e-13)
    assert state_differs(*optimizers) < 1e-11


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "torch.save"])
def test_goes_on_bit_for_bit_from_a_checkpoint(how: str) -> None:
    model = network()
    optimizer = MAKES["SOAA"](model, True)
    train(model, optimizer, 5, look=False)
    if how == "deepcopy":
        other, again = copy.deepcopy((model, optimizer))
    else:
        saved: Any = copy.deepcopy(optimizer.state_dict())
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        other = copy.deepcopy(model)
        again = MAKES["SOAA"](other, True)
        again.load_state_dict(saved)
    train(model, optimizer, 5, look=False, first=5)
    train(other, again, 5, look=False, first=5)
    assert torch.equal(vector(model), vector(other))
    assert state_differs(optimizer, again) == 0.0


@pytest.mark.usefixtures("passes")
def test_a_checkpoint_passes_between_compiled_and_not() -> None:
    model = network()
    optimizer = MAKES["SOAA"](model, True)
    train(model, optimizer, 5, look=False)
    other = copy.deepcopy(model)
    plain = MAKES["SOAA"](other, False)
    plain.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 5, look=False, first=5)
    train(other, plain, 5, look=False, first=5)
    torch.testing.assert_close(vector(model), vector(other), rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("passes")
def test_a_group_added_and_a_parameter_moved_to_other_memory() -> None:
    models = [network(), network()]
    optimizers = []
    for m, c in zip(models, (False, True), strict=True):
        o = SOAA(m[0].parameters(), lr=1e-2, total_steps=30, compile=c)
        train(m, o, 3)
        o.add_param_group({"params": [*m[2].parameters(), *m[4].parameters()], "lr": 3e-3})
        train(m, o, 3)
        for p in m.parameters():
            p.data = p.data.clone()
        train(m, o, 3)
        optimizers.append(o)
    torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-11, atol=1e-13)
    assert state_differs(*optimizers) < 1e-11


@pytest.mark.usefixtures("passes")
def test_a_grad_scaler_is_followed() -> None:
    models = [network(torch.float32), network(torch.float32)]
    optimizers = [MAKES["SOAA"](m, c) for m, c in zip(models, (False, True), strict=True)]
    for m, o in zip(models, optimizers, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for t in range(8):
            g = torch.Generator().manual_seed(t)
            o.zero_grad()
            o.backward(m(torch.randn(16, 40, generator=g)).square().mean(), scaler=scaler)
            if t == 4:
                next(m.parameters()).grad[0, 0] = float("inf")
            scaler.step(o)
            scaler.update()
    torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-4, atol=1e-6)
    assert optimizers[1].step_info.as_floats()["skipped_steps"] == 1.0


@pytest.mark.usefixtures("passes")
def test_bfloat16_parameters_keep_float32_state() -> None:
    models = [network(torch.bfloat16), network(torch.bfloat16)]
    optimizers = [MAKES["SOAA"](m, c) for m, c in zip(models, (False, True), strict=True)]
    for m, o in zip(models, optimizers, strict=True):
        train(m, o, 2, look=False)
        assert all(o.state[p]["momentum"].dtype == torch.float32 for p in m.parameters())
    torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=2e-2, atol=2e-2)


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def gradients(model: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("name", ["SOAA", "AdamW", "SOAA, tensor lr"])
def test_an_ordinary_step_reads_nothing_back(name: str) -> None:
    model = network()
    optimizer = MAKES[name](model, True)
    loss = torch.tensor(1.0)
    for t in range(2):
        gradients(model, t)
        optimizer.step(loss=loss)
    assert (
        optimizer.step_info.radius is not None
    )  # compiled here: the counter's mode would have it compiled anew
    with HostReads() as reads:
        optimizer.step(loss=loss)
    assert reads.count == 0
    with HostReads() as reads:
        float(optimizer.step_info.radius)
    assert reads.count == 1  # the counter counts


@pytest.mark.usefixtures("traced")
def test_no_graph_break_and_no_recompilation_over_200_steps_of_one_cycle() -> None:
    model = network()
    optimizer = MAKES["SOAA"](model, True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=201, base_momentum=0.85, max_momentum=0.95
    )
    gradients(model, 0)
    optimizer.step(loss=torch.tensor(1.0))
    before = dict(torch._dynamo.utils.counters["stats"])
    moved = set()
    for t in range(200):
        optimizer.step(loss=torch.tensor(1.0 - 0.001 * t))
        schedule.step()
        moved.add((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    assert len(moved) > 100
    assert dict(torch._dynamo.utils.counters["stats"]) == before
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("traced")
def test_two_graphs_whatever_the_number_of_tensors_and_their_shapes() -> None:
    kind = kernels.Kind(torch.device("cpu"), torch.float32, torch.float32, torch.float32)
    kernels.kernels_of(kind).prepare("observe", "move_")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for shapes in ([(3,)], [(300, 70), (5,)], [(20_000 + 7 * i,) for i in range(11)]):
        params = [nn.Parameter(torch.randn(s)) for s in shapes]
        optimizer = SOAA(params, compile=True)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step(loss=torch.tensor(1.0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    fresh = kernels.Kernels(kind)
    fresh.prepare("observe", "move_")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 2


@pytest.mark.parametrize(
    "shapes", [[(3,)], [(WIDTH * 20,)], [(WIDTH * 20 + 1,), (7, 5), (SMALLEST_LEAF,), ()]]
)
def test_leaves_cover_every_element_once(shapes: list[tuple[int, ...]]) -> None:
    tensors = [torch.arange(float(torch.Size(s).numel())).reshape(s) + 1.0 for s in shapes]
    wanted = [x.double().sum().item() for x in tensors]
    layout = Layout.of([i % 2 for i in range(len(shapes))], tensors)
    pools = layout.pools(torch.float32, torch.device("cpu"))
    for pool, pieces in zip(pools, layout.rests(tensors), strict=True):
        pool.gather(pieces)
    leaves = [*layout.views(tensors), *(pool.rows for pool in pools)]
    assert all(x.shape[0] >= 2 and x.shape[1] == WIDTH for x in leaves)
    found = [0.0, 0.0]
    for kind, x in zip(layout.classes, leaves, strict=True):
        found[kind] += x.double().sum().item()
        x.mul_(2.0)
    assert found == [sum(wanted[::2]), sum(wanted[1::2])]
    for pool, pieces in zip(pools, layout.rests(tensors), strict=True):
        pool.scatter(pieces)
    assert [x.double().sum().item() for x in tensors] == [2.0 * w for w in wanted]


@pytest.mark.usefixtures("traced")
def test_the_compiler_failing_is_said_once_and_the_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no compiler here")

    model, plain = network(), network()
    optimizer, reference = MAKES["SOAA"](model, "auto"), MAKES["SOAA"](plain, False)
    monkeypatch.setattr(kernels.Kernels, "prepare", broken)
    # "auto" compiles on an accelerator; here it is made to believe that there is one
    monkeypatch.setattr(StepPaths, "wants_compiled", lambda self, held: self.compiles is not False)
    with pytest.warns(UserWarning, match="no compiler here"):
        train(model, optimizer, 1)
    train(model, optimizer, 4, first=1)
    train(plain, reference, 5)
    # the step in which it failed was the general one
    torch.testing.assert_close(vector(model), vector(plain), rtol=1e-11, atol=1e-13)
    optimizer = MAKES["SOAA"](model, True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="no compiler here"):
        train(model, optimizer, 1)


def test_compile_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="compile must be"):
        SOAA(network().parameters(), compile="always")


SEVERAL = [(300, 70), (5,), (), (20_011,), (0, 3), (1 << 15,)]


@pytest.mark.parametrize("kind", [(torch.float32, None), (torch.bfloat16, None), (torch.float64, None)])
def test_native_passes_equal_the_traced_ones_in_every_precision(
    kind: tuple[torch.dtype, None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = kind[0]
    found = []
    for serves in (lambda k: True, lambda k: False):
        monkeypatch.setattr(elementwise_path, "serves", serves)
        g = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in SEVERAL]
        optimizer = SOAA(params, lr=1e-2, total_steps=9, weight_decay=0.1, compile=True)
        for t in range(6):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g).to(dtype)
            optimizer.step(loss=torch.tensor(5.0 - t))
        found.append(torch.cat([p.detach().flatten() for p in params]))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-11}[dtype]
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def test_the_number_of_threads_changes_no_bit() -> None:
    found = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            g = torch.Generator().manual_seed(0)
            params = [nn.Parameter(torch.randn(s, generator=g)) for s in SEVERAL]
            optimizer = SOAA(params, lr=1e-2, compile=True)
            for t in range(4):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=g)
                optimizer.step(loss=torch.tensor(5.0 - t))
            found.append(torch.cat([p.detach().flatten() for p in params]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_native_step_is_seen_by_autograd() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = SOAA([p], compile=True)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step(loss=loss.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_a_native_compiler_the_traced_passes_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/no-compiler")
    native_library.library.cache_clear()
    try:
        kind = kernels.Kind(torch.device("cpu"), torch.float32, torch.float32, torch.float32)
        assert not native.serves(kind)
    finally:
        monkeypatch.undo()
        native_library.library.cache_clear()
    assert native.serves(kind)


def test_a_cache_that_cannot_be_written_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SOAA_CACHE", str(blocked / "below"))
    native_library.library.cache_clear()
    try:
        assert native_library.library() is not None
    finally:
        monkeypatch.undo()
        native_library.library.cache_clear()


def test_the_lagged_scale_is_that_of_the_step_before() -> None:
    """The equations once more: (1+s) of step t-1, and 2 in the first step."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = SOAA([p], lr=0.1, fisher_scale="lagged", total_steps=10)
    theta, m, v = p.detach().clone(), torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    scale = 2.0
    for t in range(1, 6):
        g = torch.tensor([0.3, -0.2, 0.01], dtype=torch.float64) * t
        p.grad = g.clone()
        d = float(optimizer._region_state["radius"])
        optimizer.step(loss=torch.tensor(1.0 / t, dtype=torch.float64))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        mean, moment = m / (1 - 0.9**t), v / (1 - 0.999**t)
        theta = theta - 0.1 * d * mean / (torch.maximum(d * scale * moment, moment.sqrt()) + 1e-8)
        scale = float(1.0 + (mean @ mean) / (moment + 1e-8).sum())
        torch.testing.assert_close(p.detach(), theta, rtol=1e-11, atol=1e-13)
