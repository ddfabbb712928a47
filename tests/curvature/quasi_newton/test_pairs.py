"""L-SR1 and L-BFGS against the dense recursions, the compact representations and the secant equation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from curvature import LBFGS, LSR1, Observation, SingularCurvatureError
from curvature.limited_memory import LimitedMemory
from curvature.vectors import flatten, unflatten
from tests.curvature import dense
from tests.curvature.spectrum import matrices

SHAPES = [(2, 3), (9,)]
SIZE = 15


def like() -> list[Tensor]:
    return [torch.zeros(s, dtype=torch.float64) for s in SHAPES]


def nonquadratic(x: Tensor) -> Tensor:
    """The gradient of ½ xᵀHx + Σ cos(2 x_i) with an indefinite H."""
    return matrices.indefinite(SIZE) @ x - 2 * torch.sin(2 * x)


def walk(count: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """(step, gradient after it); the first step is 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZE, generator=g, dtype=torch.float64)
    yield torch.zeros_like(x), nonquadratic(x)
    for _ in range(count):
        s = 0.3 * torch.randn(SIZE, generator=g, dtype=torch.float64)
        x = x + s
        yield s, nonquadratic(x)


def feed(
    estimator: LimitedMemory, pairs: Iterator[tuple[Tensor, Tensor]]
) -> tuple[dict, list[tuple[Tensor, Tensor]]]:
    """The state after the walk, and all its pairs (s, y)."""
    state = estimator.init(like())
    previous: Tensor | None = None
    seen = []
    for s, g in pairs:
        estimator.update(state, Observation(unflatten(g, like()), step_change=unflatten(s, like())))
        if previous is not None:
            seen.append((s, g - previous))
        previous = g
    return state, seen


def sr1_recursion(pairs: list[tuple[Tensor, Tensor]], gamma: float) -> Tensor:
    B = gamma * torch.eye(SIZE, dtype=torch.float64)
    for s, y in pairs:
        v = y - B @ s
        if abs(v @ s) >= 1e-8 * v.norm() * s.norm():
            B = B + torch.outer(v, v) / (v @ s)
    return B


def bfgs_recursion(pairs: list[tuple[Tensor, Tensor]], gamma: float, powell: bool = False) -> Tensor:
    B = gamma * torch.eye(SIZE, dtype=torch.float64)
    for s, y in pairs:
        Bs = B @ s
        if powell and s @ y < 0.2 * (s @ Bs):  # Nocedal & Wright, procedure 18.2
            theta = 0.8 * (s @ Bs) / (s @ Bs - s @ y)
            y = theta * y + (1 - theta) * Bs
        B = B - torch.outer(Bs, Bs) / (s @ Bs) + torch.outer(y, y) / (s @ y)
    return B


def compact_sr1(pairs: list[tuple[Tensor, Tensor]], gamma: float) -> Tensor:
    """Byrd, Nocedal & Schnabel 1994, theorem 5.1."""
    S, Y = (torch.stack(t, 1) for t in zip(*pairs, strict=True))
    SY = S.T @ Y
    L, D = SY.tril(-1), torch.diag(SY.diagonal())
    W = Y - gamma * S
    return gamma * torch.eye(SIZE, dtype=S.dtype) + W @ torch.linalg.inv(D + L + L.T - gamma * S.T @ S) @ W.T


def compact_bfgs(pairs: list[tuple[Tensor, Tensor]], gamma: float) -> Tensor:
    """Byrd, Nocedal & Schnabel 1994, theorem 2.3."""
    S, Y = (torch.stack(t, 1) for t in zip(*pairs, strict=True))
    SY = S.T @ Y
    L, D = SY.tril(-1), torch.diag(SY.diagonal())
    W = torch.cat([gamma * S, Y], 1)
    M = torch.cat([torch.cat([gamma * S.T @ S, L], 1), torch.cat([L.T, -D], 1)])
    return gamma * torch.eye(SIZE, dtype=S.dtype) - W @ torch.linalg.inv(M) @ W.T


