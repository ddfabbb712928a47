"""The laws of policies, R's own, and the Rosenbrock valley by name."""

import torch
from soaa_smooth_radius import SmoothRadius

from optimizers import available, build
from trust_region.testing import check_policy


def test_laws():
    check_policy(SmoothRadius())
    check_policy(SmoothRadius(eta=0.0, steepness=20.0, grow=5.0))


def test_factor_rises_from_shrink_through_one_at_eta_to_grow():
    policy = SmoothRadius(eta=0.3)
    ratio = torch.linspace(-20, 20, 401, dtype=torch.float64)
    factor = policy.factor(ratio)
    assert bool((factor.diff() >= 0).all())
    expected = torch.tensor([policy.shrink, policy.grow], dtype=torch.float64)
    torch.testing.assert_close(factor[[0, -1]], expected)
    torch.testing.assert_close(
        policy.factor(torch.tensor(0.3, dtype=torch.float64)).item(), 1.0, rtol=0, atol=1e-12
    )


class Rosenbrock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.point = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))

    def forward(self):
        x, y = self.point
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def test_the_name_is_found_and_solves_rosenbrock():
    assert "smooth-ratio" in available()["trust_region"]
    model = Rosenbrock()
    optimizer = build(model, curvature="hessian", trust_region="smooth-ratio", lr=1.0)

    def closure():
        optimizer.zero_grad()
        loss = model()
        optimizer.backward(loss)
        return loss

    for _ in range(60):
        optimizer.step(closure)
    torch.testing.assert_close(model.point.data, torch.ones(2, dtype=torch.float64))
