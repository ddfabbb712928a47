"""Every registered estimator keeps every law, by the public check; and the check sees broken estimators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from curvature import EmpiricalFisherDiagonal, HutchinsonDiagonal, LossGraph, Needs, Observation, testing
from curvature.operators import DiagonalOperator
from curvature.protocols import State
from curvature.registry import estimators

OPTIONS: dict[str, dict[str, Any]] = {
    "fisher": {"likelihood": "categorical"},
    "fisher-diagonal": {"likelihood": "categorical"},
    "empirical-fisher": {"likelihood": "categorical"},
    "low-rank": {"rank": 31},
}
SEMIDEFINITE = {
    "adahessian-diagonal",
    "ekfac",
    "empirical-fisher",
    "empirical-fisher-diagonal",
    "fisher",
    "fisher-diagonal",
    "gauss-newton",
    "gauss-newton-diagonal",
    "gradient-variance",
    "identity",
    "kfac",
    "per-parameter",
    "shampoo",
    "soap",
}
#: Labels are drawn batch by batch, so that another split draws others.
SAMPLED = {"fisher", "fisher-diagonal"}


@pytest.mark.parametrize("law", testing.LAWS)
@pytest.mark.parametrize("name", estimators.names())
def test_registered_estimator_keeps_the_law(name: str, law: str) -> None:
    testing.check_estimator(
        estimators[name],
        options=OPTIONS.get(name),
        semidefinite=name in SEMIDEFINITE,
        splits=name not in SAMPLED,
        only=[law],
    )


def test_per_sample_empirical_fisher_keeps_all_laws() -> None:
    options = {"samples": "per_sample", "likelihood": "categorical"}
    testing.check_estimator(EmpiricalFisherDiagonal, options=options, semidefinite=True)


# -- the check sees what is broken ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Good(EmpiricalFisherDiagonal):
    pass


class Scaled(DiagonalOperator):
    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [2 * x for x in super().matvec(v)]


class Crooked(DiagonalOperator):
    def to_dense(self) -> Tensor:
        dense = super().to_dense()
        dense[0, 1] += dense.abs().max()
        return dense


class Undamped(DiagonalOperator):
    def solve(self, v: Sequence[Tensor], damping: float | Tensor = 0.0) -> list[Tensor]:
        return super().solve(v, 2 * damping)


class Lenient(DiagonalOperator):
    def check_vector(self, v: Sequence[Tensor]) -> None:
        pass

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [torch.zeros(1)]


def giving(operator: type[DiagonalOperator]) -> type[Good]:
    @dataclass(frozen=True)
    class Broken(Good):
        def operator(self, state: State) -> DiagonalOperator:
            return operator(super().operator(state).diagonal())

    return Broken


@dataclass(frozen=True)
class Negative(Good):
    def operator(self, state: State) -> DiagonalOperator:
        return DiagonalOperator([-h for h in super().operator(state).diagonal()])


@dataclass
class Thawed:
    inner: Good = dataclasses.field(default_factory=Good)
    needs = Good().needs

    def init(self, params: Sequence[Tensor]) -> State:
        return self.inner.init(params)

    def update(self, state: State, seen: Observation) -> None:
        self.inner.update(state, seen)

    def operator(self, state: State) -> DiagonalOperator:
        return self.inner.operator(state)


@dataclass(frozen=True)
class WithObject(Good):
    def init(self, params: Sequence[Tensor]) -> State:
        return super().init(params) | {"names": "abc"}


@dataclass(frozen=True)
class Noisy(Good):
    def operator(self, state: State) -> DiagonalOperator:
        return DiagonalOperator([h + torch.rand_like(h) for h in super().operator(state).diagonal()])


@dataclass(frozen=True)
class Uncorrected(Good):
    def update(self, state: State, seen: Observation) -> None:
        super().update(state, seen)
        for h in state["second_moment"]:  # type: ignore[union-attr]
            h.mul_(0.5)

    def estimate(self, problem: Any) -> DiagonalOperator:
        return Good().estimate(problem)  # type: ignore[return-value]


@dataclass(frozen=True)
class Restless(Good):
    def update(self, state: State, seen: Observation) -> None:
        super().update(state, seen)
        for h in state["second_moment"]:  # type: ignore[union-attr]
            h.mul_(0.5)


@dataclass(frozen=True)
class Alive(Good):
    def operator(self, state: State) -> DiagonalOperator:
        return Live(super().operator(state).diagonal(), self.seen)

    @property
    def seen(self) -> list[Tensor]:
        return SEEN

    def update(self, state: State, seen: Observation) -> None:
        SEEN[:] = seen.parameters
        super().update(state, seen)


class Live(DiagonalOperator):
    def __init__(self, values: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        super().__init__(values)
        self.params = params

    def to_dense(self) -> Tensor:
        return torch.diag(
            torch.cat([(h * p.detach()).reshape(-1) for h, p in zip(self.values, self.params, strict=True)])
        )


SEEN: list[Tensor] = []


@dataclass(frozen=True)
class BatchwiseSquares(Good):
    """The mean of the batches' squares in place of the square of the mean."""

    def estimate(self, problem: Any) -> DiagonalOperator:
        total: list[Tensor] | None = None
        for share, graph in problem.graphs():
            part = [share * g**2 for g in graph.gradient()]
            total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
        assert total is not None
        return DiagonalOperator(total)


