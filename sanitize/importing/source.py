"""What a source is: a list of offered images in a fixed order, with their labels, and a way to read some of them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from sanitize.errors import ConfigError, DataError
from sanitize.storage import open_read
from sanitize.tar.names import printable

MAX_CLASSES = 100_000  # class names that are held in memory
MAX_CLASS_NAME = 1_000  # characters
_MAX_LISTED_BYTES = 64 << 20  # of a file with class names


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


def class_numbers(names: Iterable[str], classes: Sequence[str] | None = None) -> dict[str, int]:
    """Number of each class name: its place among the sorted names. Names that all are integers are sorted as integers.

    Args:
        names: names that were found.
        classes: `ImportConfig.classes`; where it is given, `names` count for nothing.

    Raises:
        ConfigError: there are more than `MAX_CLASSES` names.
    """
    if classes is not None:
        return {name: number for number, name in enumerate(classes)}
    found = set(names)
    if len(found) > MAX_CLASSES:
        raise ConfigError(f"more than {MAX_CLASSES:,} class names: is it the right column? Choose with --label-column")
    if all(name.isascii() and name.removeprefix("-").isdigit() and len(name) < 20 for name in found):
        return {name: number for number, name in enumerate(sorted(found, key=lambda name: (int(name), name)))}
    return {name: number for number, name in enumerate(sorted(found, key=as_bytes))}


def not_listed(name: str) -> str:
    """Reason of an image whose class is not in `ImportConfig.classes`."""
    return f"class {printable(name[:100])!r} is not in `classes`"


def listed_classes(url: str) -> list[str]:
    """Class names in the order of their integers, from a `classes.json` or a JSON list.

    Raises:
        ConfigError: there is no such file, or it has another form.
    """
    try:
        with open_read(url) as stream:
            data = stream.read(_MAX_LISTED_BYTES + 1)
        found = json.loads(data) if len(data) <= _MAX_LISTED_BYTES else None
    except (DataError, ValueError, RecursionError) as error:
        raise ConfigError(f"{url} cannot be read as a list of classes: {str(error)[:200]}") from error
    if isinstance(found, dict) and all(type(number) is int for number in found.values()):
        if sorted(found.values()) != list(range(len(found))):
            raise ConfigError(f"{url}: the numbers of the classes are not 0 to {len(found) - 1}, each once")
        numbers: dict[str, int] = found
        found = sorted(numbers, key=lambda name: numbers[name])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f'{url} is no list of class names: ["cat", "dog"], or {{"cat": 0, "dog": 1}}')
    return found


def shown_names(names: Iterable[str]) -> list[str]:
    """Class names as tables and terminals show them. Raises ConfigError where two become the same."""
    shown = list(map(printable, names))
    if len(set(shown)) < len(shown):
        twice = next(name for i, name in enumerate(shown) if name in shown[:i])
        raise ConfigError(f"two class names are {twice!r} where unprintable characters are written out; rename one")
    return shown


def some(names: Sequence[str]) -> str:
    """The first three names, and the number of the others."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(printable(name) for name in names[:3]) + more


def as_bytes(name: str) -> bytes:
    """The bytes of a name, which give the order of names."""
    return name.encode("utf-8", "surrogatepass")


def stamp_of(parts: Iterable[tuple[object, ...]], size: int) -> dict[str, str | int]:
    """Stamp of a source: any change of a part changes it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "surrogatepass") + b"\n")
    return {"size": size, "modified": digest.hexdigest()}
