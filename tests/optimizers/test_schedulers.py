"""Every learning-rate scheduler of torch moves lr (and momentum) as it moves torch's own AdamW."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as S  # noqa: N812

from optimizers import SOAA, AdamW, SecondOrder
from trust_region import FixedRadius, TrustRegion

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: S.StepLR(o, 3),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: S.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: S.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: S.CyclicLR(o, 1e-3, 1e-2, 3, cycle_momentum=True),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 1e-2, total_steps=12),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.ConstantLR(o), S.ExponentialLR(o, 0.9)], [3]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ConstantLR(o), S.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 5e-3, anneal_epochs=3),
}


def test_every_scheduler_is_here() -> None:
    every = {
        n
        for n, c in vars(S).items()
        if isinstance(c, type) and issubclass(c, S.LRScheduler) and not n.startswith("_")
    }
    assert every - {"LRScheduler"} <= set(SCHEDULERS) | {"SWALR"}


def run(
    make: Callable[[Any], Any], schedule: Callable[[Any], Any], steps: int = 10
) -> tuple[list[Any], torch.Tensor]:
    w = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64))
    optimizer = make([w])
    scheduler = schedule(optimizer)
    seen = []
    for t in range(steps):
        optimizer.zero_grad()
        loss = ((w - 0.1 * t) ** 2).sum()
        loss.backward()
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), group["betas"][0] if "betas" in group else group["momentum"]))
        if isinstance(optimizer, SecondOrder):
            optimizer.step(loss=loss)
        else:
            optimizer.step()
        scheduler.step(loss.detach()) if isinstance(scheduler, S.ReduceLROnPlateau) else scheduler.step()
    return seen, w.detach()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_moves_this_adamw_as_torchs(name: str) -> None:
    ours = run(lambda p: AdamW(p, lr=3e-3), SCHEDULERS[name])
    theirs = run(lambda p: torch.optim.AdamW(p, lr=3e-3), SCHEDULERS[name])
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_drives_soaa_and_resumes(name: str) -> None:
    """Optimizer and scheduler saved after 4 of 10 steps go on as those that never stopped: lr, momentum, parameters."""

    def fresh() -> tuple[torch.nn.Parameter, SecondOrder, Any]:
        w = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64))
        optimizer = SOAA([w], lr=3e-3, total_steps=10)
        return w, optimizer, SCHEDULERS[name](optimizer)

    def steps(w: torch.nn.Parameter, optimizer: SecondOrder, scheduler: Any, times: range) -> list[Any]:
        seen = []
        for t in times:
            optimizer.zero_grad()
            loss = ((w - 0.1 * t) ** 2).sum()
            optimizer.backward(loss)
            group = optimizer.param_groups[0]
            seen.append((float(group["lr"]), float(group["momentum"])))
            optimizer.step()
            scheduler.step(loss.detach()) if isinstance(scheduler, S.ReduceLROnPlateau) else scheduler.step()
        return seen

    whole, parts, resumed = fresh(), fresh(), fresh()
    seen = steps(*whole, range(10))
    assert len({lr for lr, _ in seen}) > 1 or name == "ReduceLROnPlateau"
    assert len({m for _, m in seen}) > 1 or name not in ("OneCycleLR", "CyclicLR")
    first = steps(*parts, range(4))
    file = io.BytesIO()
    schedule = parts[2].state_dict()
    torch.save({"w": parts[0].detach(), "optimizer": parts[1].state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        resumed[0].copy_(saved["w"])
    resumed[1].load_state_dict(saved["optimizer"])
    resumed[2].load_state_dict(schedule)
    assert first + steps(*resumed, range(4, 10)) == seen
    assert torch.equal(whole[0], resumed[0])


def test_one_cycle_raises_momentum_from_zero() -> None:
    """An optimizer without momentum gets its buffers when a schedule brings momentum."""
    seen, w = run(
        lambda p: SecondOrder(p, lr=1e-2, trust_region=TrustRegion(radius=FixedRadius(1.0))),
        SCHEDULERS["OneCycleLR"],
    )
    assert max(m for _, m in seen) > 0.9
    assert torch.isfinite(w).all()
