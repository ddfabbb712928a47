"""Finished runs on disk: one JSON file a run, written whole or not at all.

A run is named by the hash of its full configuration, so a run that is on disk is never made again, and one
that was interrupted leaves nothing behind that could be taken for a result.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optimizers.ablation.errors import AblationError

VERSION = 1


class Store:
    """The results folder: ``runs/<key>.json`` for each finished run.

    Args:
        folder: made where it does not exist.

    Raises:
        AblationError: the folder cannot be made or written to, or a newer version wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AblationError(f"cannot write results to {folder}: {_reason(error)}") from error
        marker = self.folder / "ablation.json"
        if marker.exists():
            found = read_json(marker).get("version")
            if found != VERSION:
                raise AblationError(
                    f"{folder} holds results of format {found}, this version reads format {VERSION}: "
                    "choose another --out, or the version of soaa that wrote it"
                )
        else:
            write_json(marker, {"version": VERSION})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one process; another that asks for it gets an AblationError."""
        import fcntl

        with open(self.folder / ".lock", "a", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise AblationError(
                    f"{self.folder} is in use by another soaa process: wait for it, or choose another --out"
                ) from None
            for left in (
                *self.folder.glob("*.tmp"),
                *self.runs.glob("*.tmp"),
            ):  # of a process that was killed
                left.unlink(missing_ok=True)
            # released by the system when the process ends, however it ends
            yield

    def path(self, key: str) -> Path:
        """Return where the run of this key is or will be."""
        return self.runs / f"{key}.json"

    def has(self, key: str) -> bool:
        """Return whether the run of this key is finished."""
        return self.path(key).is_file()

    def save(self, key: str, record: dict[str, Any]) -> None:
        """Write a finished run, whole or not at all."""
        write_json(self.path(key), record)

    def load(self, key: str) -> dict[str, Any]:
        """Read a finished run.

        Args:
            key: the whole key, or enough of its start to be the only one.

        Returns:
            The record.

        Raises:
            AblationError: no finished run, or more than one, has this key.
        """
        matches: list[Path] = []
        if re.fullmatch(r"[\w-]{0,128}", key):  # a key may come from a file: it is no path and no pattern
            matches = [self.path(key)] if self.has(key) else sorted(self.runs.glob(f"{key}*.json"))
        if len(matches) != 1:
            problem = "no finished run" if not matches else f"{len(matches)} finished runs"
            raise AblationError(
                f"{problem} in {self.folder} with the key {key!r}: keys are the names of the files in {self.runs}"
            )
        remedy = "remove this file, and soaa ablate makes the run again"
        try:
            record = read_json(matches[0])
        except AblationError as error:
            raise AblationError(f"{error}: {remedy}") from error
        if "result" not in record:
            raise AblationError(f"{matches[0]} holds no result, so it is no run: {remedy}")
        for part in ("config", "environment", "result", "trace"):
            if not isinstance(record.get(part, {}), dict):
                raise AblationError(f"{part!r} in {matches[0]} must be a JSON object: {remedy}")
        return record

    def keys(self) -> list[str]:
        """Return the keys of every finished run, sorted."""
        return sorted(path.stem for path in self.runs.glob("*.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; AblationError where it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AblationError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise AblationError(f"cannot read {path}: not a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object to a file, whole or not at all; numbers that are not finite become null."""
    text = json.dumps(finite(content), indent=1, sort_keys=True, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or, after a crash or on a full disk, not at all.

    Args:
        path: where; its folder exists.
        content: what.

    Raises:
        AblationError: it cannot be written; what was at `path` before is untouched.
    """
    scratch = None
    try:
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.stem + ".", suffix=".tmp")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except OSError as error:
        raise AblationError(f"cannot write {path}: {_reason(error)}; finished runs are intact") from error
    finally:
        if scratch is not None:
            with contextlib.suppress(OSError):
                os.unlink(scratch)


def finite(value: Any) -> Any:
    """Return a JSON value with None in place of every number that is not finite.

    >>> finite({"loss": [1.0, float("nan")]})
    {'loss': [1.0, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
