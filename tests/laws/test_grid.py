"""Every registered curvature with every registered trust region trains, or is refused with a reason; as published."""

from __future__ import annotations

import csv

import pytest

from curvature.registry import estimators
from tests.laws import grid
from trust_region.registry import trust_regions


@pytest.mark.parametrize("curvature", estimators.names())
def test_every_cell_trains_or_says_why_not(curvature: str) -> None:
    with grid.TABLE.open(newline="") as file:
        published = {row["curvature"]: row for row in csv.DictReader(file)}
    assert curvature in published, "run python -m tests.laws.grid to bring docs/reference/grid.csv up to date"
    for trust_region in trust_regions.names():
        found = grid.outcome(curvature, trust_region)
        assert found.verdict in ("trains", "refused when built"), found
        if found.verdict != "trains":
            assert len(found.reason) > 40, found  # a refusal names the reason and the remedy
        shown = published[curvature].get(trust_region, "")
        assert shown.isdigit() == (found.verdict == "trains"), (
            f"{curvature} x {trust_region} {found.verdict}, and the table says {shown!r}: run python -m tests.laws.grid"
        )


def test_a_cell_that_does_not_train_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "STEPS", 1)
    assert grid.outcome("identity", "cauchy").verdict == "does not train"
