"""Data sets: files into tensors, and batches drawn from them.

Every malformed file raises `DataError` with the file's name and what to do about it; a file that is
not there raises `MissingData`. Fetching files is in `download`.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EMBEDDED = Path(__file__).parent / "digits"
EMBEDDED_NAME = "embedded digits"

# MNIST's four files and the MD5 sums of their uncompressed contents. Other sets of the same format
# have the same names and other contents.
IDX_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c629615203637",
}
FASHION_FILES = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}

CIFAR10_FILES = [*(f"data_batch_{part}.bin" for part in range(1, 6)), "test_batch.bin"]
CIFAR10_IMAGE = (3, 32, 32)


class DataError(Exception):
    """A data file that is there but cannot be used; the message names it and the mend."""


class MissingData(Exception):
    """A data file that is not there; the message says how to get it."""


@dataclass(frozen=True)
class Batch:
    """X: (batch, channels, height, width), floats in [0, 1]. labels: (batch,), integers."""

    X: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class DataSet:
    """Labelled images for training and for testing; each is its own equal alone.

    Images are bytes (count, channels, height, width), kept so because a batch is quickly made
    float and CIFAR-10 as floats would fill 700 MB; labels are int64 (count,).
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def summary(self) -> dict[str, str | int]:
        return {
            "name": self.name,
            "training images": len(self.train_images),
            "test images": len(self.test_images),
        }

    def described(self, steps: int, batch_size: int) -> str:
        """The data set's name and size, and how many epochs ``steps`` steps are."""
        epochs = steps / (len(self.train_images) // batch_size)
        count = f"{len(self.train_images):,}".replace(",", " ")
        return (
            f"{self.name} ({count} training images): "
            f"{steps} steps of {batch_size} are {epochs:.2g} epochs"
        )

    def train_batches(
        self, steps: int, batch_size: int, seed: int, device: torch.device
    ) -> Iterator[Batch]:
        """``steps`` batches, each epoch in a new random order, an incomplete last batch dropped."""
        generator = torch.Generator().manual_seed(seed)
        per_epoch = len(self.train_images) // batch_size
        if per_epoch == 0:
            raise DataError(
                f"{self.name} has {len(self.train_images)} training images, "
                f"fewer than one batch of {batch_size}"
            )
        for step in range(steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(self.train_images), generator=generator)
            start = step % per_epoch * batch_size
            chosen = order[start : start + batch_size]
            yield _batch(self.train_images, self.train_labels, chosen, device)

    def test_batches(
        self, steps: int, batch_size: int, seed: int, device: torch.device
    ) -> Iterator[Batch]:
        """``steps`` batches, each drawn anew from all test images."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randperm(len(self.test_images), generator=generator)[:batch_size]
            yield _batch(self.test_images, self.test_labels, chosen, device)

    def all_test_batches(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Every test image once, in order."""
        for chosen in torch.arange(len(self.test_images)).split(batch_size):
            yield _batch(self.test_images, self.test_labels, chosen, device)


def _batch(images: Tensor, labels: Tensor, chosen: Tensor, device: torch.device) -> Batch:
    X = images[chosen].to(device).to(torch.get_default_dtype()) / 255
    return Batch(X, labels[chosen].to(device))


def load_digits(folder: Path | None) -> DataSet:
    """The digits in ``folder``, or the embedded ones where there are none (or no folder).

    Any four IDX files with MNIST's names will do, plain or gzipped, in the folder itself or in its
    ``mnist`` or ``MNIST/raw``.
    """
    return load_idx(idx_folder(folder) or EMBEDDED)


def idx_folder(folder: Path | None) -> Path | None:
    """Where in ``folder`` IDX files lie, if any do."""
    return _first_with_idx(folder, "", "mnist", "MNIST/raw")


def fashion_folder(folder: Path | None) -> Path | None:
    """Where in ``folder`` the files of Fashion-MNIST lie, if any do."""
    return _first_with_idx(folder, "fashion-mnist", "FashionMNIST/raw")


def _first_with_idx(folder: Path | None, *inside: str) -> Path | None:
    for place in () if folder is None else (folder / name for name in inside):
        if any(_idx_path(place, name) for name in IDX_FILES):
            return place
    return None


def load_idx(folder: Path) -> DataSet:
    """The data set whose four IDX files lie in ``folder``."""
    missing = [name for name in IDX_FILES if _idx_path(folder, name) is None]
    if missing:
        raise MissingData(
            f"{folder} lacks {', '.join(missing)} (plain or .gz): "
            "put the missing files beside the others, or run with --download"
        )
    paths = [_idx_path(folder, name) for name in IDX_FILES]
    return _read_idx_files(folder, *[(path, path.stat().st_mtime_ns) for path in paths])


@cache
def _read_idx_files(folder: Path, *files: tuple[Path, int]) -> DataSet:
    """The same; of files that have not changed since they were read, the same object."""
    paths = [path for path, _ in files]
    train_images, train_labels, test_images, test_labels = map(read_idx, paths)
    for images, labels, of in (train_images, train_labels, 0), (test_images, test_labels, 2):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"{paths[of]} has shape {tuple(images.shape)} and {paths[of + 1]} has shape "
                f"{tuple(labels.shape)}, but they must be (count, height, width) and (count,): "
                "take all four files from the same source"
            )
    return DataSet(
        _name_of(folder, train_images),
        train_images.unsqueeze(1),
        train_labels.long(),
        test_images.unsqueeze(1),
        test_labels.long(),
    )


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes, plain or gzipped, as a uint8 tensor.

    The format: two zero bytes, a type byte (8 for unsigned bytes), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the values.
    """
    mend = "fetch the file again"
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file ({error}): {mend}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(
            f"{path} starts with the bytes {content[:4].hex(' ') or '(none)'}, but an IDX file of "
            f"bytes starts with 00 00 08: {mend}"
        )
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist()) if len(content) >= start else ()
    if len(shape) != content[3] or len(content) - start != math.prod(shape):
        raise DataError(
            f"{path} holds {len(content)} bytes, but its header of {content[3]} dimensions "
            f"{shape} announces {start + math.prod(shape)}: {mend}"
        )
    if 0 in shape:
        raise DataError(f"{path} announces the shape {shape}, so it holds nothing: {mend}")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)


def load_cifar10(folder: Path | None) -> DataSet:
    """CIFAR-10 from its binary version's files in ``folder`` or its ``cifar-10-batches-bin``.

    Each record is one label byte and 3072 pixel bytes: the red, the green and the blue plane.
    """
    place = cifar10_folder(folder)
    if place is None:
        raise MissingData(
            f"it needs CIFAR-10's binary version ({CIFAR10_FILES[0]} ... {CIFAR10_FILES[-1]}): "
            "run with --download, or put these files into a folder and name it with --data"
        )
    missing = [name for name in CIFAR10_FILES if not (place / name).is_file()]
    if missing:
        raise MissingData(
            f"{place} lacks {', '.join(missing)}: "
            "put the missing files beside the others, or run with --download"
        )
    paths = [place / name for name in CIFAR10_FILES]
    return _read_cifar10_files(*[(path, path.stat().st_mtime_ns) for path in paths])


@cache
def _read_cifar10_files(*files: tuple[Path, int]) -> DataSet:
    """The same; of files that have not changed since they were read, the same object."""
    parts = [_read_cifar10(path) for path, _ in files]
    records = torch.cat(parts[:-1]), parts[-1]
    images = [part[:, 1:].reshape(-1, *CIFAR10_IMAGE) for part in records]
    labels = [part[:, 0].long() for part in records]
    return DataSet("CIFAR-10", images[0], labels[0], images[1], labels[1])


def cifar10_folder(folder: Path | None) -> Path | None:
    """Where in ``folder`` CIFAR-10's files lie, if any do."""
    for place in () if folder is None else (folder, folder / "cifar-10-batches-bin"):
        if any((place / name).is_file() for name in CIFAR10_FILES):
            return place
    return None