def positive(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(s, y) for s, y in pairs if s @ y > 1e-8 * s.norm() * y.norm()]


@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_lsr1_equals_recursion_and_compact_form_of_its_last_pairs(count: int) -> None:
    state, pairs = feed(LSR1(history=4, initial_curvature=0.7), walk(count))
    B = LSR1(history=4, initial_curvature=0.7).operator(state).to_dense()
    assert dense.relative_error(B, sr1_recursion(pairs[-4:], 0.7)) < 1e-9
    assert dense.relative_error(B, compact_sr1(pairs[-4:], 0.7)) < 1e-7
    if count >= 4:
        assert torch.linalg.eigvalsh(B)[0] < -0.1  # the premise: indefinite


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_lbfgs_equals_recursion_and_compact_form_of_its_last_pairs(count: int) -> None:
    estimator = LBFGS(history=4, initial_curvature=0.7)
    state, pairs = feed(estimator, walk(count, seed=2))
    kept = positive(pairs)[-4:]
    if count == 20:
        assert len(positive(pairs)) < 20  # the premise: some are skipped
    B = estimator.operator(state).to_dense()
    assert dense.relative_error(B, bfgs_recursion(kept, 0.7)) < 1e-9
    if kept:
        assert dense.relative_error(B, compact_bfgs(kept, 0.7)) < 1e-8
    assert torch.linalg.eigvalsh(B)[0] > 0


def test_powell_safeguard_takes_every_pair_and_stays_positive_definite() -> None:
    estimator = LBFGS(history=4, initial_curvature=0.7, safeguard="powell")
    state, pairs = feed(estimator, walk(20, seed=2))
    B = estimator.operator(state).to_dense()
    assert any(s @ y <= 0 for s, y in pairs[-4:])  # the premise
    assert dense.relative_error(B, bfgs_recursion(pairs[-4:], 0.7, powell=True)) < 1e-9
    assert torch.linalg.eigvalsh(B)[0] > 0


@pytest.mark.parametrize("make", [LSR1, LBFGS])
def test_newest_pair_satisfies_the_secant_equation(make: type[LimitedMemory]) -> None:
    estimator = make(history=4)
    state, pairs = feed(estimator, walk(9, seed=2))
    s, y = (pairs if make is LSR1 else positive(pairs))[-1]
    Bs = flatten(estimator.operator(state).matvec(unflatten(s, like())))
    assert dense.relative_error(Bs, y) < 1e-9


def test_lsr1_recovers_an_indefinite_quadratic() -> None:
    H = matrices.indefinite(SIZE)
    g = torch.Generator().manual_seed(3)
    steps = [torch.zeros(SIZE, dtype=torch.float64)]
    steps += [torch.randn(SIZE, generator=g, dtype=torch.float64) for _ in range(SIZE)]
    x = torch.zeros(SIZE, dtype=torch.float64)
    estimator = LSR1(history=SIZE, initial_curvature=1.0)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal x
        for s in steps:
            x = x + s
            yield s, H @ x

    state, _ = feed(estimator, pairs())
    assert dense.relative_error(estimator.operator(state).to_dense(), H) < 1e-7


def test_scaled_initial_curvature_is_that_of_the_newest_positive_pair() -> None:
    for estimator in (LSR1(history=3), LBFGS(history=3)):
        state, pairs = feed(estimator, walk(8, seed=2))
        kept = pairs[-3:] if isinstance(estimator, LSR1) else positive(pairs)[-3:]
        s, y = positive(kept)[-1]
        assert abs(estimator.operator(state).shift - (y @ y) / (s @ y)) < 1e-9


