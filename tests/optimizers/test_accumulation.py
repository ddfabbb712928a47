"""k micro-batches equal one large batch, for every registered estimator whose draws do not depend on the batch."""

from __future__ import annotations

import warnings

import pytest
import torch

from curvature.registry import estimators
from optimizers import SecondOrder, available
from optimizers.build import takes_model
from trust_region import FixedRadius, RmsBox, TrustRegion

#: Labels are drawn sample by sample, so two halves draw other labels than the whole: equal in the mean only.
SAMPLED = {"fisher-diagonal", "fisher"}
#: The eigenbasis of a factor of low rank is not unique: rounding chooses the null space, and with it the rotation.
ROTATED = {"soap"}
OPTIONS = {
    "empirical-fisher": {"likelihood": "categorical"},
    "low-rank": {"rank": 3},
    "kfac": {"fisher": "type-2"},
    "ekfac": {"fisher": "type-2"},
}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()


def made(name: str, model: torch.nn.Module) -> SecondOrder:
    options = dict(OPTIONS.get(name, {}))
    if takes_model(estimators[name]):
        options["model"] = model
    return SecondOrder(
        model.parameters(),
        lr=1e-2,
        curvature=estimators[name](**options),
        trust_region=TrustRegion(region=RmsBox(beta=0.9), radius=FixedRadius(1.0, damping=0.1)),
    )


@pytest.mark.parametrize("name", sorted(set(available()["curvature"]) - SAMPLED - ROTATED))
@pytest.mark.parametrize("parts", [3, 4])
def test_micro_batches_equal_one_batch(name: str, parts: int) -> None:
    whole, split = network(), network()
    a, b = made(name, whole), made(name, split)
    for t in range(3):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (12,), generator=generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            a.zero_grad()
            outputs = whole(x)
            a.backward(torch.nn.functional.cross_entropy(outputs, y), outputs)
            a.step()
            b.zero_grad()
            for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                outputs = split(part_x)
                b.backward(torch.nn.functional.cross_entropy(outputs, part_y) / parts, outputs)
            b.step()
        assert float(a.step_info.loss) == pytest.approx(float(b.step_info.loss), rel=1e-12)
    assert not torch.equal(next(whole.parameters()), next(network().parameters()))
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
