"""The packages of the how-to guides, installed as a user installs them; their own tests must pass."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PACKAGES = sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml"))
GROUPS = {
    "soaa.curvature",
    "soaa.trust_region",
    "soaa.optimizers",
    "soaa.layer_rules",
    "soaa.workloads",
}


def entry_points(package: Path) -> dict[str, dict[str, str]]:
    declared = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
    points: dict[str, dict[str, str]] = declared["project"]["entry-points"]
    return points


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed all of them, built from copies."""
    folder = tmp_path_factory.mktemp("installed")
    sources = tmp_path_factory.mktemp("sources")
    copies = [str(shutil.copytree(package, sources / package.name)) for package in PACKAGES]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--no-index", "--target", str(folder), *copies], PIP_DISABLE_PIP_VERSION_CHECK="1")
    return folder


def test_every_kind_of_extension_has_a_package() -> None:
    assert {group for package in PACKAGES for group in entry_points(package)} == GROUPS


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_installed_package_declares_its_entry_point(package: Path, installed: Path) -> None:
    found = {
        (point.group, point.name, point.value)
        for distribution in importlib.metadata.distributions(path=[str(installed)])
        for point in distribution.entry_points
    }
    for group, points in entry_points(package).items():
        for name, value in points.items():
            assert (group, name, value) in found


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_its_own_tests_pass(package: Path, installed: Path, tmp_path: Path) -> None:
    (test,) = package.glob("test_*.py")
    shutil.copy(test, tmp_path)  # away from its module: the installed one must be found
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "error", test.name]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), "-c", os.devnull],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
