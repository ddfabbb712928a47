"""What the distribution promises: names, extras, tested versions, typed packages, one command."""

from __future__ import annotations

import importlib
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("curvature", "trust_region", "optimizers")
TOP_LEVEL = {
    "curvature", "trust_region", "optimizers", "tests", "docs",
    "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "constraints.txt",
}  # fmt: skip


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def tested_versions() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normalised(name): version for name, version in pairs}


def requirement_names(requirements: list[str]) -> set[str]:
    return {normalised(re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]) for requirement in requirements}


def test_every_requirement_has_a_tested_version(
    project: dict[str, Any], tested_versions: dict[str, str]
) -> None:
    wanted = requirement_names(project["dependencies"])
    for requirements in project["optional-dependencies"].values():
        wanted |= requirement_names(requirements)
    assert wanted - {"soaa"} <= tested_versions.keys()


def test_torch_is_pinned_without_a_local_version_label(tested_versions: dict[str, str]) -> None:
    assert tested_versions["torch"] == "2.13.0"


def test_pinned_peers_agree_with_the_constraints(
    project: dict[str, Any], tested_versions: dict[str, str]
) -> None:
    for requirement in project["optional-dependencies"]["peers"]:
        name, version = requirement.split("==")
        assert tested_versions[normalised(name)] == version


def test_extras_are_the_documented_ones(project: dict[str, Any]) -> None:
    assert set(project["optional-dependencies"]) == {"ablation", "test", "docs", "peers", "trainers", "dev"}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_console_script_names_a_callable(project: dict[str, Any]) -> None:
    module, _, attribute = project["scripts"]["soaa"].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_installed_distribution_ships_the_three_packages_and_nothing_else(project: dict[str, Any]) -> None:
    try:
        distribution = metadata.distribution("soaa")
    except metadata.PackageNotFoundError:
        pytest.skip("soaa is not installed: the tests run from the source tree")
    assert distribution.version == project["version"]
    top_level = (distribution.read_text("top_level.txt") or "").split()
    assert set(top_level) == set(PACKAGES)


def test_top_level_holds_only_what_people_expect() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0 and listing.stdout:
        found = {path.split("/")[0] for path in listing.stdout.splitlines()}
    else:  # an unpacked copy: everything but what an installation or a run leaves behind
        found = {path.name for path in ROOT.iterdir() if path.suffix != ".egg-info"}
        found -= {"build", "dist", "soaa-results"}
    assert {name for name in found if not name.startswith((".", "__"))} - TOP_LEVEL == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_code_is_a_regular_package(package: str) -> None:
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert folders
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]
