"""k micro-batches equal one large batch for every registered estimator, even or not, drawn labels included."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from curvature import TRANSIENT, FisherDiagonal, LossGraph, Observation
from curvature.estimate import add_statistics, estimate
from curvature.protocols import Statistics
from curvature.registry import estimators
from optimizers import SecondOrder, available
from optimizers.build import takes_model
from trust_region import FixedRadius, RmsBox, TrustRegion

#: A factor of low rank has no one eigenbasis: rounding chooses it in the null space. Square layers leave at most one
#: dimension, whose axis is unique.
SQUARE = {"soap"}
OPTIONS = {
    "empirical-fisher": {"likelihood": "categorical"},
    "low-rank": {"rank": 3},
    "kfac": {"fisher": "type-2"},
    "ekfac": {"fisher": "type-2"},
    "fisher": {"likelihood": "categorical", "samples": 2},
    "fisher-diagonal": {"likelihood": "categorical"},
}


def network(name: str = "") -> torch.nn.Module:
    torch.manual_seed(0)
    hidden, classes = (4, 4) if name in SQUARE else (5, 3)
    layers = torch.nn.Linear(4, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, classes)
    return torch.nn.Sequential(*layers).double()


def made(name: str, model: torch.nn.Module, **given: Any) -> SecondOrder:
    options = {**OPTIONS.get(name, {}), **given}
    if takes_model(estimators[name]):
        options["model"] = model
    return SecondOrder(
        model.parameters(),
        lr=1e-2,
        curvature=estimators[name](**options),
        trust_region=TrustRegion(region=RmsBox(beta=0.9), radius=FixedRadius(1.0, damping=0.1)),
    )


CASES = [(name, {}) for name in sorted(available()["curvature"])]
CASES += [(name, {"fisher": kind}) for name in ("kfac", "ekfac") for kind in ("mc", "empirical")]
CASES += [("fisher", {"likelihood": "gaussian"}), ("fisher", {"samples": None})]
CASES += [("fisher-diagonal", {"samples": 3}), ("fisher-diagonal", {"likelihood": "gaussian"})]

#: Of a mean whose divisor is no count of samples: classes weigh unlike each other, and some targets are masked.
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 1.0], dtype=torch.float64)
MASKED = -1


def loss_of(outputs: Tensor, target: Tensor, likelihood: str | None, weighted: bool) -> tuple[Tensor, Tensor]:
    """The mean loss, and the weight by which it divides."""
    if likelihood == "gaussian":
        hot = torch.nn.functional.one_hot(target.clamp(min=0), outputs.shape[1])
        kept = (target != MASKED).to(outputs.dtype) if weighted else torch.ones_like(outputs[:, 0])
        squares = (outputs - hot).square().mean(1)
        return (kept * squares).sum() / kept.sum(), kept.sum()
    weight = WEIGHT[: outputs.shape[1]] if weighted else torch.ones(outputs.shape[1], dtype=outputs.dtype)
    loss = torch.nn.functional.cross_entropy(outputs, target, weight=weight, ignore_index=MASKED)
    return loss, weight[target[target != MASKED]].sum()


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=["-".join([n, *map(str, o.values())]) for n, o in CASES]
)
@pytest.mark.parametrize("sizes", [(4, 4, 4), (6, 1, 5)], ids=["even", "uneven and weighted"])
def test_micro_batches_equal_one_batch(name: str, options: dict[str, Any], sizes: tuple[int, ...]) -> None:
    """A part's mean loss counts by its part of the weight that the large batch's mean divides by."""
    whole, split = network(name), network(name)
    a, b = made(name, whole, **options), made(name, split, **options)
    likelihood, weighted = options.get("likelihood"), sizes[0] != sizes[1]
    for t in range(3):
        x, y = batch(t, weighted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            a.zero_grad()
            outputs = whole(x)
            loss, total = loss_of(outputs, y, likelihood, weighted)
            a.backward(loss, outputs)
            a.step()
            b.zero_grad()
            for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
                outputs = split(part_x)
                loss, weight = loss_of(outputs, part_y, likelihood, weighted)
                b.backward(loss * weight / total, outputs)
            b.step()
        # SOAP divides by a root mean square of its own size along axes that hold little but rounding.
        rel = 1e-7 if name in SQUARE else 1e-12
        assert float(a.step_info.loss) == pytest.approx(float(b.step_info.loss), rel=rel)
    assert not torch.equal(next(whole.parameters()), next(network(name).parameters()))
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def batch(seed: int, masked: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (12,), generator=generator)
    if masked:
        y[[1, 8]] = MASKED
    return x, y


def test_drawn_diagonal_of_a_step_is_the_one_shot_estimate() -> None:
    """Whose mean over draws is the Gauss-Newton diagonal (``tests/curvature/test_fisher_diagonal.py``)."""
    model = network()
    params = list(model.parameters())
    x, y = batch(0)
    estimator = FisherDiagonal("categorical", samples=3)
    state = estimator.init(params)
    statistics: Statistics = {}
    for part_x, part_y in zip(x.split((6, 1, 5)), y.split((6, 1, 5)), strict=True):
        outputs = model(part_x)
        loss = torch.nn.functional.cross_entropy(outputs, part_y) * len(part_y) / len(y)
        add_statistics(statistics, estimator.measure(state, LossGraph(loss, params, outputs)))
    estimator.update(state, Observation(params, statistics=statistics))
    expected = estimate(estimator, model, torch.nn.functional.cross_entropy, [(x, y)])
    for found, wanted in zip(estimator.operator(state).diagonal(), expected.diagonal(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_steps_and_resumed_runs_draw_labels_of_their_own() -> None:
    """A micro-batch more does not change what the next step draws; a loaded run draws what the other would have."""
    model = network()
    params = list(model.parameters())
    x, y = batch(0)
    found = []
    for parts in (1, 3):
        estimator = FisherDiagonal("categorical", samples=2, beta=0.0)
        state = estimator.init(params)
        for _ in range(2):
            statistics: Statistics = {}
            for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                outputs = model(part_x)
                graph = LossGraph(torch.nn.functional.cross_entropy(outputs, part_y) / parts, params, outputs)
                add_statistics(statistics, estimator.measure(state, graph))
            estimator.update(state, Observation(params, statistics=statistics))
            found.append(torch.cat([d.reshape(-1) for d in estimator.operator(state).diagonal()]))
        assert state["draws"] == 4
        assert TRANSIENT not in state
    first, second, of_parts, second_of_parts = found
    torch.testing.assert_close(first, of_parts)
    torch.testing.assert_close(second, second_of_parts)
    assert not torch.equal(first, second)
