"""A worker process: reads run configurations from standard input, writes runs to the store.

Started by `executor`; each line in is a configuration, each line out says how far the run is.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import IO, Any

from optimizers.ablation.config import RunConfig
from optimizers.ablation.errors import AblationError
from optimizers.ablation.executor import replayed
from optimizers.ablation.run import train
from optimizers.ablation.store import Store


def main(folder: str) -> None:
    """Make runs until the input ends; end at once when the process that started this one is gone."""
    # nothing that a run prints may be taken for a message
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    store = Store(Path(folder))
    tasks: queue.Queue[dict[str, Any] | None] = queue.Queue()
    busy = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            busy.set()  # from here on: between taking a task and beginning it the input may end as well
            tasks.put(json.loads(line))
        if busy.is_set():
            os._exit(1)  # the input of a busy worker ends only when its parent has died
        tasks.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (task := tasks.get()) is not None:
        config = RunConfig.from_dict(task)
        try:
            _say(output, step=0)
            store.save(
                config.key, train(config, lambda step: _say(output, step=step), replayed(config, store))
            )
        except AblationError as error:
            _say(output, fatal=str(error))
            return
        busy.clear()
        _say(output, step=config.steps, finished=True)


def _say(output: IO[bytes], **message: object) -> None:
    output.write(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
