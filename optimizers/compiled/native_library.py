"""C++ compiled once a machine: found on disk the next time, by what it was made from."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from optimizers.compiled import native_diagonal_source, native_source

SOURCE = native_source.SOURCE + native_diagonal_source.SOURCE

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
"""No ``-ffast-math``: a gradient that is not finite must stay one."""


class NoCompilerError(RuntimeError):
    """No C++ compiler was found, or it failed; the message says what it said."""


def compiler() -> str:
    """The C++ compiler: that of ``CXX``, or the system's."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def cache_directory() -> Path:
    """Where libraries are kept: ``SOAA_CACHE``, or the user's cache directory."""
    given = os.environ.get("SOAA_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "soaa"


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled passes.

    Raises:
        NoCompilerError: where they cannot be made.

    Cost: a few seconds the first time on a machine, milliseconds afterwards.
    """
    command = [compiler(), *FLAGS, *_native_flags()]
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCompilerError(f"{command[0]} cannot be run: {error}") from error
    made_from = "\0".join([SOURCE, *command, version, platform.machine(), _processor()])
    name = f"elementwise-{hashlib.sha256(made_from.encode()).hexdigest()[:20]}.so"
    for directory in (cache_directory(), Path(tempfile.mkdtemp(prefix="soaa-"))):
        path = directory / name
        try:
            if not path.exists():
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                _compile(command, path)
            return ctypes.CDLL(str(path))
        except OSError:  # a cache that cannot be written to, or from which nothing can be loaded
            continue
    raise NoCompilerError(
        f"the compiled step could not be stored in {cache_directory()} nor loaded from there"
    )


def _compile(command: list[str], path: Path) -> None:
    """Compile to ``path``, in one move, so that no other process sees half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, made = Path(folder) / "step.cpp", Path(folder) / "step.so"
        source.write_text(SOURCE)
        done = subprocess.run(
            [*command, str(source), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise NoCompilerError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
        made.replace(path)


def _native_flags() -> list[str]:
    return ["-mcpu=native"] if platform.machine() in ("arm64", "aarch64") else ["-march=native"]


def _processor() -> str:
    """What tells processors apart, since a library is made for the one at hand."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