def _read_cifar10(path: Path) -> Tensor:
    record = 1 + math.prod(CIFAR10_IMAGE)
    content = path.read_bytes()
    if not content or len(content) % record:
        raise DataError(
            f"{path} holds {len(content)} bytes, which is no multiple of CIFAR-10's record of "
            f"{record}: fetch the file again (the binary version, not the one for Python)"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, record)
    if records[:, 0].max() > 9:
        raise DataError(
            f"{path} holds the label {records[:, 0].max()}, but CIFAR-10's go from 0 to 9: "
            "fetch the file again (the binary version of CIFAR-10, not of CIFAR-100)"
        )
    return records


def check_digest(path: Path, algorithm: str, expected: str, *, uncompressed: bool = False) -> None:
    """Raise `DataError` unless the digest of the file, or of what it compresses, starts so."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with gzip.open(path) if uncompressed else path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file ({error})") from error
    if not digest.hexdigest().startswith(expected):
        raise DataError(
            f"{path} has the {algorithm.upper()} sum {digest.hexdigest()}, but {expected} is "
            "expected: fetch the file again"
        )


def _idx_path(folder: Path, name: str) -> Path | None:
    for path in folder / name, folder / f"{name}.gz":
        if path.is_file():
            return path
    return None


def _name_of(folder: Path, train_images: Tensor) -> str:
    if folder == EMBEDDED:
        return EMBEDDED_NAME
    header = b"\x00\x00\x08\x03" + np.array(train_images.shape, ">u4").tobytes()
    digest = hashlib.md5(header + train_images.numpy().tobytes(), usedforsecurity=False)
    for name, files in ("MNIST", IDX_FILES), ("Fashion-MNIST", FASHION_FILES):
        if digest.hexdigest() == files["train-images-idx3-ubyte"]:
            return name
    return f"IDX files of {folder.resolve().name}"
