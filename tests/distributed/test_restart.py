"""A rank killed in training: torchrun restarts the job, which goes on from the last checkpoint bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/examples/trainers/torchrun_restart.py"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def torchrun(folder: Path, *die: str, restarts: int) -> tuple[int, str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", str(EXAMPLE), str(folder), *die]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=150)
    return done.returncode, done.stdout + done.stderr


def leaves(x: Any) -> list[torch.Tensor]:
    if isinstance(x, dict):
        return [t for v in x.values() for t in leaves(v)]
    if isinstance(x, list):
        return [t for v in x for t in leaves(v)]
    return [torch.as_tensor(x)]


def test_killed_rank_restarts_to_the_same_end(tmp_path: Path) -> None:
    """SIGKILL of one rank at step 8, two steps after a checkpoint; the end is that of a run nobody disturbed."""
    assert torchrun(tmp_path / "whole", restarts=0)[0] == 0
    code, text = torchrun(tmp_path / "killed", "1", "8", restarts=1)
    assert code == 0, text[-3000:]
    assert "exitcode: -9" in text, text[-3000:]
    assert "resumed after step 6" in text, text[-3000:]
    ends = [torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("whole", "killed")]
    for a, b in zip(leaves(ends[0]), leaves(ends[1]), strict=True):
        assert torch.equal(a, b)
