"""Trust-region Newton through the optimizer against SciPy's ``trust-ncg``, trial by trial."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

from curvature import Hessian
from optimizers import SecondOrder
from trust_region import L2Ball, RatioRadius, SteihaugCG, TrustRegion


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2).sum()


def scipy_iterates(x0: np.ndarray, max_radius: float) -> list[np.ndarray]:
    """Every point at which SciPy stood after a trial, its rejections included as repeats."""
    iterates: list[np.ndarray] = []
    scipy.optimize.minimize(
        scipy.optimize.rosen,
        x0,
        method="trust-ncg",
        jac=scipy.optimize.rosen_der,
        hess=scipy.optimize.rosen_hess,
        options={"gtol": 1e-10, "initial_trust_radius": 1.0, "max_trust_radius": max_radius, "eta": 0.15},
        callback=lambda xk: iterates.append(np.array(xk)),
    )
    return iterates


@pytest.mark.parametrize("start", [[-1.2, 1.0], [-1.2, 1.0, 0.5, -0.3, 2.0, 1.1, -0.7, 0.9, 0.2, -1.0]])
def test_iterates_equal_scipys_on_rosenbrock(start: list[float]) -> None:
    expected = scipy_iterates(np.array(start), 1000.0)
    x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = SecondOrder(
        [x],
        lr=1.0,
        curvature=Hessian(),
        trust_region=TrustRegion(region=L2Ball(), subproblem=SteihaugCG(), radius=RatioRadius()),
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = rosenbrock(x)
        optimizer.backward(loss)
        return loss

    rejected = 0
    for point in expected:
        optimizer.step(closure)
        rejected += not bool(optimizer.step_info.accepted)
        np.testing.assert_allclose(x.detach().numpy(), point, rtol=1e-7, atol=1e-9)
    assert len(expected) > 15
    assert rejected > 0  # otherwise the way back was not tried
    # In ten dimensions this start leads both to the other local minimum, near (-1, 1, …, 1).
    assert np.linalg.norm(scipy.optimize.rosen_der(x.detach().numpy())) <= 1e-6
