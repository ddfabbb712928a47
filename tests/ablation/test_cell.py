from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizers.ablation import AblationError, Cell
from optimizers.ablation.cell import freeze, grid

names = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
words = st.from_regex(r"[a-z][a-z-]{0,6}", fullmatch=True).filter(
    lambda w: w not in ("true", "false", "inf", "nan")
)
numbers = st.integers(-999, 999) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
values = words | numbers | st.lists(numbers, min_size=1, max_size=3)
options = st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), values, max_size=3)


@given(names, names, options, st.booleans())
def test_label_is_read_back_as_the_same_cell(
    first: str, second: str, given_options: dict, composed: bool
) -> None:
    pair = {"curvature": first, "trust_region": second} if composed else {"optimizer": first}
    cell = Cell(**pair, options=freeze(given_options))
    assert Cell.parse(cell.label) == cell
    assert Cell.from_dict(cell.as_dict()) == cell


def test_grid_crosses_every_curvature_with_every_trust_region() -> None:
    assert [cell.name for cell in grid(["a", "b"], ["x", "y"])] == ["a+x", "a+y", "b+x", "b+y"]


@pytest.mark.parametrize("text", ["", "+x", "a+", "a:gamma", "a:=1", "a:1x=2", "a:x="])
def test_what_is_no_cell_is_refused_with_how_to_write_one(text: str) -> None:
    with pytest.raises(AblationError, match=r"option=value|curvature\+trust-region"):
        Cell.parse(text)
