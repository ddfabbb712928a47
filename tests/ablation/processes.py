"""Processes that tests of the ablation tool start, and that never outlive them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
HAS_PROC = Path("/proc/self/task").exists()  # worker processes are found through it


@contextlib.contextmanager
def soaa(words: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command ``soaa`` in a process of its own, which is killed where it is still there at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "optimizers.ablation", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        # A job that a shell started in the background ignores SIGINT, and so would all its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def forked(function: Callable[[], object]) -> int:
    """Call a function in a copy of this process, which has everything imported already; return its number.

    The copy ends with exit code 0 where the function returns and 1 where it raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of threads; none here holds a lock
        process = os.fork()
    if process:
        return process
    code = 1
    try:
        function()
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a process of `forked`; return its exit code, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def children(process: int) -> list[int]:
    """Return the processes that a process has started and that still run."""
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def until(condition: Callable[[], object], seconds: float = 60) -> bool:
    """Wait until a condition holds; return whether it did in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
