"""What a source is: a list of offered images in a fixed order, with their labels, and a way to read some of them."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from sanitize.errors import ConfigError
from sanitize.tar.names import printable

MAX_CLASSES = 100_000  # class names that are held in memory
MAX_CLASS_NAME = 1_000  # characters


class Offered(NamedTuple):
    """One image that a source offers.

    Attributes:
        number: its position in the sorted list of the source; the key of the sample.
        name: path of the file in the source, or file and row of a table.
        data: encoded image; empty where there is a problem.
        label: number of the class; None in a source without classes.
        captions: captions of the image, the first one first.
        problem: reason why the image cannot be used, or None.
    """

    number: int
    name: str
    data: bytes
    label: int | None = None
    captions: tuple[str, ...] = ()
    problem: str | None = None


class Source(Protocol):
    """A listed source.

    Attributes:
        classes: class names by number; None without classes.
        sizes_N: size of each offered image in bytes, int64 (N,); an estimate for rows of a table.
        stamp: size of the source in bytes, and a digest of the names, sizes and times of its files.
        notes: counts of what the source holds beside images, by what it is.
    """

    classes: list[str] | None
    sizes_N: np.ndarray
    stamp: dict[str, str | int]
    notes: dict[str, int]

    def order(self, generator: torch.Generator | None) -> np.ndarray:
        """Numbers of all images in the order of the shards, int64 (N,); without a generator the sorted order."""
        ...

    def read(self, numbers: Sequence[int]) -> Iterator[Offered]:
        """The images of these numbers, neighbours in `order`. Raises DataError where a disk or a store fails."""
        ...


def class_numbers(names: Iterable[str]) -> dict[str, int]:
    """Number of each class name: its place among the sorted names. Names that all are integers are sorted as integers.

    Raises:
        ConfigError: there are more than `MAX_CLASSES` names.
    """
    found = set(names)
    if len(found) > MAX_CLASSES:
        raise ConfigError(f"more than {MAX_CLASSES:,} class names: is it the right column? Choose with --label-column")
    if all(name.isascii() and name.removeprefix("-").isdigit() and len(name) < 20 for name in found):
        return {name: number for number, name in enumerate(sorted(found, key=lambda name: (int(name), name)))}
    return {name: number for number, name in enumerate(sorted(found, key=as_bytes))}


def shown_names(names: Iterable[str]) -> list[str]:
    """Class names as tables and terminals show them. Raises ConfigError where two become the same."""
    shown = list(map(printable, names))
    if len(set(shown)) < len(shown):
        twice = next(name for i, name in enumerate(shown) if name in shown[:i])
        raise ConfigError(f"two class names are {twice!r} where unprintable characters are written out; rename one")
    return shown


def as_bytes(name: str) -> bytes:
    """The bytes of a name, which give the order of names."""
    return name.encode("utf-8", "surrogatepass")


def stamp_of(parts: Iterable[tuple[object, ...]], size: int) -> dict[str, str | int]:
    """Stamp of a source: any change of a part changes it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "surrogatepass") + b"\n")
    return {"size": size, "modified": digest.hexdigest()}
