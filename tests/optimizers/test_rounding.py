"""State in bfloat16: half the bytes, unbiased, the same by every way of a step and after a checkpoint."""

from __future__ import annotations

import copy
import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import curvature
from optimizers import SOAA, AdamW, SecondOrder, Tadam
from optimizers.compiled import graph_path
from optimizers.rounding import NARROW, key_of, rounded

SHAPES = [(40, 30), (700,), (), (5, 3)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in SHAPES]


def step(optimizer: SecondOrder, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
    optimizer.step(loss=torch.tensor(5.0 - 0.1 * seed))


def vector(optimizer: SecondOrder) -> Tensor:
    return torch.cat([p.detach().float().flatten() for g in optimizer.param_groups for p in g["params"]])


def test_rounding_is_to_a_neighbour_and_unbiased() -> None:
    n, seed = 400_000, 3
    x = torch.rand(n, generator=torch.Generator().manual_seed(1)) * 4.0 - 2.0
    low = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    high = ((x.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    for entry in (0, 1, 2):
        found = rounded(x, key_of(seed, torch.tensor(7.0)), 2, entry).float()
        assert bool(((found == low) | (found == high)).all())
        # of n independent errors with mean 0 the standardised sum is within 5 with probability 1 - 6e-7
        variance = ((x - low) * (high - x)).double().abs()
        assert abs(float((found - x).double().sum() / variance.sum().sqrt())) < 5.0


@pytest.mark.parametrize("part", [0.125, 0.5, 0.875])
def test_the_part_that_is_cut_off_is_the_probability_of_rounding_up(part: float) -> None:
    n = 200_000
    for entry in (0, 1):
        up = rounded(torch.full((n,), 1.0 + part * 2.0**-7), torch.tensor(11), 0, entry).float() > 1.0
        # binomial(n, part): 5 standard deviations
        assert abs(float(up.double().mean()) - part) < 5.0 * (part * (1.0 - part) / n) ** 0.5


def test_draws_of_steps_tensors_entries_and_seeds_are_unrelated() -> None:
    n = 100_000
    x = torch.full((n,), 1.0 + 2.0**-8)  # half way
    draws = [
        rounded(x, key_of(seed, torch.tensor(t)), k, entry).float() > 1.0
        for seed, t, k, entry in (
            (0, 1.0, 0, 0),
            (0, 1.0, 0, 1),
            (0, 2.0, 0, 0),
            (0, 1.0, 1, 0),
            (1, 1.0, 0, 0),
        )
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            # agreement is binomial(n, ½): 5 standard deviations
            assert abs(float((a == b).double().mean()) - 0.5) < 5.0 * 0.5 / n**0.5


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    found = rounded(x, torch.tensor(1), 0, 0).float()
    assert torch.equal(found[[0, 1, 3]], x[[0, 1, 3]])
    assert bool(found[2].isnan())


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_bytes_of_state(compiles: bool, dtype: torch.dtype | None) -> None:
    params = parameters()
    optimizer = SOAA(params, state_dtype=dtype, compile=compiles)
    for t in range(3):
        step(optimizer, t)
    size = sum(p.numel() for p in params)
    scalars = 4 * (2 * len(params) + 6)
    assert optimizer.state_bytes() <= (8 if dtype is None else 4) * size + scalars + 8
    for p in params:
        wanted = torch.float32 if dtype is None else dtype
        assert optimizer.state[p]["momentum"].dtype == wanted
        assert optimizer.state[p]["curvature/second_moment"].dtype == wanted
        assert optimizer.state[p]["curvature/count"].dtype == torch.float32


def test_a_slow_running_mean_arrives_where_rounding_to_the_nearest_stops() -> None:
    p = nn.Parameter(torch.zeros(5_000))
    optimizer = SOAA([p], lr=0.0, betas=(0.9, 0.999), state_dtype=NARROW, compile=True)
    nearest = torch.zeros(1, dtype=NARROW)
    for _ in range(500):
        p.grad = torch.ones_like(p)
        optimizer.step(loss=torch.tensor(1.0))
        nearest = (nearest.float() * 0.999 + 0.001).to(NARROW)
    wanted = 1.0 - 0.999**500
    found = float(optimizer.state[p]["curvature/second_moment"].double().mean())
    assert abs(found - wanted) < 0.005 * wanted
    assert abs(float(nearest) - wanted) > 0.05 * wanted


def close(a: Tensor, b: Tensor) -> float:
    """The fraction of elements that differ: at a threshold two computations may round to two neighbours."""
    return float((a.float() != b.float()).double().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_and_general_step_draw_the_same_numbers(dtype: torch.dtype) -> None:
    made = [SOAA(parameters(dtype), lr=1e-2, state_dtype=NARROW, compile=c) for c in (False, True)]
    for o in made:
        step(o, 0)
    for name in ("momentum", "curvature/second_moment"):
        states = [[o.state[p][name] for p in o.param_groups[0]["params"]] for o in made]
        for x, y in zip(*states, strict=True):
            assert close(x, y) < 0.005
    for t in range(1, 10):
        for o in made:
            step(o, t)
    torch.testing.assert_close(vector(made[1]), vector(made[0]), rtol=2e-2, atol=2e-2)
    assert made[1]._paths._path is not None


def test_so_does_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_path, "BACKEND", "aot_eager")
    made = [Tadam(parameters(), lr=1e-2, state_dtype=NARROW, compile=c) for c in (False, True)]
    for t in range(6):
        for o in made:
            step(o, t)
    assert made[1]._paths._graph is not None
    assert made[1].state[made[1].param_groups[0]["params"][0]]["curvature/variance"].dtype == NARROW
    torch.testing.assert_close(vector(made[1]), vector(made[0]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("compiles", [False, True])
def test_goes_on_bit_for_bit_from_a_checkpoint(compiles: bool) -> None:
    optimizer = SOAA(parameters(), lr=1e-2, state_dtype=NARROW, rounding_seed=4, compile=compiles)
    for t in range(5):
        step(optimizer, t)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = SOAA(
        [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]],
        lr=1e-2,
        state_dtype=NARROW,
        rounding_seed=4,
        compile=compiles,
    )
    again.load_state_dict(torch.load(file, weights_only=True))
    other = copy.deepcopy(optimizer)
    for t in range(5, 9):
        for o in (optimizer, again, other):
            step(o, t)
    first = again.param_groups[0]["params"][0]
    assert again.state[first]["momentum"].dtype == NARROW
    assert torch.equal(vector(optimizer), vector(again))
    assert torch.equal(vector(optimizer), vector(other))


def test_another_seed_draws_other_numbers() -> None:
    made = [SOAA(parameters(), lr=1e-2, state_dtype=NARROW, rounding_seed=s) for s in (0, 1)]
    for o in made:
        step(o, 0)
        step(o, 1)
    assert not torch.equal(vector(made[0]), vector(made[1]))


def test_a_momentum_that_a_schedule_raises_from_zero_is_kept_narrow() -> None:
    optimizer = SOAA(parameters(), betas=(0.0, 0.99), state_dtype=NARROW)
    step(optimizer, 0)
    optimizer.param_groups[0]["momentum"] = 0.9
    step(optimizer, 1)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum"].dtype == NARROW


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": torch.float16}, "state_dtype must be None"),
        ({"state_dtype": NARROW, "curvature": curvature.HutchinsonDiagonal()}, "whose signals are gradients"),
        ({"state_dtype": NARROW, "curvature": curvature.LBFGS()}, "whose signals are gradients"),
    ],
)
def test_what_cannot_be_kept_narrow_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SecondOrder(parameters(), **options)


class Peak(TorchDispatchMode):
    """The most bytes that live tensors made inside took at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(x, Tensor) and "out" not in (kwargs or {}) and not func._schema.is_mutable:
                self.live[id(x)] = (
                    weakref.ref(x),
                    x.untyped_storage().data_ptr(),
                    x.untyped_storage().nbytes(),
                )
        self.live = {k: v for k, v in self.live.items() if v[0]() is not None}
        held = {pointer: size for _, pointer, size in self.live.values()}
        for x in [*args, *(kwargs or {}).values()]:  # views of what was there before
            for y in x if isinstance(x, (list, tuple)) else [x]:
                if isinstance(y, Tensor) and y.untyped_storage().data_ptr() in self.known:
                    held.pop(y.untyped_storage().data_ptr(), None)
        held = {k: v for k, v in held.items() if k not in self.known}
        self.peak = max(self.peak, sum(held.values()))
        return found

    known: frozenset[int] = frozenset()


@pytest.mark.parametrize("make", [SOAA, AdamW])
@pytest.mark.parametrize(("compiles", "dtype"), [(False, None), (True, None), (True, torch.bfloat16)])
def test_a_step_takes_little_memory_beside_the_state(
    make: Any, compiles: bool, dtype: torch.dtype | None
) -> None:
    params = [nn.Parameter(torch.zeros(n)) for n in (6_000_000, 1_000_000, 300)]
    optimizer = make(params, state_dtype=dtype, compile=compiles)
    for t in range(2):
        step(optimizer, t)
    tensors = [*params, *(p.grad for p in params), *(x for s in optimizer.state.values() for x in s.values())]
    with Peak() as peak:
        peak.known = frozenset(x.untyped_storage().data_ptr() for x in tensors)
        optimizer.step(loss=torch.tensor(1.0))
    assert peak.peak <= 0.05 * sum(p.numel() * p.element_size() for p in params)


def test_the_memory_of_a_step_is_seen() -> None:
    x = torch.zeros(1000)
    with Peak() as peak:
        peak.known = frozenset([x.untyped_storage().data_ptr()])
        y = x + 1.0
        y = y + x
        del y
    assert 8000 <= peak.peak < 12_000
