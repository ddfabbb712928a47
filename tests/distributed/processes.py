"""Ranks of a test: gloo processes that meet in a file, run checks, and leave together."""

from __future__ import annotations

import datetime as dt
import importlib
import multiprocessing
import os
import sys
import traceback
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = dt.timedelta(seconds=120)
"""A rank that waits longer has lost the others."""


def run(rank: int, world: int, meeting: str, checks: list[str], folder: str) -> None:
    """One rank: join, run every check, leave."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    # A file, not a port: a port that was found free may be taken by another test before this one binds it.
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    for name in checks:
        module, _, function = name.rpartition(".")
        try:
            home = module if module.startswith("tests.") else f"tests.distributed.{module}"
            getattr(importlib.import_module(home), function)(Path(folder))
        except BaseException as error:
            raise AssertionError(f"{name} on rank {rank}: {traceback.format_exc()}") from error
    dist.barrier()  # nobody takes its connections away while another still uses them
    dist.destroy_process_group()
    # What DDP's reducer or a device mesh still holds keeps gloo's threads alive. One that is the last to let go of a
    # tensor asks for the interpreter; while that shuts down the thread is ended instead, through frames that may not
    # be unwound, and the process aborts although all went well. A delay of 20 ms in these threads shows it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def spawn(world: int, checks: list[str], folder: Path) -> None:
    """Run every check, ``module.function`` or ``tests.module.function``, on ``world`` ranks; raise where one fails."""
    meeting = folder / f"meeting-{uuid.uuid4().hex}"
    # One server a test process imports torch; its children, the ranks, start at once.
    multiprocessing.set_forkserver_preload(
        ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
    )
    mp.start_processes(
        run,
        args=(world, str(meeting), checks, str(folder)),
        nprocs=world,
        join=True,
        start_method="forkserver",
    )
