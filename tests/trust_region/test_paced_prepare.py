"""A policy that moves its radius before the step (Tadam's) is held still by Paced, and so is its recording."""

from __future__ import annotations

import copy
import pickle

import torch

from trust_region import Paced, RecordedRadius, StepContext, TadamRadius
from trust_region.testing import proposal


def radii(policy: object, steps: int = 12) -> list[float]:
    state = policy.init([torch.zeros(1, dtype=torch.float64)])
    seen = []
    for t in range(steps):
        loss = torch.tensor(
            10.0 - t, dtype=torch.float64
        )  # better than promised: the radius grows where it may
        policy.prepare(state, StepContext(loss=loss))
        policy.review(state, proposal(0.5), loss)
        seen.append(float(state["radius"]))
    return seen


def test_paced_tadam_stands_still_during_warmup_and_between_its_steps() -> None:
    free = radii(TadamRadius())
    assert free[1] > free[0] == 1.0
    assert radii(Paced(TadamRadius(), warmup=20)) == [1.0] * 12
    held = radii(Paced(TadamRadius(), warmup=3, every=4))
    assert held[:3] == [1.0] * 3
    assert held[3] == free[1]  # the first step after warm-up adapts as any other
    assert held[3:7] == [held[3]] * 4


def test_paced_copies_prepare_their_own_policy() -> None:
    policy = Paced(TadamRadius(gamma=0.2), warmup=1)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert other == policy
        assert radii(other) == radii(policy)


def test_recorded_radius_holds_its_last() -> None:
    policy = RecordedRadius([1.0, 0.5])
    state = policy.init([torch.zeros(1)])
    seen = []
    for _ in range(4):
        policy.prepare(state, StepContext())
        seen.append(float(state["radius"]))
    assert seen == [1.0, 0.5, 0.5, 0.5]
