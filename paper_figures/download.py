"""Fetching the data sets, when asked for, from their usual mirrors.

A file gets its name only once it is complete and its checksum is right; a broken transfer leaves
nothing and is started anew. How files are read is in `data` and `nets`.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from paper_figures.data import (
    CIFAR10_FILES,
    FASHION_FILES,
    IDX_FILES,
    DataError,
    check_digest,
    cifar10_folder,
    fashion_folder,
    idx_folder,
)
from paper_figures.nets import VGG19_FILE
from paper_figures.report import write_atomically

MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FASHION_MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
CIFAR10_MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)
CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
VGG19_MIRRORS = ("https://download.pytorch.org/models/",)
VGG19_SHA256 = "dcbb9e9d"

ROUNDS = 2
TIMEOUT_SECONDS = 30


def fetch_mnist(folder: Path) -> None:
    """MNIST's four files, into where others of them lie, or else into ``folder/mnist``."""
    _fetch_idx(idx_folder(folder) or folder / "mnist", IDX_FILES, MNIST_MIRRORS)


def fetch_fashion(folder: Path) -> None:
    """Fashion-MNIST's, into where others of them lie, or else into ``folder/fashion-mnist``."""
    _fetch_idx(fashion_folder(folder) or folder / "fashion-mnist", FASHION_FILES, FASHION_MIRRORS)


def _fetch_idx(place: Path, files: Mapping[str, str], mirrors: Sequence[str]) -> None:
    for name, md5 in files.items():
        # The sum is that of the uncompressed file, as each compression has other bytes.
        check = partial(check_digest, algorithm="md5", expected=md5, uncompressed=True)
        if not (place / name).is_file():
            fetch(place / f"{name}.gz", mirrors, check)


def fetch_cifar10(folder: Path) -> None:
    """The binary version of CIFAR-10, unpacked into ``folder/cifar-10-batches-bin``."""
    place = cifar10_folder(folder) or folder / "cifar-10-batches-bin"
    if all((place / name).is_file() for name in CIFAR10_FILES):
        return
    archive = folder / CIFAR10_ARCHIVE
    fetch(archive, CIFAR10_MIRRORS, partial(check_digest, algorithm="md5", expected=CIFAR10_MD5))
    place.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name).name
            content = tar.extractfile(member) if name in CIFAR10_FILES else None
            if content is not None:
                write_atomically(place / name, partial(Path.write_bytes, data=content.read()))
    archive.unlink()


def fetch_vgg19(folder: Path) -> None:
    """torchvision's ImageNet weights of VGG-19 (550 MB), into ``folder``."""
    check = partial(check_digest, algorithm="sha256", expected=VGG19_SHA256)
    fetch(folder / VGG19_FILE, VGG19_MIRRORS, check)


DATA_SETS: dict[str, Callable[[Path], None]] = {
    "mnist": fetch_mnist,
    "fashion": fetch_fashion,
    "cifar10": fetch_cifar10,
    "vgg19": fetch_vgg19,
}


def fetch(path: Path, mirrors: Sequence[str], check: Callable[[Path], None]) -> None:
    """Fetch ``path`` by its name from the first mirror that has it whole, unless it is there."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unchecked = path.with_name(f".{path.name}.unchecked")
    failures = []
    for url in [mirror + path.name for mirror in mirrors] * ROUNDS:
        print(f"fetching {url}", file=sys.stderr)
        try:
            with _timeout():
                torch.hub.download_url_to_file(url, str(unchecked))
            check(unchecked)
            os.replace(unchecked, path)
            return
        except (OSError, http.client.HTTPException, DataError) as error:
            failures.append(f"  {url}: {error}")
        finally:
            unchecked.unlink(missing_ok=True)
    raise DataError(
        f"{path.name} could not be fetched:\n"
        + "\n".join(dict.fromkeys(failures))
        + f"\nFetch it by hand from there, or from elsewhere, and put it at {path.resolve()}"
    )


@contextmanager
def _timeout() -> Iterator[None]:
    """A time-out for torch.hub, which sets none and would wait for a silent server for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
