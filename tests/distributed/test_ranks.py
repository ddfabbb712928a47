"""Two and four gloo processes on this machine against one process, to 1e-9 in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.workers import spawn

pytestmark = pytest.mark.dist

SAME = [
    "check_ddp_equals_one_process",
    "check_shards_are_uneven_and_empty",
    "check_fsdp_equals_one_process",
    "check_bad_gradient_on_one_rank_skips_all",
]


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    refusals = ["check_loss_must_be_given_on_every_rank", "check_fsdp_refuses_double_backward_when_built"]
    spawn(2, [*SAME, "check_ddp_of_matrix_free_and_kronecker", *refusals], tmp_path)


def test_four_ranks_equal_one_process(tmp_path: Path) -> None:
    spawn(4, SAME, tmp_path)


def test_checkpoint_of_two_ranks_loads_on_one_and_four(tmp_path: Path) -> None:
    """``torch.distributed.checkpoint``, nested and flattened; the resumed run goes on as one that never stopped."""
    spawn(2, ["check_save_checkpoint"], tmp_path)
    for world in (1, 4):
        spawn(world, ["check_load_checkpoint"], tmp_path)
