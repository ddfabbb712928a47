"""Tables and figures in the pages are those of their sources; what prose says about them is true."""

from __future__ import annotations

import re

import pytest

from optimizers.cost_model import PRESETS, SIZES, cost
from tests.docs.tables import DOCS, TABLES, measured, written

FLAT = "flat-50M"


@pytest.mark.parametrize("path", sorted(TABLES))
def test_table_is_what_its_source_says(path: str) -> None:
    remedy = "run python -m tests.docs.tables, and read the page again"
    assert (DOCS / path).read_text(encoding="utf-8") == written(TABLES[path]()), remedy


@pytest.mark.parametrize("path", sorted(TABLES))
def test_table_is_shown(path: str) -> None:
    name = path.split("/")[-1]
    assert any(name in page.read_text(encoding="utf-8") for page in (DOCS / path).parent.glob("*.md"))


def test_what_the_page_on_costs_says() -> None:
    """docs/explanation/costs.md, sentence by sentence."""
    at = {size: {name: cost(name, SIZES[size]) for name in PRESETS} for size in SIZES}
    for size, rows in at.items():
        by_state = {name: x.state / x.parameters for name, x in rows.items()}
        assert all(abs(by_state[n] - 8) < 0.01 for n in ("soaa", "adamw", "lamb", "sophia-h", "adahessian"))
        assert by_state["muon"] < 4.01 < 15.99 < by_state["tadam"]
        assert by_state["lbfgs-trust-region"] > 88 - 1e-9
        assert by_state["trust-region-newton"] < 0.01
        assert min(by_state["shampoo"], by_state["soap"]) > 8, size
    assert at["70B"]["kfac"].state / at["70B"]["kfac"].parameters < 8.0 < 10.0 < at["7B"]["kfac"].state / 7e9
    assert at["7B"]["kfac"].state < at["7B"]["soap"].state
    assert not any(PRESETS[n].shardable for n in ("kfac", "soap", "shampoo", "muon", "trust-region-newton"))


def test_what_the_page_on_compilation_says() -> None:
    """docs/explanation/compilation.md: the two passes, their times, the eager step."""
    models = measured("step_cost")["models"]
    big = {name: row["ratio"] for name, row in models[FLAT]["contenders"].items()}
    assert big["SOAA compiled"] < big["SOAA eager"] / 1.8
    small = models["mlp-1.3M"]["contenders"]
    assert small["AdamW composed, compiled"]["ratio"] < small["AdamW composed, eager"]["ratio"] / 1.8
    for name, most in (
        ("mlp-1.3M", 1.1),
        ("gpt-0.8M", 1.1),
        ("gpt2-12.7M", 0.75),
        (FLAT, 0.6),
    ):  # beside foreach AdamW
        rows = models[name]["contenders"]
        assert rows["SOAA eager"]["ratio"] < most * rows["torch AdamW foreach"]["ratio"]
    exponents = measured("step_cost")["growth"]["exponents"]
    assert exponents["SOAA compiled"] <= 1.05
    # about what its additional bytes take: 36 to 32
    assert big["SOAA compiled"] / big["AdamW composed, compiled"] < 1.5 * 36 / 32
    for model in models.values():
        rows = {name: row["ratio"] for name, row in model["contenders"].items()}
        assert rows["SOAA compiled"] < rows.get("SOAA eager", 3.0)


def test_what_the_choice_of_a_curvature_says() -> None:
    """docs/how_to/choose_curvature.md names no figure of its own, only an order."""
    for model in ("gpt", "mlp"):
        found = {
            name: row["ratio"] for name, row in measured("curvature_cost")[model].items() if "ratio" in row
        }
        # one backward pass less; between the two that have one, two runs of one machine differ by more than they do
        for other in ("empirical", "mc"):
            assert found["K-FAC factors, forward-only"] < found[f"K-FAC factors, {other}"]
        assert found["step, sophia-h"] < found["step, adahessian"]
    prose = (DOCS / "how_to" / "choose_curvature.md").read_text(encoding="utf-8")
    assert not re.search(r"\d\.\d+ (gradients|times)", prose), "a measured figure belongs into the table"
