from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from optimizers.ablation import AblationError
from optimizers.ablation.data import DataSet, download, locate, prepare, read_idx

CONTENT = b"some bytes that were published" * 50
DIGEST = hashlib.sha256(CONTENT).hexdigest()
DATA_SET = DataSet("small", (("a.gz", DIGEST), ("b.gz", DIGEST)))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as instance:
        thread = threading.Thread(target=instance.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{instance.server_port}/"
        instance.shutdown()
        thread.join()


def test_download_takes_any_gzip_form_of_the_published_content(
    server: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = server
    (folder / "a.gz").write_bytes(gzip.compress(CONTENT, 1, mtime=1))
    (folder / "b.gz").write_bytes(gzip.compress(CONTENT, 9, mtime=2))
    found = download(DATA_SET, tmp_path / "cache", [address])
    assert gzip.decompress((found / "a.gz").read_bytes()) == CONTENT
    assert sorted(path.name for path in found.iterdir()) == ["a.gz", "b.gz"]


@pytest.mark.parametrize(
    "served", [gzip.compress(CONTENT[:-1]), b"not gzip", None], ids=["other", "no gzip", "404"]
)
def test_wrong_content_never_lands_and_the_next_mirror_is_tried(
    server: tuple[Path, str], tmp_path: Path, served: bytes | None
) -> None:
    folder, address = server
    (folder / "bad").mkdir()
    if served is not None:
        for name in ("a.gz", "b.gz"):
            (folder / "bad" / name).write_bytes(served)
    cache = tmp_path / "cache"
    with pytest.raises(AblationError, match="SOAA_DATA/small"):
        download(DATA_SET, cache, [address + "bad/"])
    assert list((cache / "small").iterdir()) == []
    for name in ("a.gz", "b.gz"):
        (folder / name).write_bytes(gzip.compress(CONTENT))
    assert download(DATA_SET, cache, [address + "bad/", address]) == cache / "small"


def test_environment_variable_comes_first_and_an_incomplete_folder_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOAA_DATA", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for place in ("mine", "cache/soaa"):
        (tmp_path / place / "small").mkdir(parents=True)
        (tmp_path / place / "small" / "a.gz").touch()
    assert locate(DATA_SET) is None
    (tmp_path / "cache/soaa/small/b.gz").touch()
    assert locate(DATA_SET) == tmp_path / "cache/soaa/small"
    (tmp_path / "mine/small/b.gz").touch()
    assert prepare(DATA_SET) == tmp_path / "mine/small"


def test_missing_without_a_download_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOAA_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(AblationError, match=r"put a.gz, b.gz into \$SOAA_DATA/small"):
        prepare(DATA_SET)


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_idx_is_read_as_it_was_written(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(_idx(array)))
    assert np.array_equal(read_idx(path), array)


@pytest.mark.parametrize("cut", [-1, 2, 10], ids=["short by one", "no header", "half a header"])
def test_damaged_idx_is_named(tmp_path: Path, cut: int) -> None:
    content = _idx(np.zeros((3, 4, 5), dtype=np.uint8))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(content[:cut]))
    with pytest.raises(AblationError, match=r"cut\.gz"):
        read_idx(tmp_path / "cut.gz")
    (tmp_path / "half.gz").write_bytes(gzip.compress(content)[:-12])
    with pytest.raises(AblationError, match=r"half\.gz"):
        read_idx(tmp_path / "half.gz")
