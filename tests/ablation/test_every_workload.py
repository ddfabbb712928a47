"""Every workload as a short ablation: it trains, repeats itself bit for bit, and goes on where it was stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizers.ablation import Ablation, AblationError, ablate, workload
from optimizers.ablation.store import Store
from optimizers.ablation.workload import Batch, Data, Split, Workload

PARAMETERS = {
    "digits": 6_570,
    "fashion-mnist-logistic": 7_850,
    "fashion-mnist": 1_336_610,
    "fashion-mnist-2c2d": 3_274_634,
    "mnist-autoencoder": 2_837_314,
    "mnist-conv-autoencoder": 80_151,
    "character-gpt": 801_536 + 256 * 83,  # characters in the embedding and in the head
    "character-gpt-brown": 801_536 + 256 * 85,
    "image-folder": 11_177_538,  # ResNet-18 with 2 classes
}


class _Few:
    """A workload's own data of which an evaluation reads a few samples; counts how often each split is read."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self.batches = data.batches
        self.read: list[Split] = []

    def evaluation(self, split: Split, limit: int | None = None) -> Iterator[Batch]:
        self.read.append(split)
        return self._data.evaluation(split, min(limit or 8, 8))


def _images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = torch.Generator().manual_seed(0)
    for part, name in ((part, name) for part in ("train", "val") for name in ("cat", "dog")):
        (folder / part / name).mkdir(parents=True)
        for i in range(5):
            array = torch.randint(0, 256, (40, 60, 3), generator=pixels, dtype=torch.uint8).numpy()
            image.fromarray(array).save(folder / part / name / f"{i}.png")
    monkeypatch.setenv("SOAA_IMAGE_FOLDER", str(folder))
    monkeypatch.setattr("optimizers.ablation.workloads.image_folder.SIZE", 32)  # 1/49 of the arithmetic


@pytest.fixture(params=workload.names())
def problem(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workload:
    """Each workload, with its own model and data, or a skip where the data are not here."""
    if request.param == "image-folder":
        _images(tmp_path / "images", monkeypatch)
    else:
        monkeypatch.setattr("optimizers.ablation.data.download", _no_download)
    own = workload.get(request.param)
    try:
        own.prepare()
    except AblationError as error:
        pytest.skip(str(error))
    data = _Few(own.data())
    few = dataclasses.replace(own, data=lambda: data)
    monkeypatch.setattr(workload, "get", lambda name: few)
    return few


def _no_download(*arguments: object) -> None:
    raise AblationError("no data set here")


def _numbers(store: Store) -> list[dict[str, Any]]:
    """Everything that a run is a function of its configuration in: all but clocks and machine."""
    clocks = {"seconds", "seconds_per_step", "cpu_seconds", "cpu_seconds_per_step"}
    records = map(store.load, store.keys())
    return [
        {
            "status": record["status"], "trace": record["trace"],
            "result": {name: value for name, value in record["result"].items() if name not in clocks},
            "curve": {name: value for name, value in record["curve"].items() if name not in clocks},
        }
        for record in records
    ]  # fmt: skip


def test_short_ablation_repeats_itself_bit_for_bit_also_where_it_was_stopped(
    problem: Workload, tmp_path: Path
) -> None:
    ablation = Ablation(
        workload=problem.name, optimizers=("torch-adamw", "soaa"), learning_rates=(0.001,), seeds=1, steps=2,
        batch_size=4, evaluations=1,
    )  # fmt: skip
    outcome = ablate(ablation, tmp_path / "out")
    assert [row.error for row in outcome.rows] == ["", ""]
    store = Store(tmp_path / "out")
    first = _numbers(store)
    adamw, soaa = (row.records[0] for row in outcome.rows)
    assert adamw["curve"]["train_loss"][0] == soaa["curve"]["train_loss"][0]  # paired, to the last bit
    assert adamw["trace"]["batch_loss"][0] == soaa["trace"]["batch_loss"][0]
    assert adamw["curve"]["train_loss"][1] != adamw["curve"]["train_loss"][0]
    assert adamw["result"]["parameters"] == PARAMETERS[problem.name]
    assert adamw["result"]["gradients_per_step"] == soaa["result"]["gradients_per_step"] == 1.0
    data = problem.data()
    assert isinstance(data, _Few)
    assert data.read.count("test") == 2  # once a run, at its end
    # one of the two is lost, and made again after something else has drawn random numbers
    store.path(store.keys()[0]).unlink()
    torch.rand(3)
    ablate(ablation, tmp_path / "out")
    assert repr(_numbers(store)) == repr(first)
    assert data.read.count("test") == 3
