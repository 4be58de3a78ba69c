"""Which kind of source lies at a place; where that is unclear, an error that says what is there."""

import glob
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from sanitize import remote
from sanitize.data.decode import IMAGE_SUFFIXES
from sanitize.errors import ConfigError
from sanitize.importing.coco import coco_captions
from sanitize.importing.config import ImportConfig, Kind
from sanitize.importing.files import Folder
from sanitize.importing.folders import class_folders
from sanitize.importing.parquet import Rows
from sanitize.importing.source import Source, as_bytes, some
from sanitize.importing.splits import choose_split, split_of
from sanitize.importing.table import table
from sanitize.storage import check_url, exists, is_local, join, local_path
from sanitize.tar.names import printable

_BY_SUFFIX: dict[str, Kind] = {"csv": "csv", "tsv": "csv", "json": "coco", "parquet": "parquet", "arrow": "parquet"}
_PATTERN = re.compile(r"[*?[]")
_EXPECTED = (
    "expected class folders (CLASS/NAME.jpg), Parquet or Arrow files of `datasets`, a .csv or .tsv of paths and "
    "labels, or captions of COCO (.json)"
)
_ELSEWHERE = {
    "tar": "it is a shard already: `sanitize inspect` reads it",
    "gz": "unpack it first, or if it is a shard (.tar.gz), `sanitize inspect` reads it",
    "zip": "unpack it first",
}


def open_source(places: Sequence[str], config: ImportConfig) -> Source:
    """List what lies at the places.

    Args:
        places: a folder or file, by path or URL; or several Parquet or Arrow files, or a glob of them.
        config: settings; `kind` chooses where several kinds are there.

    Raises:
        ConfigError: nothing is there, nothing of a known kind, or several kinds.
        DataError: the source cannot be read.
    """
    found = sorted({path for place in places for path in _expand(check_url(place))}, key=as_bytes)
    if config.images is not None and not exists(check_url(config.images)):
        raise ConfigError(f"--images {config.images}: there is no such folder")
    if len(found) > 1:
        if any(_kind_of(path) != "parquet" for path in found):
            raise ConfigError(f"{len(found)} sources; several can be given only of Parquet or Arrow files")
        return Rows(found, config)
    if not found:
        raise ConfigError("no source: give a folder or a file")
    place = found[0].rstrip("/") or "/"
    if not exists(place):
        raise ConfigError(f"there is nothing at {place!r}")
    if _is_file(place):
        return _open_file(place, config)
    return _open_folder(place, config)


def _expand(place: str) -> list[str]:
    if not _PATTERN.search(place) or (is_local(place) and local_path(place).exists()):
        return [place]
    found = sorted(glob.glob(str(local_path(place)), recursive=True)) if is_local(place) else remote.expand(place, ())  # noqa: PTH207
    if not found:
        raise ConfigError(f"no file matches {place!r}")
    return found


def _kind_of(path: str) -> Kind | None:
    return _BY_SUFFIX.get(_suffix(path))


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower().lstrip(".")


def _is_file(place: str) -> bool:
    return local_path(place).is_file() if is_local(place) else bool(_suffix(place))


def _open_file(path: str, config: ImportConfig) -> Source:
    kind = config.kind or _kind_of(path)
    if kind is None or kind == "folders":
        hint = _ELSEWHERE.get(_suffix(path))
        raise ConfigError(f"{path} is not imported: {hint or _EXPECTED}")
    return _open(kind, [path], config)


def _open(kind: Kind, paths: Sequence[str], config: ImportConfig) -> Source:
    if kind == "parquet":
        return Rows(sorted(paths, key=as_bytes), config)
    if kind == "csv":
        return table(paths[0], config)
    if config.classes is not None:
        raise ConfigError(f"{paths[0]} has captions, no classes: leave `classes` out")
    return coco_captions(paths[0], config)


def _open_folder(place: str, config: ImportConfig) -> Source:
    folder = Folder(place, config.max_samples)
    found = folder.walk()
    there = _kinds(found)
    kind: Kind
    if config.kind is not None:
        kind = config.kind
    else:
        if len(there) > 1:
            what = "; ".join(f"--kind {one}: {some(names)}" for one, names in there.items())
            raise ConfigError(f"{place} can be imported in several ways; choose one. {what}")
        if not there:
            raise ConfigError(f"nothing to import at {place}: {_EXPECTED}; found there: {_holds(found)}")
        kind = next(iter(there))
    if kind == "folders":
        return class_folders(folder, config, found)
    names = there.get(kind, [])
    if not names:
        raise ConfigError(f"--kind {kind}: no such file at {place}; found there: {_holds(found)}")
    if kind == "parquet":
        splits = sorted({split for name in names if (split := split_of(name)) is not None})
        others = [name for name in names if split_of(name) is None]
        if splits and others and config.split is None:
            raise ConfigError(
                f"{place} has files of splits ({', '.join(splits)}) and others ({some(others)}): choose one with "
                "--split, take --split all, or give the files as the source"
            )
        split = choose_split(splits, config.split, place)
        names = [name for name in names if split is None or split_of(name) == split]
    elif len(names) > 1:
        raise ConfigError(f"{place} has several files of kind {kind}: {some(names)}; give one of them as the source")
    return _open(kind, [join(folder.place, name) for name in names], config)


def _kinds(found: Iterable[str]) -> dict[Kind, list[str]]:
    """Files that can be imported, by kind."""
    kinds: dict[Kind, list[str]] = {}
    for name in found:
        kind, parts = _kind_of(name), name.split("/")
        if any(part.startswith(".") for part in parts):
            continue
        if _suffix(name) in IMAGE_SUFFIXES and len(parts) > 1:
            kinds.setdefault("folders", []).append(name)
        elif kind == "parquet":
            if not (name.endswith(".arrow") and parts[-1].startswith(("cache-", "tmp", "indices"))):
                kinds.setdefault(kind, []).append(name)
        elif (kind == "csv" and len(parts) == 1) or (kind == "coco" and "caption" in parts[-1].lower()):
            kinds.setdefault(kind, []).append(name)
    return kinds


def _holds(found: Iterable[str]) -> str:
    """What a folder holds, by suffix."""
    names = list(found)
    flat = Counter(_suffix(name) for name in names if "/" not in name and _suffix(name) in IMAGE_SUFFIXES)
    others = Counter(_suffix(name) for name in names if "/" in name or _suffix(name) not in IMAGE_SUFFIXES)
    parts = [f"{n:,} .{suffix} in no folders of classes" for suffix, n in flat.most_common(3)]
    parts += [
        f"{n:,} {f'.{printable(suffix)}' if suffix else 'without a suffix'}" for suffix, n in others.most_common(5)
    ]
    return ", ".join(parts) or "no files"
