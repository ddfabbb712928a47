"""Every public name of the three packages has an entry in docs/reference."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
PACKAGES = ("curvature", "trust_region", "optimizers")
DIRECTIVE = re.compile(
    r"^(?P<indent>\s*)(?:\.\. (?:py:)?|[`:]{3,}\{)"
    r"(?P<kind>currentmodule|module|automodule|auto\w+)(?:::|\})\s+(?P<target>[\w.]+)"
)


def documented_targets(text: str) -> Iterator[str]:
    """Dotted names that a page's autodoc directives document; `automodule` counts where it shows members."""
    module = ""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        match = DIRECTIVE.match(line)
        if not match:
            continue
        kind, target = match["kind"], match["target"]
        if kind in {"currentmodule", "module"}:
            module = target
        elif kind == "automodule":
            module = target
            if ":members:" in directive_body(lines[number + 1 :], len(match["indent"])):
                loaded = importlib.import_module(target)
                names = getattr(loaded, "__all__", None) or [
                    name
                    for name, value in vars(loaded).items()
                    if not name.startswith("_") and getattr(value, "__module__", None) == target
                ]
                yield from (f"{target}.{name}" for name in names)
        else:
            yield target if target.split(".")[0] in PACKAGES else f"{module}.{target}"


def directive_body(lines: list[str], indent: int) -> str:
    body = []
    for line in lines:
        if line.strip() and (len(line) - len(line.lstrip()) <= indent) and not line.lstrip().startswith(":"):
            break
        body.append(line)
    return "\n".join(body)


def resolve(dotted: str) -> object:
    """The object of that name; attributes win over submodules (`optimizers.build` names both)."""
    parts = dotted.split(".")
    for cut in range(1, len(parts) + 1):
        value: object = importlib.import_module(".".join(parts[:cut]))
        try:
            for name in parts[cut:]:
                value = getattr(value, name)
        except AttributeError:
            continue
        return value
    raise AssertionError(f"docs/reference documents {dotted}, which does not exist")


@pytest.fixture(scope="module")
def documented() -> list[object]:
    targets = [
        target
        for pattern in ("*.rst", "*.md")
        for page in sorted(REFERENCE.rglob(pattern))
        for target in documented_targets(page.read_text(encoding="utf-8"))
    ]
    return [resolve(target) for target in targets]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_reference_entry(package: str, documented: list[object]) -> None:
    module = importlib.import_module(package)
    missing = [
        name for name in module.__all__ if not any(getattr(module, name) is value for value in documented)
    ]
    assert not missing, f"add these to a page under docs/reference: {missing}"


@pytest.mark.parametrize("package", PACKAGES)
def test_all_names_exist_and_are_sorted_once(package: str) -> None:
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    assert not [name for name in module.__all__ if not hasattr(module, name)]


def test_reader_of_directives_knows_both_markups() -> None:
    page = "\n".join(
        [
            ".. currentmodule:: curvature",
            ".. autoclass:: Identity",
            "   :members:",
            ".. autofunction:: curvature.estimate",
            "```{autoclass} trust_region.L2Ball",
            "```",
            "Only prose about HutchinsonDiagonal.",
        ]
    )
    expected = ["curvature.Identity", "curvature.estimate", "trust_region.L2Ball"]
    assert list(documented_targets(page)) == expected
