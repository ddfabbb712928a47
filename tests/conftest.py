"""Settings that hold for every test, those in the packages' docstrings included."""

from __future__ import annotations

import gc
import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # A pytest-xdist worker is one of several on this machine: with a thread pool each they would queue for
    # the same cores. The environment variables are for the processes that a test starts.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["MKL_NUM_THREADS"] = "1"
    os.environ.setdefault("MPLBACKEND", "agg")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="module")
def _heap_of_a_module() -> None:
    """Leave what earlier modules imported out of collections: tests that count living tensors look at all objects."""
    gc.collect()
    gc.freeze()
