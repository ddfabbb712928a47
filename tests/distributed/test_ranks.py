"""Two and four gloo processes on this machine against one process, to 1e-9 in float64 (presets: 1e-6)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.processes import spawn

pytestmark = pytest.mark.dist

SAME = [
    "data_parallel.compositions_equal_one_process",
    "data_parallel.bad_gradient_on_one_rank_skips_all",
    "data_parallel.bad_outputs_on_one_rank_skip_all",
    "fully_sharded.shards_are_uneven_and_empty",
    "fully_sharded.compositions_equal_one_process",
    "differences.equal_one_process",
    "inverses.work_falls_with_ranks",
    "inverses.bases_stay_with_their_owners",
]


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    refusals = ["data_parallel.loss_must_be_given_on_every_rank", "fully_sharded.refusals_when_built"]
    refusals += [
        "inverses.failure_on_one_rank_is_heard_by_all",
        "inverses.one_rank_that_cannot_hold_its_rows",
        "inverses.bases_are_iterated_alike",
    ]
    spawn(2, [*SAME, "data_parallel.presets_equal_one_process", *refusals], tmp_path)


PRACTICE = [
    "practice.accumulation_without_a_sync",
    "practice.clipping",
    "practice.scaler_skips_on_all_ranks",
    "practice.hybrid_shards",
    "practice.shards_in_bfloat16",
    "practice.ways_of_ddp",
    "inverses.first_gradients_of_ddp_are_summed_in_another_order",
]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_in_practice(world: int, tmp_path: Path) -> None:
    spawn(world, PRACTICE, tmp_path)


def test_four_ranks_equal_one_process(tmp_path: Path) -> None:
    spawn(4, SAME, tmp_path)


def test_checkpoint_of_two_ranks_loads_on_one_and_four(tmp_path: Path) -> None:
    """``torch.distributed.checkpoint``, nested and flattened; the resumed run goes on as one that never stopped."""
    spawn(2, ["checkpoints.save"], tmp_path)
    for world in (1, 4):
        spawn(world, ["checkpoints.load"], tmp_path)
