"""Which shards a user means: directories, globs, brace ranges and URLs become names and places."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from sanitize import remote
from sanitize.errors import ConfigError, DataError
from sanitize.storage import absolute, check_url, is_local, join, local_path

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# The name of a shard becomes that of files we write, and is printed: no control characters, and all of it UTF-8.
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def find_shards(sources: Sequence[str] | str, may_come: bool = False) -> dict[str, str]:
    """Expand directories, globs and brace ranges (`train-{000000..000009}.tar`) into shards.

    Args:
        sources: where to look.
        may_come: a folder that has no shards yet, or none that a pattern finds, is no error.

    Returns:
        {name: url}, sorted by name, which is the path below the folder all shards share. The order in which
        sources were given is forgotten on purpose: results must not depend on it.

    Raises:
        ConfigError: a source finds nothing, the same shard was given twice, or its name is unfit for a file of ours.
        DataError: a folder cannot be listed.
    """
    from webdataset.shardlists import expand_urls

    urls: list[str] = []
    for source in [sources] if isinstance(sources, str) else sources:
        check_url(source)
        for url in expand_urls(source):
            found = _expand(check_url(url))  # again: braces may have hidden what it is
            if not found and not (may_come and _has_folder(url)):
                raise ConfigError(f"no shards at {url!r}: expected files ending in {', '.join(SHARD_SUFFIXES)}")
            urls += found
    if not sources:
        raise ConfigError("no shards: the list of sources is empty")
    if not urls:
        return {}
    urls = [absolute(url) if is_local(url) else url for url in urls]
    plain = [re.sub("/+", "/", url) for url in urls]  # a bucket may hold a//x.tar beside a/x.tar; a folder may not
    if len(set(plain)) != len(urls):
        twice = next(url for url, one in zip(urls, plain, strict=True) if plain.count(one) > 1)
        raise ConfigError(f"shard {twice} is listed twice")
    folders = [url.rpartition("/")[0] for url in urls]
    base = os.path.commonpath(folders) if all(map(is_local, urls)) else _common_prefix(folders)
    return dict(sorted((_fit_name(url[len(base) :].lstrip("/")), url) for url in urls))


def _fit_name(name: str) -> str:
    if _UNFIT.search(name) or {".", ".."} & set(name.split("/")):
        raise ConfigError(f"shard {name!r} is refused: control characters or '..' in its name; rename it")
    return name


def refuse_inside(sources: Sequence[str], out: str | Path) -> None:
    """Raise ConfigError if `out` lies in a folder that is searched for shards: the next run would read its results."""
    for source in sources:
        if _is_searched(source, str(out)):
            raise ConfigError(
                f"--out {out} lies inside {source}, where shards are read from: the next run would take its results "
                "for input. Choose a folder outside, or name the shards: 'FOLDER/*.tar'"
            )


def _is_searched(source: str, out: str) -> bool:
    if is_local(source) != is_local(out):
        return False
    # Everything below a folder is searched, and below what stands before "**"; other patterns name single files.
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


def _expand(url: str) -> list[str]:
    if is_local(url):
        path = local_path(url)
        if path.is_dir():
            return _files_below(path)
        if path.exists():
            return [str(path)]
        return sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - the pattern may be absolute
    return remote.expand(url, SHARD_SUFFIXES)


def _has_folder(url: str) -> bool:
    """Whether there is a folder that shards could come into. Buckets have none, so nothing speaks against one."""
    if not is_local(url):
        return True
    before, *pattern = re.split(r"[*?[]", url, maxsplit=1)
    is_folder = not pattern and not _is_shard(url)
    return local_path(url if is_folder else before.rpartition("/")[0] or ".").is_dir()


def _files_below(folder: Path) -> list[str]:
    def refuse(error: OSError) -> None:  # os.walk would go on without a word
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error

    walk = os.walk(folder, onerror=refuse)
    return sorted(os.path.join(where, name) for where, _, files in walk for name in files if _is_shard(name))  # noqa: PTH118


def _is_shard(name: str) -> bool:
    return name.endswith(SHARD_SUFFIXES)
