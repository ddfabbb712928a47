"""The raw results of the study: all runs of a workload in one file of lines, xz-compressed.

The first line holds the files of the results folder, every further one a run. Numbers keep seven digits, all that
float32 has.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

SUFFIX = ".jsonl.xz"
HEAD = ("ablation.json", "configuration.json", "search_space.json")
DIGITS = 7


def pack(folder: Path, path: Path) -> None:
    """Write the finished runs of a results folder into one file.

    Args:
        folder: that `soaa ablate` wrote, of one workload.
        path: of the file.
    """
    head = {name: _read(folder / name) for name in HEAD if (folder / name).is_file()}
    runs = [_read(run) for run in sorted(folder.glob("runs/*.json"))]
    text = "".join(json.dumps(_short(line), sort_keys=True) + "\n" for line in [head, *runs])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(text.encode(), preset=9))


def unpack(path: Path, folder: Path) -> Path:
    """Write a file's runs into a results folder, from which everything can be reported and continued.

    Args:
        path: that `pack` wrote.
        folder: made where it does not exist.

    Returns:
        The folder.
    """
    head, *runs = _lines(path)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for name, content in head.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for run in runs:
        (folder / "runs" / f"{run['key']}.json").write_text(
            json.dumps(run, indent=1) + "\n", encoding="utf-8"
        )
    return folder


def runs(path: Path) -> list[Any]:
    """Return the runs of a file that `pack` wrote; none where there is no file."""
    return _lines(path)[1:] if path.is_file() else []


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).decode().splitlines()]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        # a configuration is what a run's key is a hash of: not a digit of it is dropped
        return {k: v if k in ("config", "configuration.json") else _short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return value
