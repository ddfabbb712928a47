"""Telemetry: every step arrives once, as it was, and nothing is read from the device in between."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers import SOAA
from optimizers.step_info import FIELDS
from optimizers.telemetry import CSVSink, Telemetry, TensorBoardSink


def run(steps: int, sinks: list, every: int, first_step: int = 0) -> list[dict[str, float]]:
    w = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = SOAA([w], lr=0.1, total_steps=steps)
    told = []
    with Telemetry(optimizer, sinks, every=every, first_step=first_step):
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.backward((w * w).sum())
            optimizer.step()
            told.append(optimizer.step_info.as_floats())
    optimizer.step(loss=1.0)  # after closing nothing is recorded
    return told


@pytest.mark.parametrize("every", [1, 3, 100])
def test_callable_sees_every_step_once_and_in_order(every: int) -> None:
    seen: list = []
    told = run(7, [lambda step, record: seen.append((step, dict(record)))], every, first_step=10)
    assert [step for step, _ in seen] == list(range(10, 17))
    for (_, record), expected in zip(seen, told, strict=True):
        assert record == pytest.approx(expected, nan_ok=True)


def test_records_are_read_only_every_k_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or original(self))
    seen: list = []
    run(9, [lambda step, record: seen.append(step)], every=4)
    records = [shape for shape in reads if shape[-1:] == (len(FIELDS),)]
    assert records == [(4, len(FIELDS)), (4, len(FIELDS)), (1, len(FIELDS))]


def test_ordinary_steps_wait_for_nothing() -> None:
    """Not one number is read from a tensor between two flushes, by whatever way; a flush copies once."""

    class Reads(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.is_nonzero.default,
            )
            return func(*args, **(kwargs or {}))

    w = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = SOAA([w], lr=0.1)
    telemetry = Telemetry(optimizer, [lambda step, record: None], every=100)
    telemetry._handle.remove()  # its hook is called below, where it is watched
    for _ in range(5):
        optimizer.backward((w * w).sum())
        optimizer.step()
        with Reads() as reads:
            telemetry._record(optimizer, (), {})
        assert reads.count == 0
    with Reads() as reads:
        float(optimizer.step_info.radius)
    assert reads.count == 1  # the watch sees what it should
    telemetry.close()


def test_csv_appends_to_one_header(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "steps.csv"
    told = run(3, [CSVSink(path)], every=2)
    run(2, [CSVSink(path)], every=2, first_step=3)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [0, 1, 2, 3, 4]
    assert float(rows[1]["loss"]) == pytest.approx(told[1]["loss"])


@pytest.mark.parametrize("every", [1, 4])
def test_a_sink_that_fails_is_dropped_and_training_goes_on(every: int, tmp_path: Path) -> None:
    """A full disk (``/dev/full`` where there is one), a callable that raises at step 2, one that cannot be closed."""

    class Raises:
        def __call__(self, step: int, record: Any) -> None:
            if step == 2:
                raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise AssertionError("it was dropped before")

    class Unclosable:
        def __call__(self, step: int, record: Any) -> None:
            pass

        def close(self) -> None:
            raise RuntimeError("the connection is gone")

    seen: list[int] = []
    sinks: list[Any] = [Raises(), lambda step, record: seen.append(step), Unclosable()]
    full = Path("/dev/full")
    if full.exists():
        sink = CSVSink(tmp_path / "steps.csv")
        sink._file.close()
        sink._file = full.open("a", newline="", buffering=1)
        sink._writer = csv.writer(sink._file)
        sinks.append(sink)
    with pytest.warns(UserWarning, match="gets no more records") as told:
        run(6, sinks, every)
    assert seen == list(range(6))
    assert len([w for w in told if "gets no more records" in str(w.message)]) == 2 + full.exists()
    if full.exists():
        with contextlib.suppress(OSError):  # what it could not write is still there
            sink.close()


def test_csv_rows_of_two_writers_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    a, b = CSVSink(path), CSVSink(path)
    record = dict.fromkeys(FIELDS, 1.0 / 3.0)
    for step in range(200):
        (a, b)[step % 2](step, record)
    rows = list(csv.reader(path.read_text().splitlines()))  # before anything is closed
    assert [r[0] for r in rows] == ["step", *map(str, range(200))]
    assert {len(r) for r in rows} == {1 + len(FIELDS)}
    a.close(), b.close()


def test_csv_goes_on_after_a_torn_row_and_refuses_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    run(2, [CSVSink(path)], every=1)
    with path.open("a") as file:
        file.write("2,0.5")
    run(1, [CSVSink(path)], every=1, first_step=3)
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "0", "1", "2", "3"]
    other = tmp_path / "other.csv"
    other.write_text("time,loss\n0,1\n")
    with pytest.raises(ValueError, match="has other columns"):
        CSVSink(other)


def test_tensorboard_files_hold_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = run(4, [TensorBoardSink(tmp_path)], every=3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = events.Scalars("optimizer/radius")
    assert [e.step for e in found] == [0, 1, 2, 3]
    assert [e.value for e in found] == pytest.approx([t["radius"] for t in told])


def test_bad_arguments_are_refused() -> None:
    optimizer = SOAA([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        Telemetry(optimizer, [print], every=0)
    with pytest.raises(ValueError, match="sink"):
        Telemetry(optimizer, [])