@dataclass(frozen=True)
class Forgetful(Good):
    """A counter outside of the state."""

    calls: list[int] = dataclasses.field(default_factory=list, compare=False)

    def update(self, state: State, seen: Observation) -> None:
        self.calls.append(1)
        scaled = [None if g is None else g * len(self.calls) for g in seen.gradient]
        super().update(state, dataclasses.replace(seen, gradient=scaled))


@dataclass(frozen=True)
class StoredOrder(Good):
    """Reads elements in the order of memory."""

    def update(self, state: State, seen: Observation) -> None:
        gradient = []
        for g, p in zip(seen.gradient, seen.parameters, strict=True):
            assert g is not None
            gradient.append(g if p.is_contiguous() else g.T.reshape(g.shape))
        super().update(state, dataclasses.replace(seen, gradient=gradient))


@dataclass(frozen=True)
class WritesGrad(Good):
    def update(self, state: State, seen: Observation) -> None:
        for p in seen.parameters:
            if p.grad is not None:
                p.grad.zero_()
        super().update(state, seen)


@dataclass(frozen=True)
class Hoarding(Good):
    """Remembers every gradient in the state."""

    def update(self, state: State, seen: Observation) -> None:
        super().update(state, seen)
        state[f"seen {len(state)}"] = torch.stack([g.sum() for g in seen.gradient if g is not None])


@dataclass(frozen=True)
class HoardingOutside(Good):
    """Remembers every gradient outside of the state."""

    seen: list[Tensor] = dataclasses.field(default_factory=list, compare=False)

    def update(self, state: State, seen: Observation) -> None:
        super().update(state, seen)
        self.seen.extend(g.clone() for g in seen.gradient if g is not None)


@dataclass(frozen=True)
class Clinging(Good):
    """Holds on to the graph of the last loss."""

    held: list[Any] = dataclasses.field(default_factory=list, compare=False)

    @property
    def needs(self) -> Needs:
        return Needs.GRAD | Needs.HVP

    def measure(self, state: State, graph: LossGraph) -> dict[str, Any]:
        self.held[:] = [graph]
        return {}


@dataclass(frozen=True)
class LeavesHooks(Good):
    def estimate(self, problem: Any) -> DiagonalOperator:
        problem.model.register_forward_hook(lambda module, args, output: None)
        return Good().estimate(problem)  # type: ignore[return-value]


@dataclass(frozen=True)
class Lopsided(Good):
    """Names a statistic symmetric that is not."""

    @property
    def needs(self) -> Needs:
        return Needs.GRAD | Needs.HVP

    @property
    def symmetric_statistics(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("S",)

    def measure(self, state: State, graph: LossGraph) -> dict[str, Any]:
        return {"S": [torch.arange(4.0).reshape(1, 2, 2) for _ in graph.params]}


BROKEN: dict[str, tuple[Callable[..., Any], str]] = {
    "matvec scaled": (giving(Scaled), "matvec"),
    "not symmetric": (giving(Crooked), "matvec"),
    "solves with another damping": (giving(Undamped), "solve"),
    "takes any vector": (giving(Lenient), "vectors"),
    "negative": (Negative, "semidefinite"),
    "not frozen": (Thawed, "contract"),
    "an object in the state": (WithObject, "state"),
    "global random numbers": (Noisy, "side effects"),
    "not repeatable": (Noisy, "repeats"),
    "no bias correction": (Uncorrected, "first update"),
    "state moves without a gradient": (Restless, "none"),
    "follows the parameters": (Alive, "stays"),
    "squares batch by batch": (BatchwiseSquares, "splits"),
    "a counter outside of the state": (Forgetful, "saving"),
    "reads memory order": (StoredOrder, "layouts"),
    "writes .grad": (WritesGrad, "side effects"),
    "leaves hooks": (LeavesHooks, "side effects"),
    "a state that grows": (Hoarding, "memory"),
    "memory outside of the state": (HoardingOutside, "memory"),
    "holds a graph": (Clinging, "graph"),
    "half of a matrix that is not symmetric": (Lopsided, "statistics"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_check_sees(what: str) -> None:
    factory, law = BROKEN[what]
    with pytest.raises(AssertionError, match=f"^{law}: "):
        testing.check_estimator(factory, semidefinite=True, only=[law])


def test_every_law_is_seen_broken_and_a_good_estimator_passes() -> None:
    testing.check_estimator(Good, semidefinite=True)
    assert {law for _, law in BROKEN.values()} | {"diagonal"} == set(testing.LAWS)


def test_a_wrong_diagonal_is_seen() -> None:
    class Wrong(DiagonalOperator):
        def diagonal(self) -> list[Tensor]:
            return [h + 1 for h in self.values]

    with pytest.raises(AssertionError, match=r"^diagonal: "):
        testing.check_estimator(giving(Wrong), only=["diagonal"])


def test_unknown_laws_are_refused() -> None:
    with pytest.raises(ValueError, match="laws"):
        testing.check_estimator(HutchinsonDiagonal, only=["symmetry"])
