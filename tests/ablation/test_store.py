from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from optimizers.ablation import AblationError
from optimizers.ablation.store import Store, write_bytes, write_json


def test_what_is_saved_is_loaded_by_the_start_of_its_key(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("abc1", {"result": {"loss": [0.5, math.nan, math.inf]}})
    assert store.load("abc") == {"result": {"loss": [0.5, None, None]}}
    store.save("abc2", {})
    with pytest.raises(AblationError, match="2 finished runs"):
        store.load("abc")
    with pytest.raises(AblationError, match="no finished run"):
        store.load("x")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "run.json"
    write_bytes(path, b"old")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, moment, full)
    with pytest.raises(AblationError, match=r"No space left on device.*intact"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_is_one_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    # the real thing: every write to /dev/full fails as on a full disk
    with (
        pytest.raises(OSError, match=r"No space left") as caught,
        open("/dev/full", "wb", buffering=0) as stream,
    ):
        stream.write(b"x")
    assert caught.value.errno == 28  # what the other test raises is what the system raises


def test_second_process_is_refused_while_the_first_holds_the_folder(tmp_path: Path) -> None:
    first, second = Store(tmp_path), Store(tmp_path)
    with first.lock(), pytest.raises(AblationError, match="in use"), second.lock():
        pass
    with second.lock():
        pass


def test_half_written_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    left = store.runs / "abc.xyz.tmp"
    left.write_text("{")
    with store.lock():
        assert not left.exists()


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "ablation.json", {"version": 0})
    with pytest.raises(AblationError, match="format 0"):
        Store(tmp_path)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AblationError, match=r"cannot write results to .*file"):
        Store(tmp_path / "file" / "out")


@pytest.mark.parametrize("content", ['{"config": ', '{"config": {}}'])
def test_damaged_run_is_named_with_what_to_do(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path)
    store.path("abc").write_text(content)
    with pytest.raises(AblationError, match=r"abc\.json.*remove this file"):
        store.load("abc")
