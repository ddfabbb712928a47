"""Step by step beside scipy.optimize: the same iterates and the same radius after every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.optimize._trustregion_ncg as scipy_ncg
import torch

from tests.trust_region.rosenbrock import gradient, hessian, minimise, rosenbrock
from trust_region import L2Ball, RatioRadius, SteihaugCG, TrustRegion


def scipy_run(
    method: str, x0: np.ndarray, monkeypatch: pytest.MonkeyPatch, subproblem: Any, f: Any = rosenbrock, **options: Any
) -> tuple[list[np.ndarray], list[float]]:
    """SciPy's iterates, and the radius that it handed to its subproblem at every step."""
    radii: list[float] = []
    solve = subproblem.solve

    def recording(self: Any, radius: float) -> Any:
        radii.append(radius)
        return solve(self, radius)

    monkeypatch.setattr(subproblem, "solve", recording)
    result = scipy.optimize.minimize(
        lambda x: float(f(torch.from_numpy(x))),
        x0,
        jac=lambda x: gradient(f, torch.from_numpy(x)).numpy(),
        hess=lambda x: hessian(f, torch.from_numpy(x)).numpy(),
        method=method,
        options={"return_all": True, "gtol": 1e-8, **options},
    )
    assert result.success
    return result.allvecs, radii


@pytest.mark.parametrize(
    "x0",
    [[-1.2, 1.0], [3.0, -2.0], [-1.2, 1.0] * 5, [2.0, -1.0, 0.5, 3.0, -2.0, 1.0, 0.0, -1.0, 2.0, 1.5]],
    ids=["2d-classical", "2d-far", "10d-classical", "10d-far"],
)
@pytest.mark.parametrize("radius", [1.0, 0.01, 500.0])
def test_ratio_radius_with_steihaug_equals_scipy_trust_ncg(
    x0: list[float], radius: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterates, radii = scipy_run(
        "trust-ncg", np.array(x0), monkeypatch, scipy_ncg.CGSteihaugSubproblem, initial_trust_radius=radius
    )
    trust = TrustRegion(L2Ball(), SteihaugCG(), RatioRadius(initial_radius=radius))
    run = minimise(trust, rosenbrock, torch.tensor(x0, dtype=torch.float64), gtol=1e-8)
    assert len(run.iterates) == len(iterates) - 1
    assert [radius] + run.radii[:-1] == pytest.approx(radii, rel=1e-12)
    for mine, theirs in zip(run.iterates, iterates[1:], strict=True):
        # rounding grows along some hundred steps of a chaotic path; the radii are equal throughout
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-8 if len(x0) == 2 else 1e-6)
    assert not all(run.accepted) or radius < 1  # the premise: rejections are among what is compared