@pytest.mark.parametrize("make", [LSR1, LBFGS])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_solve_and_diagonal_are_those_of_the_dense_matrix(make: type[LimitedMemory], damping: float) -> None:
    estimator = make(history=5)
    state, _ = feed(estimator, walk(9, seed=4))
    B = estimator.operator(state)
    D = B.to_dense()
    v = torch.randn(SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = torch.linalg.solve(D + damping * torch.eye(SIZE, dtype=torch.float64), v)
    assert dense.relative_error(flatten(B.solve(unflatten(v, like()), damping)), expected) < 1e-9
    assert dense.relative_error(flatten(B.diagonal()), D.diagonal()) < 1e-12
    assert dense.relative_error(flatten(B.matvec(unflatten(v, like()))), D @ v) < 1e-12


def test_indefinite_lsr1_shifted_onto_an_eigenvalue_is_refused() -> None:
    estimator = LSR1(history=5)
    state, _ = feed(estimator, walk(9, seed=4))
    B = estimator.operator(state)
    smallest = torch.linalg.eigvalsh(B.to_dense())[0]
    assert smallest < 0
    with pytest.raises(SingularCurvatureError):
        B.solve(like(), -float((B.change + B.shift).min()))


@pytest.mark.parametrize("make", [LSR1, LBFGS])
def test_rejected_step_and_nan_teach_nothing(make: type[LimitedMemory]) -> None:
    estimator = make(history=4)
    state, _ = feed(estimator, walk(5, seed=4))
    before = estimator.operator(state).to_dense()
    _, g = list(walk(6, seed=4))[-1]
    zero = like()
    estimator.update(state, Observation(unflatten(g, like()), step_change=zero))
    assert torch.equal(estimator.operator(state).to_dense(), before)
    bad = [torch.full_like(x, float("nan")) for x in zero]
    estimator.accepts(state, bad, bad)
    estimator.insert(state, bad, bad, estimator.accepts(state, bad, bad))
    assert torch.equal(estimator.operator(state).to_dense(), before)


@pytest.mark.parametrize("make", [LSR1, LBFGS])
def test_without_a_pair_it_is_the_identity(make: type[LimitedMemory]) -> None:
    estimator = make(history=4)
    assert torch.equal(
        estimator.operator(estimator.init(like())).to_dense(), torch.eye(SIZE, dtype=torch.float64)
    )


@pytest.mark.parametrize("make", [LSR1, LBFGS])
def test_float32_keeps_to_the_float64_recursion(make: type[LimitedMemory]) -> None:
    estimator = make(history=4)
    wide, _ = feed(estimator, walk(8, seed=2))
    state = estimator.init([x.float() for x in like()])
    for s, g in walk(8, seed=2):
        seen = Observation(
            [x.float() for x in unflatten(g, like())], step_change=[x.float() for x in unflatten(s, like())]
        )
        estimator.update(state, seen)
    narrow = estimator.operator(state).to_dense()
    assert narrow.dtype == torch.float32
    assert dense.relative_error(narrow.double(), estimator.operator(wide).to_dense()) < 1e-3


@pytest.mark.parametrize("make", [LSR1, LBFGS])
def test_missing_step_names_the_remedy(make: type[LimitedMemory]) -> None:
    estimator = make(history=4)
    state = estimator.init(like())
    estimator.update(state, Observation(like()))
    with pytest.raises(RuntimeError, match=r"step_change"):
        estimator.update(state, Observation(like()))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (LSR1, {"history": 0}, "history must be >= 1"),
        (LBFGS, {"history": -1}, "history must be >= 1"),
        (LSR1, {"initial_curvature": 0.0}, "initial_curvature must be > 0"),
        (LBFGS, {"initial_curvature": "auto"}, "initial_curvature must be 'scaled'"),
        (LSR1, {"skip_below": 1.0}, "skip_below must be in"),
        (LBFGS, {"skip_below": -1.0}, "skip_below must be in"),
        (LBFGS, {"safeguard": "none"}, "safeguard must be 'skip' or 'powell'"),
    ],
)
def test_bad_arguments_are_refused(
    make: type[LimitedMemory], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)  # type: ignore[arg-type]
