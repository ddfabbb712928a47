"""Step records to TensorBoard, a CSV file or any callable, without a wait for the device on ordinary steps.

A record's entries are 0-d tensors on the parameters' device. They are kept there, one small tensor a step, and read
together every ``every`` steps: one wait for the device where reading each would be ten a step.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from optimizers.step_info import FIELDS

if TYPE_CHECKING:
    from optimizers.second_order import SecondOrder

Sink = Callable[[int, Mapping[str, float]], None]
"""Takes (step, record); NaN stands for an entry that does not apply."""


class Telemetry:
    """Hands every step's record to sinks, ``every`` steps at a time.

    A sink that raises (a full disk, a lost connection) gets no more records, with one warning that says so; the other
    sinks and the training go on.

    Args:
        optimizer: whose steps are recorded.
        sinks: where records go: a :class:`CSVSink`, a :class:`TensorBoardSink`, or any callable ``(step, record)``.
        every: k >= 1; the device is waited for once in k steps.
        first_step: the number of the first step, for a run that was resumed.

    Raises:
        ValueError: for ``every`` < 1 or no sink.

    >>> from optimizers import SOAA
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> optimizer, seen = SOAA([w]), []
    >>> with Telemetry(optimizer, [lambda step, record: seen.append((step, record["loss"]))], every=2):
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         optimizer.backward((w * 0).sum() + 5.0)
    ...         optimizer.step()
    >>> seen
    [(0, 5.0), (1, 5.0), (2, 5.0)]

    Cost: one kernel and 40 bytes a step on the device, one transfer every k steps.
    """

    def __init__(
        self, optimizer: SecondOrder, sinks: Sequence[Sink], every: int = 50, first_step: int = 0
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        if not sinks:
            raise ValueError("sinks must hold at least one callable")
        self.sinks = list(sinks)
        self.every = every
        self._step = first_step
        self._records: list[Tensor] = []
        self._handle = optimizer.register_step_post_hook(self._record)

    def _record(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        info = optimizer.step_info
        device = info.radius.device
        # float64 keeps a float64 loss; an accelerator without it has float32 records.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        entries = [info[name].detach().to(device=device, dtype=dtype, non_blocking=True) for name in FIELDS]
        self._records.append(torch.stack(entries))
        self._step += 1
        if len(self._records) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Read what was kept, and hand it on."""
        if not self._records:
            return
        rows = torch.stack(self._records).cpu().tolist()
        first = self._step - len(rows)
        self._records = []
        for i, row in enumerate(rows):
            record = dict(zip(FIELDS, row, strict=True))
            for sink in list(self.sinks):
                self._guarded(sink, lambda: sink(first + i, record))  # noqa: B023  called at once

    def close(self) -> None:
        """Flush, stop recording, and close sinks that can be closed."""
        self._handle.remove()
        self.flush()
        for sink in list(self.sinks):
            close = getattr(sink, "close", None)
            if close is not None:
                self._guarded(sink, close)

    def _guarded(self, sink: Sink, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self.sinks.remove(sink)
            warnings.warn(
                f"a telemetry sink, {sink!r}, failed and gets no more records: {type(error).__name__}: {error}",
                stacklevel=2,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class CSVSink:
    """Rows of ``step`` and every entry, appended to a file; a new file gets a header.

    A row is written at once and whole, so that a killed run leaves all rows that were handed on. Give every optimizer a
    file of its own: rows do not say whose they are.

    Args:
        path: the file, created with its folder.

    Raises:
        ValueError: for a file that has other columns.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = ["step", *FIELDS]
        fresh = not path.exists() or path.stat().st_size == 0
        torn = False
        if not fresh:
            with path.open("rb") as file:
                first = file.readline(1 << 16).decode(errors="replace").rstrip("\r\n")
                file.seek(-1, 2)
                torn = file.read(1) != b"\n"  # the run before was killed in a row
            if first.split(",") != header:
                raise ValueError(f"{path} has other columns than {','.join(header)}: give another file")
        self._file = path.open("a", newline="", buffering=1)
        if torn:
            self._file.write("\r\n")
        self._writer = csv.writer(self._file)
        if fresh:
            self._writer.writerow(header)

    def __call__(self, step: int, record: Mapping[str, float]) -> None:
        """Write one row."""
        self._writer.writerow([step, *(repr(record[name]) for name in FIELDS)])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Scalars ``prefix/entry``; entries that do not apply are left out.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or a folder to write to.
        prefix: of the scalars' names.

    Raises:
        ImportError: for a folder where ``tensorboard`` is not installed.
    """

    def __init__(self, writer: Any, prefix: str = "optimizer") -> None:
        self._own = isinstance(writer, (str, Path))
        if self._own:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(writer))
        self.writer = writer
        self.prefix = prefix

    def __call__(self, step: int, record: Mapping[str, float]) -> None:
        """Add the scalars of one step."""
        for name, value in record.items():
            if value == value:  # not NaN
                self.writer.add_scalar(f"{self.prefix}/{name}", value, step)

    def close(self) -> None:
        """Close a writer that was opened here, flush one that was given."""
        if self._own:
            self.writer.close()
        else:
            self.writer.flush()
