"""Where and with what a run was made: versions, machine, git revision."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


@functools.cache
def describe() -> dict[str, object]:
    """Return versions, machine and git revision, as JSON values.

    >>> sorted(describe())
    ['cpu_count', 'git_dirty', 'git_revision', 'machine', 'processor', 'python', 'versions']
    """
    revision, dirty = git_revision(Path(__file__).parent)
    return {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "git_revision": revision,
        "git_dirty": dirty,
        "versions": {
            name: version(name) for name in ("soaa", "torch", "numpy", "scipy", "optuna", "scikit-learn")
        },
    }


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Return the processor's name, as far as the platform tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_revision(folder: Path) -> tuple[str | None, bool | None]:
    """Return the revision of the checkout that a folder lies in and whether it was changed since; else None."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # an installed package may lie inside an unrelated checkout: only a checkout that tracks this folder counts
    if not git("ls-files", "--", "environment.py"):
        return None, None
    status = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD"), None if status is None else bool(status)
