"""Where data sets are found, how they are downloaded and verified, and how idx files are read.

A data set is looked for in ``$SOAA_DATA``, then in the usual places, then downloaded with pooch. What is
verified is the SHA-256 of the *uncompressed* bytes: the published gzip files exist in several forms that
differ in their header only.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optimizers.ablation.errors import AblationError


@dataclass(frozen=True)
class DataSet:
    """A data set: its folder name, its files with the SHA-256 of their content, and where they are published."""

    name: str
    files: tuple[tuple[str, str], ...]
    mirrors: tuple[str, ...] = ()


FASHION_MNIST = DataSet(
    "fashion-mnist",
    (
        ("train-images-idx3-ubyte.gz", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        ("train-labels-idx1-ubyte.gz", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
        ("t10k-images-idx3-ubyte.gz", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        ("t10k-labels-idx1-ubyte.gz", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    ),
    ("https://fashion-mnist.s3.eu-central-1.amazonaws.com/",),
)
MNIST = DataSet(
    "mnist",
    (
        ("train-images-idx3-ubyte.gz", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        ("train-labels-idx1-ubyte.gz", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
        ("t10k-images-idx3-ubyte.gz", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        ("t10k-labels-idx1-ubyte.gz", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    ),
    ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
)
BROWN = DataSet(
    "text", (("brown.txt.gz", "b751a018d032388769444b606974db92b38cfcf24ed3b0c9acc10a1847891284"),)
)


def cache_folder() -> Path:
    """Return the folder that downloads go to: ``$XDG_CACHE_HOME/soaa`` or ``~/.cache/soaa``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "soaa"


def usual_places() -> list[Path]:
    """Return the folders in which data sets are looked for, first choice first."""
    places = [Path(os.environ["SOAA_DATA"])] if os.environ.get("SOAA_DATA") else []
    return [*places, Path("/usr/share/datasets"), cache_folder()]


def locate(data_set: DataSet) -> Path | None:
    """Return the folder that holds every file of the data set, or None where no usual place does."""
    for place in usual_places():
        folder = place / data_set.name
        if all((folder / file).is_file() for file, _ in data_set.files):
            return folder
    return None


def prepare(data_set: DataSet) -> Path:
    """Return the folder that holds the data set, downloading it where no usual place has it.

    Args:
        data_set: what to look for.

    Returns:
        The folder with every file of the data set.

    Raises:
        AblationError: it is nowhere, and it cannot be downloaded or what came is not what was published.
    """
    folder = locate(data_set)
    return download(data_set, cache_folder()) if folder is None else folder


def download(data_set: DataSet, into: Path, mirrors: Sequence[str] | None = None) -> Path:
    """Download a data set with pooch and verify the content of each file.

    Args:
        data_set: what to download.
        into: the folder in which ``data_set.name`` is made.
        mirrors: addresses to try, first choice first; the data set's own where None.

    Returns:
        The folder with the files. A file appears there only after its content was verified.

    Raises:
        AblationError: no mirror gave a file with the published content, or it cannot be written.
    """
    addresses = data_set.mirrors if mirrors is None else tuple(mirrors)
    folder = into / data_set.name
    advice = f"put {', '.join(file for file, _ in data_set.files)} into $SOAA_DATA/{data_set.name}"
    if not addresses:
        raise AblationError(f"data set {data_set.name!r} was not found and has no download: {advice}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AblationError(f"cannot write data set {data_set.name!r} to {folder}: {error}") from error
    for file, digest in data_set.files:
        if not (folder / file).is_file():
            _download_file(file, digest, folder, addresses, f"data set {data_set.name!r}", advice)
    return folder


def _download_file(
    file: str, digest: str, folder: Path, addresses: Sequence[str], subject: str, advice: str
) -> None:
    import pooch

    pooch.get_logger().setLevel("ERROR")
    problem = ""
    for address in addresses:
        # the target's own file system, so that the final rename is atomic
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            try:
                # content is verified below: the hash of a gzip file depends on who compressed it
                path = pooch.retrieve(address.rstrip("/") + "/" + file, None, fname=file, path=scratch)
                found = content_sha256(Path(path))
            except Exception as error:  # whatever the network, the server or the file system does
                problem = f"{address}{file}: {type(error).__name__}: {str(error)[:80]}".splitlines()[0]
                continue
            if found == digest:
                os.replace(path, folder / file)
                return
            problem = f"{address}{file}: content has SHA-256 {found[:12]}..., expected {digest[:12]}..."
    raise AblationError(f"{subject} was not found and its download failed ({problem}): {advice}")


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a gzip file's uncompressed content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with gzip.open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@functools.lru_cache(maxsize=8)
def read_idx(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read a gzip-compressed idx file of unsigned bytes (the format of MNIST).

    Args:
        path: the file.

    Returns:
        The array, with the shape that the file's header gives; shared between calls, so it is read-only.

    Raises:
        AblationError: the file is damaged or is not an idx file of unsigned bytes.
    """
    try:
        with gzip.open(path, "rb") as stream:
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise AblationError(f"data file {path} cannot be read: {error}") from error
    dimensions = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    dimensions = dimensions if len(content) >= 4 + 4 * dimensions else 0
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, 4)) if dimensions else ()
    if not shape or len(content) != 4 + 4 * dimensions + int(np.prod(shape)):
        raise AblationError(f"data file {path} is not an idx file of unsigned bytes, or it is cut off")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
