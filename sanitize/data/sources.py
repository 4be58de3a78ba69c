"""Finding shards: directories, globs, brace ranges and URLs become names and places.

A folder is *searched* (at every depth) for files with the suffix of a shard. A file that a source names, alone or in a
brace range, is a shard whatever its suffix. Names found by searching are not expanded again.
"""

import glob
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from sanitize import remote
from sanitize.artifacts import Sources
from sanitize.data.decode import IMAGE_SUFFIXES
from sanitize.errors import ConfigError, DataError, SanitizeError
from sanitize.storage import absolute, check_url, fingerprints, for_each, is_local, join, local_path
from sanitize.tar.compression import SHARD_SUFFIXES, UNREAD_SUFFIXES, not_read, unread_suffix
from sanitize.tar.names import is_of_macos, printable

_SUFFIXES = (*SHARD_SUFFIXES, *UNREAD_SUFFIXES)
# Output files are named after a shard: ".tmp-" and 12 digits before its name while they are written, ".parquet" behind
# it. File systems allow 255 bytes.
MAX_NAME_BYTES = 220
MAX_PATH_BYTES = 1024  # length of a name with its folders; systems allow 4096, including the run folder
# The name of a shard is printed and becomes that of output files: no control characters, and all of it UTF-8.
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_MAX_LISTED = 100_000  # entries of a folder that are counted for a message
_PATTERN = re.compile(r"[*?[]")


class Listing(NamedTuple):
    """Shards that sources find.

    Attributes:
        shards: {name: url}, sorted by name; the name is the path below the folder that all shards share.
        refused: {url: reason} of files that look like shards and are not read.
    """

    shards: dict[str, str]
    refused: dict[str, str]


def find_shards(sources: Sequence[str] | str, may_come: bool = False) -> dict[str, str]:
    """Expand directories, globs and brace ranges (`train-{000000..000009}.tar`) into shards.

    Args:
        sources: directories, globs, brace ranges or URLs.
        may_come: True if a folder without shards, or a pattern without matches, is no error.

    Returns:
        {name: url}, sorted by name, which is the path below the folder that all shards share. The order of the sources
        is dropped on purpose: results must not depend on it. Archives of an unsupported compression (`.tar.lz4`) are
        included: the index counts them as unreadable shards.

    Raises:
        ConfigError: a source finds nothing; a shard was given twice, is a link that leads out of the searched folder,
            or has a name that is unfit for output files.
        DataError: a folder cannot be listed, or a file with the name of a shard is no regular file.
    """
    found, refused = _survey(sources, may_come)
    for error in refused.values():
        raise error
    return found


def fingerprint_shards(shards: Mapping[str, str]) -> Sources:
    """URL, size, and modification time or ETag of each shard, by name. A run takes them once.

    Args:
        shards: {name: url}, as `find_shards` returns them.

    Raises:
        DataError: a shard is not there.
    """
    return dict(zip(shards, fingerprints(list(shards.values())), strict=True))


def list_sources(sources: Sequence[str] | str, may_come: bool = False) -> Listing:
    """The same, with bad files in `refused` instead of an error.

    Archives of an unsupported compression are refused by their suffix.

    Raises:
        ConfigError: a source is no plain path or URL, or finds nothing.
        StorageError: an object store does not answer.
    """
    found, errors = _survey(sources, may_come)
    refused = {url: str(error) for url, error in errors.items()}
    for name in [name for name in found if unread_suffix(name)]:
        url = found.pop(name)
        refused[url] = f"{printable(url)}: {not_read(unread_suffix(name))}"
    return Listing(found, refused)


def _survey(sources: Sequence[str] | str, may_come: bool) -> tuple[dict[str, str], dict[str, SanitizeError]]:
    """Shards by name, sorted, and errors of others by URL."""
    urls: list[str] = []
    refused: dict[str, SanitizeError] = {}
    sources = [sources] if isinstance(sources, str) else sources
    given = [url for source in sources for url in _braces(check_url(source))]
    for url, found in zip(given, for_each(partial(_expand, may_come), given), strict=True):
        if not (found.urls or found.refused or (may_come and _has_folder(url))):
            raise ConfigError(
                f"no shards at {url!r}: expected files ending in {', '.join(SHARD_SUFFIXES)}{found.holds()}"
            )
        urls += found.urls
        refused |= found.refused
    if not sources:
        raise ConfigError("no shards: the list of sources is empty")
    urls, twice = _once([absolute(url) if is_local(url) else url for url in urls])
    named = {}
    names = _names(urls)
    folders = {str(folder) for name in names for folder in Path(name).parents}
    for name, url in names.items():
        unfit = _unfit(name) or ("it is the folder of other shards as well" if name in folders else None)
        if unfit is None:
            named[name] = url
        else:
            refused[url] = ConfigError(f"shard '{printable(name)}' is refused: {unfit}; rename it")
    return dict(sorted(named.items())), refused | twice


