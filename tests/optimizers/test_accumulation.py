"""k micro-batches equal one large batch for every registered estimator, drawn labels included.

The one exception is exact in the mean only: see :func:`test_drawn_diagonal_of_parts_has_the_mean_of_the_whole`.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from curvature import FisherDiagonal, LossGraph
from curvature.registry import estimators
from optimizers import SecondOrder, available
from optimizers.build import takes_model
from tests.curvature import dense
from trust_region import FixedRadius, RmsBox, TrustRegion

#: (Jᵀσ)² is a square of a sum over samples: its cross terms vanish in the mean, and parts lack those across parts.
IN_THE_MEAN = {"fisher-diagonal"}
#: A factor of low rank has no one eigenbasis: rounding chooses it in the null space. Square layers leave at most one
#: dimension, whose axis is unique.
SQUARE = {"soap"}
OPTIONS = {
    "empirical-fisher": {"likelihood": "categorical"},
    "low-rank": {"rank": 3},
    "kfac": {"fisher": "type-2"},
    "ekfac": {"fisher": "type-2"},
    "fisher": {"likelihood": "categorical", "samples": 2},
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


CASES = [(name, {}) for name in sorted(set(available()["curvature"]) - IN_THE_MEAN)]
CASES += [(name, {"fisher": kind}) for name in ("kfac", "ekfac") for kind in ("mc", "empirical")]
CASES += [("fisher", {"likelihood": "gaussian"}), ("fisher", {"samples": None})]


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=["-".join([n, *map(str, o.values())]) for n, o in CASES]
)
@pytest.mark.parametrize("parts", [3, 4])
def test_micro_batches_equal_one_batch(name: str, options: dict[str, Any], parts: int) -> None:
    whole, split = network(name), network(name)
    a, b = made(name, whole, **options), made(name, split, **options)

    def loss_of(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if options.get("likelihood") == "gaussian":
            return (outputs - torch.nn.functional.one_hot(target, outputs.shape[1])).square().mean()
        return torch.nn.functional.cross_entropy(outputs, target)

    for t in range(3):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (12,), generator=generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            a.zero_grad()
            outputs = whole(x)
            a.backward(loss_of(outputs, y), outputs)
            a.step()
            b.zero_grad()
            for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                outputs = split(part_x)
                b.backward(loss_of(outputs, part_y) / parts, outputs)
            b.step()
        # SOAP divides by a root mean square of its own size along axes that hold little but rounding.
        rel = 1e-7 if name in SQUARE else 1e-12
        assert float(a.step_info.loss) == pytest.approx(float(b.step_info.loss), rel=rel)
    assert not torch.equal(next(whole.parameters()), next(network(name).parameters()))
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_drawn_diagonal_of_parts_has_the_mean_of_the_whole() -> None:
    """Over 1,500 seeds: the standard error of an entry is at most √(2/1500) = 3.7 % of it."""
    model = network()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (12,), generator=generator)
    params = list(model.parameters())
    outputs = model(x)
    expected = dense.gauss_newton(torch.nn.functional.cross_entropy(outputs, y), outputs, params).diagonal()
    for parts in (1, 3):
        total = torch.zeros_like(expected)
        graphs = []
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            outputs = model(part_x)
            graphs.append(
                LossGraph(torch.nn.functional.cross_entropy(outputs, part_y) / parts, params, outputs)
            )
        for seed in range(1500):
            estimator = FisherDiagonal("categorical", seed=seed)
            state = estimator.init(params)
            state["step"] = 1  # the likelihood is verified at step 0; once is enough
            for graph in graphs:
                total += torch.cat([d.reshape(-1) for d in estimator.measure(state, graph)["diagonal"]])
        error = (total / 1500 - expected) / expected
        assert float(error.abs().max()) < 4 * 0.037
        assert float(error.mean().abs()) < 0.03
