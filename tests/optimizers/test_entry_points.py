"""An installed third-party package adds a curvature, a trust region and an optimizer by its entry points."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MODULE = """
from dataclasses import dataclass
from curvature import Identity
from optimizers import SecondOrder
from trust_region import Box, FixedRadius, TrustRegion

@dataclass(frozen=True)
class Third(Identity):
    strength: float = 1.0

def tight(radius: float = 0.5) -> TrustRegion:
    return TrustRegion(region=Box(), radius=FixedRadius(radius))

class Mine(SecondOrder):
    def __init__(self, params, lr=0.1, **options):
        super().__init__(params, lr, curvature=Third(), trust_region=tight(), **options)
"""
POINTS = """
[soaa.curvature]
third = third_party:Third
[soaa.trust_region]
tight = third_party:tight
[soaa.optimizers]
mine = third_party:Mine
"""
USE = """
import torch, optimizers
names = optimizers.available()
assert "third" in names["curvature"] and "tight" in names["trust_region"] and "mine" in names["optimizers"], names
model = torch.nn.Linear(2, 1)
composed = optimizers.build(model, curvature="third", trust_region="tight", strength=2.0, radius=0.25, lr=1.0)
assert composed.curvature.strength == 2.0 and composed.trust_region.radius.radius == 0.25
for optimizer in (composed, optimizers.build(model, "mine")):
    before = model.weight.detach().clone()
    optimizer.backward(model(torch.ones(3, 2)).square().mean())
    optimizer.step()
    assert not torch.equal(before, model.weight)
    optimizer.zero_grad()
print("composed")
"""


def test_entries_of_an_installed_package_are_listed_and_built(tmp_path: Path) -> None:
    (tmp_path / "third_party.py").write_text(MODULE)
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(tmp_path), str(root)])
    found = subprocess.run(
        [sys.executable, "-c", USE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip() == "composed", found.stderr