def _braces(source: str) -> list[str]:
    """A source with its brace ranges expanded; an existing path is not expanded."""
    from webdataset.shardlists import expand_urls

    if is_local(source) and local_path(source).exists():
        return [source]
    urls: list[str] = expand_urls(source)
    return urls


def _names(urls: Sequence[str]) -> dict[str, str]:
    """Each URL by its path below the folder that all URLs share."""
    if not urls:
        return {}
    folders = [url.rpartition("/")[0] for url in urls]
    base = os.path.commonpath(folders) if all(map(is_local, urls)) else _common_prefix(folders)
    return {url[len(base) :].lstrip("/"): url for url in urls}


def _once(urls: Sequence[str]) -> tuple[list[str], dict[str, SanitizeError]]:
    """Each place once, and an error for every other path that leads to it.

    Links are followed, because duplicate samples would get twice the weight. Hard links count as separate files.
    """
    # A bucket may hold a//x.tar beside a/x.tar; a folder may not.
    plain = Counter(re.sub("/+", "/", url) for url in urls)
    twice: dict[str, SanitizeError] = {
        url: ConfigError(f"shard {printable(url)} is listed twice")
        for url in sorted(urls)
        if plain[re.sub("/+", "/", url)] > 1
    }
    by_place: dict[str, list[str]] = defaultdict(list)
    for url in sorted(set(urls)):
        by_place[os.path.realpath(url) if is_local(url) else re.sub("/+", "/", url)].append(url)
    kept = []
    for place, ways in by_place.items():
        first = place if place in ways else ways[0]
        kept.append(first)
        for other in ways:
            if other != first and is_local(other):
                twice[other] = ConfigError(
                    f"shard {printable(other)} is refused: through a link it is the same file as {printable(first)}, "
                    "whose samples would count twice; remove the link"
                )
    return kept, twice


def _unfit(name: str) -> str | None:
    """Reason why no output file can be named after this shard, or None."""
    if _UNFIT.search(name) or {".", ".."} & set(name.split("/")):
        return "control characters or '..' in its name"
    if "::" in name:
        return "readers chain URLs by '::', which is in its name"
    if max(len(part.encode()) for part in name.split("/")) > MAX_NAME_BYTES:
        return f"its name is longer than {MAX_NAME_BYTES} bytes, and files named after it would be too long"
    if len(name.encode()) > MAX_PATH_BYTES:
        return f"its name with all folders is longer than {MAX_PATH_BYTES} bytes"
    return None


def refuse_inside(sources: Sequence[str], out: str | Path) -> None:
    """Raise ConfigError if `out` is in a folder that is searched for shards: the next run would read its results."""
    for source in sources:
        if _is_searched(source, str(out)):
            raise ConfigError(
                f"--out {out} lies inside {source}, where shards are read from: the next run would take its results "
                "for input. Choose a folder outside, or name the shards: 'FOLDER/*.tar'"
            )


def _is_searched(source: str, out: str) -> bool:
    if is_local(source) != is_local(out):
        return False
    # Everything below a folder, or below the part before "**", is searched; other patterns name single files.
    start, stars, _ = source.partition("**")
    folder = start.rpartition("/")[0] if stars else source
    if not is_local(source):
        return not any(c in folder for c in "*?[{") and join(out, "").startswith(join(folder, ""))
    path = local_path(folder or ("/" if stars and source.startswith("/") else "."))
    return path.is_dir() and local_path(out).resolve().is_relative_to(path.resolve())


def _common_prefix(folders: Sequence[str]) -> str:
    parts = [folder.split("/") for folder in folders]
    shared = [column[0] for column in zip(*parts, strict=False) if len(set(column)) == 1]
    while shared and not all(part[: len(shared)] == shared for part in parts):
        shared.pop()
    return "/".join(shared)


