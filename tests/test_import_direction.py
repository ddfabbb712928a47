"""Imports go one way: curvature <- trust_region <- optimizers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "curvature": {"curvature"},
    "trust_region": {"curvature", "trust_region"},
    "optimizers": {"curvature", "trust_region", "optimizers"},
}


def imported_packages(source: str) -> set[str]:
    """Top-level names that `source` imports absolutely, by statement or by a loader given a literal."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                found.add(str(first.value).split(".")[0])
    return found


def forbidden_imports(package: str, source: str) -> set[str]:
    return (imported_packages(source) & MAY_IMPORT.keys()) - MAY_IMPORT[package]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_packages_below_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no source files under {package}/"
    offenders = {
        str(path.relative_to(ROOT)): sorted(names)
        for path in files
        if (names := forbidden_imports(package, path.read_text(encoding="utf-8")))
    }
    assert not offenders


@pytest.mark.parametrize(
    "source",
    [
        "import optimizers",
        "import optimizers.build as b",
        "from optimizers.build import build",
        "def late():\n    from optimizers import SOAA",
        "import importlib\nimportlib.import_module('optimizers.build')",
    ],
)
def test_guard_sees_every_form_of_import(source: str) -> None:
    assert forbidden_imports("curvature", source) == {"optimizers"}
    assert forbidden_imports("optimizers", source) == set()


def test_guard_lets_relative_and_downward_imports_pass() -> None:
    source = "from . import radius\nfrom curvature import Hessian\nimport torch"
    assert not forbidden_imports("trust_region", source)
