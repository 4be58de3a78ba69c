"""Images in files below a folder or URL: where they are, whether a path stays inside, and their bytes."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sanitize.errors import ConfigError, DataError
from sanitize.importing.source import Offered, as_bytes, stamp_of
from sanitize.storage import absolute, is_local, join, open_read, stamps_below
from sanitize.tar.names import as_path, printable
from sanitize.tar.read import unsafe_name

# An image that is not there or not allowed costs itself; other errors of a disk may pass, and end the import.
_OF_ONE_FILE = (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError)


NO_FILE = "there is no such file"


class Stamp(NamedTuple):
    """Size in bytes and time of modification of a file, or the reason why it is not read."""

    size: int = 0
    modified: float = 0
    problem: str | None = None


class Folder:
    """A folder, or the prefix of a store, whose files are read. Nothing outside is: links that lead out are refused.

    Args:
        place: path or URL.
        max_files: number of files above which the folder is not listed.
    """

    def __init__(self, place: str, max_files: int) -> None:
        self.is_local = is_local(place)
        self.place = os.path.realpath(absolute(place)) if self.is_local else place.rstrip("/")
        self._max_files = max_files
        self._real = lru_cache(4096)(os.path.realpath)  # of the folders that the files lie in
        self._stored: dict[str, tuple[int, float]] | None = None

    def walk(self) -> dict[str, Stamp]:
        """Every file below, by its path from here, sorted by bytes.

        Raises:
            ConfigError: there are more than `max_files`.
            DataError: a folder cannot be listed.
        """
        found = dict(self._local_files(self.place, "")) if self.is_local else self._remote_files()
        return {name: found[name] for name in sorted(found, key=as_bytes)}

    def _local_files(self, path: str, prefix: str) -> Iterator[tuple[str, Stamp]]:
        pending, n = [(path, prefix)], 0
        while pending:
            path, prefix = pending.pop()
            try:
                with os.scandir(path) as entries:
                    for entry in entries:
                        name = prefix + entry.name
                        if entry.is_dir(follow_symlinks=False):
                            pending.append((entry.path, f"{name}/"))
                            continue
                        n += 1
                        self._check_number(n)
                        yield name, self.look(name)
            except OSError as error:
                raise DataError(f"cannot list {printable(path)}: {error.strerror}") from error

    def _remote_files(self) -> dict[str, Stamp]:
        self._check_number(len(self._objects()))
        return {name: self.look(name) for name in self._objects()}

    def _check_number(self, n: int) -> None:
        if n > self._max_files:
            raise ConfigError(f"{self.place} has more than {self._max_files:,} files; raise max_samples")

    def _objects(self) -> dict[str, tuple[int, float]]:
        if self._stored is None:
            self._stored = stamps_below(self.place)
        return self._stored

    def look(self, name: str) -> Stamp:
        """Size and time of a file, or why it is not read; `name` may come from anywhere."""
        if (unsafe := unsafe_name(name)) is not None:
            return Stamp(problem=f"unsafe path: {unsafe}")
        if not self.is_local:
            found = self._objects().get(as_path(name))
            return Stamp(problem=_missing(name)) if found is None else Stamp(*found)
        path = Path(self.place, name)
        try:
            if self._leads_out(path):
                return Stamp(problem="a link that leads out of the folder")
            status = path.stat()
        except FileNotFoundError:
            return Stamp(problem="a link to nothing" if path.is_symlink() else _missing(name))
        except (OSError, ValueError) as error:
            return Stamp(problem=f"cannot be read: {getattr(error, 'strerror', None) or 'no possible path'}")
        if stat.S_ISDIR(status.st_mode):
            return Stamp(problem="a link to a folder, which is not followed" if path.is_symlink() else "a folder")
        if not stat.S_ISREG(status.st_mode):
            return Stamp(problem="not a regular file")
        return Stamp(status.st_size, status.st_mtime_ns)

    def is_link(self, name: str) -> bool:
        """True for a symbolic link."""
        return self.is_local and Path(self.place, name).is_symlink()

    def _leads_out(self, path: Path) -> bool:
        real = os.path.realpath(path) if path.is_symlink() else os.path.join(self._real(str(path.parent)), path.name)  # noqa: PTH118
        return not Path(real).is_relative_to(self.place)

    def read(self, name: str, max_bytes: int) -> bytes:
        """Content of a file. Raises LookupError with the reason if it is not read, DataError if the disk fails."""
        stamp = self.look(name)  # again: the folder may have changed since it was listed
        if stamp.problem is not None:
            raise LookupError(stamp.problem)
        if stamp.size > max_bytes:
            raise LookupError(f"a file of more than max_image_bytes {max_bytes}")
        try:
            with open_read(join(self.place, name)) as stream:
                data = stream.read(max_bytes + 1)
        except OSError as error:
            raise DataError(f"cannot read {join(self.place, printable(name))}: {error}") from error
        except DataError as error:
            if isinstance(error.__cause__, _OF_ONE_FILE):
                raise LookupError(f"cannot be read: {error.__cause__.strerror}") from error
            raise
        if len(data) > max_bytes:
            raise LookupError(f"a file of more than max_image_bytes {max_bytes}")
        return data


def _missing(name: str) -> str:
    return f"{NO_FILE}: it has backslashes, write /" if "\\" in name else NO_FILE


def folder_of(url: str) -> str:
    """Folder of a file, by path or URL."""
    return str(Path(url).parent) if is_local(url) and "://" not in url else url.rpartition("/")[0]


class Listed(NamedTuple):
    """A file that a source offers.

    Attributes:
        name: path from the folder of images.
        label: number of its class; -1 without one.
        captions: captions of the image.
        problem: reason why the file is not read, or None.
    """

    name: str
    label: int = -1
    captions: tuple[str, ...] = ()
    problem: str | None = None


class Files:
    """A source of files, in the order of `listed`; see `source.Source`.

    Args:
        folder: folder of the images.
        listed: the offered files.
        stamps: stamps of the files that were looked at already; the others are looked at here.
        classes: class names by number, or None.
        max_bytes: largest size of a file that is read.
        origin: stamp of the file that lists the images, if one does.
        notes: see `Source`.
    """

    def __init__(
        self,
        folder: Folder,
        listed: Sequence[Listed],
        classes: list[str] | None,
        max_bytes: int,
        stamps: Mapping[str, Stamp] | None = None,
        origin: tuple[object, ...] = (),
        notes: dict[str, int] | None = None,
    ) -> None:
        known = stamps or {}
        self._folder, self._listed, self._max_bytes = folder, listed, max_bytes
        self.classes, self.notes = classes, notes or {}
        found = [known.get(one.name) or (Stamp() if one.problem else folder.look(one.name)) for one in listed]
        self.sizes_N = np.fromiter((min(stamp.size, max_bytes) for stamp in found), np.int64, len(found))
        parts = ((one, *stamp) for one, stamp in zip(listed, found, strict=True))
        self.stamp = stamp_of(chain([origin, (classes,)], parts), sum(stamp.size for stamp in found))

    def order(self, generator: torch.Generator | None) -> np.ndarray:
        """A permutation of all files."""
        n = len(self._listed)
        return np.arange(n) if generator is None else torch.randperm(n, generator=generator).numpy()

    def read(self, numbers: Sequence[int]) -> Iterator[Offered]:
        """The files of these numbers."""
        for number in numbers:
            one = self._listed[number]
            data, problem = b"", one.problem
            if problem is None:
                try:
                    data = self._folder.read(one.name, self._max_bytes)
                except LookupError as error:
                    problem = str(error.args[0])
            label = None if self.classes is None else one.label
            yield Offered(number, one.name, data, label, one.captions, problem)