class _Found:
    """Result of one source: URLs of shards, refused files, and suffixes of all other files."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.refused: dict[str, SanitizeError] = {}
        self.others: Counter[str] | None = None
        self.is_missing = False

    def add(self, path: Path, within: Path | None = None) -> None:
        """Add a local file. `within` is the real path of the searched folder; None for a file given by name."""
        error = _fault(path, within)
        if error is None:
            self.urls.append(str(path))
        else:
            self.refused[str(path)] = error

    def holds(self) -> str:
        """Content of a folder without shards, for the end of a message."""
        if self.is_missing:
            return "; there is no such file or folder"
        if self.others is None:
            return ""
        most = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))[:5]
        counts = ", ".join(f"{n:,} {suffix}" for suffix, n in most)
        return f"; found there: {counts or 'no files'}. {_remedy(self.others)}"


def _remedy(others: Counter[str]) -> str:
    """What to do with a folder of files with these suffixes."""
    if IMAGE_SUFFIXES & {suffix.removeprefix(".") for suffix in others}:
        return "`sanitize import` makes shards of images"
    if others:
        return "A tar archive with another suffix is read where its name is given, as in 'FOLDER/*.SUFFIX'"
    return "Check the path"


def _expand(may_come: bool, url: str, place: remote.Place | None) -> _Found:
    found = _Found()
    if place is not None:
        found.urls = [one for one in remote.expand(url, _SUFFIXES, place) if one == url or not is_of_macos(one)]
        if not (found.urls or _PATTERN.search(url)):
            found.others = _suffixes(islice(remote.names_below(url), _MAX_LISTED))
        return found
    path = local_path(url)
    if path.is_dir():
        _search(path, found)
    elif path.exists() or path.is_symlink():
        found.add(path)
    elif _PATTERN.search(str(path)):
        # In a folder of incoming shards, matching links are untrusted; else the user has chosen the files.
        folder = _folder_before_pattern(str(path))
        for match in sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207 - the pattern may be absolute
            found.add(Path(match), folder.resolve() if may_come else None)
        if not (found.urls or found.refused) and folder.is_dir():
            found.others = _suffixes(entry.name for entry in islice(folder.iterdir(), _MAX_LISTED))
    else:
        found.is_missing = True
    return found


def _search(folder: Path, found: _Found) -> None:
    """All shards below a folder; links are not followed into other folders."""

    def refuse(error: OSError) -> None:  # os.walk ignores errors by default
        found.refused[error.filename] = DataError(f"cannot list {printable(error.filename)}: {error.strerror}")

    real = folder.resolve()
    like_shards: list[Path] = []
    found.others = Counter()
    for where, folders, files in os.walk(folder, onerror=refuse):
        for name in sorted(files):
            if _is_shard(name):
                found.add(Path(where, name), real)
        for name in sorted(folders):
            path = Path(where, name)
            if path.is_symlink() and not path.resolve().is_relative_to(real):
                found.add(path, real)
            elif _is_shard(name):
                like_shards.append(path)
        found.others += _suffixes(name for name in files if not _is_shard(name))
    with_shards = {folder for url in found.urls for folder in Path(url).parents}
    for path in like_shards:
        if path not in with_shards:
            found.add(path)


def _fault(path: Path, within: Path | None) -> SanitizeError | None:
    """Reason why a local file is not read as a shard, or None."""
    shown = printable(str(path))
    if "::" in str(path):
        return ConfigError(f"shard '{shown}' is refused: readers chain URLs by '::', which is in its path; rename it")
    try:
        mode = path.stat().st_mode
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        why = "a link to nothing" if path.is_symlink() else getattr(error, "strerror", error)
        return DataError(f"cannot read {shown}: {why}")
    if within is not None and not real.is_relative_to(within):
        return ConfigError(
            f"{shown} is refused: a link that leads out of {printable(str(within))}, to {printable(str(real))}. Give "
            "what it leads to, or the link itself, as a source of its own"
        )
    if stat.S_ISDIR(mode):
        return DataError(f"cannot read {shown}: it is a folder, not a file")
    return None if stat.S_ISREG(mode) else DataError(f"cannot read {shown}: it is not a regular file")


def _suffixes(names: Iterable[str]) -> Counter[str]:
    """Number of names of each suffix."""
    suffixes = (re.search(r"(\.tar)?\.[^.]{1,16}$", name.lower()) for name in names)
    return Counter(printable(found[0]) if found else "without a suffix" for found in suffixes)


def _folder_before_pattern(path: str) -> Path:
    return Path(_PATTERN.split(path, maxsplit=1)[0].rpartition("/")[0] or ("/" if path.startswith("/") else "."))


def _has_folder(url: str) -> bool:
    """True if there is a folder for incoming shards; always True for buckets, which have no folders."""
    if not is_local(url):
        return True
    is_folder = not _PATTERN.search(url) and not _is_shard(url)
    return (local_path(url) if is_folder else _folder_before_pattern(str(local_path(url)))).is_dir()


def _is_shard(name: str) -> bool:
    """True for the suffixes of archives, read or not, in upper or lower case, but not for macOS's `._NAME.tar`."""
    return name.lower().endswith(_SUFFIXES) and not is_of_macos(name)
