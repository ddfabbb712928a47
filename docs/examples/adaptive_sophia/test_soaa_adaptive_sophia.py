"""The laws of optimizers (torch.optim's own among them), one step by hand, and the name."""

import torch
from soaa_adaptive_sophia import AdaptiveSophia

from optimizers import available, build
from optimizers.testing import check_optimizer


def test_laws():
    check_optimizer(lambda model, **options: build(model, "adaptive-sophia", **options))


def test_first_step_is_newton_where_it_fits_into_the_box_and_the_box_elsewhere():
    w = torch.nn.Parameter(torch.tensor([3e-4, 2.0], dtype=torch.float64))
    optimizer = AdaptiveSophia([w], betas=(0.0, 0.99), radius=1e-3)
    optimizer.backward((torch.tensor([4.0, 1.0]) * w**2).sum())
    optimizer.step()
    torch.testing.assert_close(w.data, torch.tensor([0.0, 2.0 - 1e-3], dtype=torch.float64))


def test_the_radius_follows_the_loss():
    w = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = AdaptiveSophia([w], betas=(0.0, 0.99), radius=1e-3)
    radii = []
    for _ in range(5):
        optimizer.zero_grad()
        optimizer.backward((w**2).sum())
        optimizer.step()
        radii.append(float(optimizer.step_info["radius"]))
    assert radii == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]  # a quadratic: the model is right, the box decides


def test_the_name_is_found():
    assert "adaptive-sophia" in available()["optimizers"]
