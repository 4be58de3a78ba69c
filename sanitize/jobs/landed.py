"""Listing of incoming shards: shards to offer to the ledger, and refused files with their reasons."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from sanitize.data.class_names import names_beside, refuse_others
from sanitize.data.sources import list_sources
from sanitize.entries import Offered, Refused
from sanitize.errors import ConfigError, DataError, StorageError
from sanitize.ledger import State
from sanitize.progress import track
from sanitize.storage import absolute, fingerprint, is_local, sha256_file

NAMES_REMEDY = (
    "Import the shards again with the classes of the reference (`sanitize import --classes FILE`); if the file is "
    "wrong, mend or remove it"
)


class Landed(NamedTuple):
    """A listing of incoming shards.

    Attributes:
        offered: shards.
        was_read: the offered shards that were not known, so that their bytes were read.
        refused: files that cannot be shards.
        changing: messages on shards that changed while they were read; the next listing includes them again.
        unreadable: messages on shards for which storage did not answer; the next listing includes them again.
    """

    offered: list[Offered]
    was_read: list[Offered]
    refused: list[Refused]
    changing: list[str]
    unreadable: list[str]


class _Changing(Exception):
    """A shard changed while it was read."""


def list_shards(sources: Sequence[str], state: State, names: Mapping[int, str] | None = None) -> Landed:
    """List all incoming shards. A shard that was seen before is known by size and time, and is not read again.

    Args:
        sources: places of incoming shards.
        state: state of the ledger.
        names: names of the classes of the reference, by number. New shards in folders that number the classes in
            another way are refused. None compares nothing: labels are no class numbers.

    Raises:
        ConfigError: a source is no folder, pattern or URL, or there is no reference.
        StorageError: storage answers for none of the shards.
    """
    state.reference  # noqa: B018 - raises where there is none, before any shard is read
    found = list_sources(sources, may_come=True)
    urls = list(found.shards.values())
    landed = Landed([], [], [refuse(url, reason) for url, reason in sorted(found.refused.items())], [], [])
    unfit = {} if names is None else _other_numbers(urls, names, state)

    def look(url: str) -> Offered | Refused | Exception:
        try:
            return _offered(url, state, unfit)
        except (ConfigError, DataError, OSError, UnicodeError) as error:
            return refuse(url, str(error))
        except (StorageError, _Changing) as error:
            return error
        finally:
            advance(1)

    # A remote store takes minutes for sequential requests.
    with track("list", len(urls), "shards") as advance, ThreadPoolExecutor(16) as pool:
        for shard in pool.map(look, urls):
            if isinstance(shard, Offered):
                landed.offered.append(shard)
                if shard.fingerprint not in state.seen:
                    landed.was_read.append(shard)
            elif isinstance(shard, Refused):
                landed.refused.append(shard)
            else:
                (landed.changing if isinstance(shard, _Changing) else landed.unreadable).append(str(shard))
    if landed.unreadable and not landed.offered:
        raise StorageError(landed.unreadable[0])
    return landed


def refuse(url: str, reason: str) -> Refused:
    """A shard that was not read, with the reason."""
    size, modified = 0, ""
    with suppress(ConfigError, DataError, OSError, ValueError):  # the reason explains the missing size and time
        _, size, modified = _fingerprint(url)
    place = url if "://" in url else os.path.abspath(url)  # noqa: PTH100 - Path.resolve would follow links
    return Refused(url=as_utf8(place), size=size, modified=modified, reason=as_utf8(reason))


def as_utf8(text: str) -> str:
    """The text with bytes that are not UTF-8 escaped, so that an entry of the ledger can hold it."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _other_numbers(urls: Iterable[str], names: Mapping[int, str], state: State) -> dict[str, Exception]:
    """Folders whose new shards cannot be taken, because files there number the classes in another way, with the reason.

    They are compared with the reference, and with each other, those with known shards first.
    """
    known = {_folder(url) for url, _, _ in state.seen}
    folders = sorted({_folder(url) for url in urls}, key=lambda folder: (folder not in known, folder))

    def read(folder: str) -> dict[int, str] | Exception:
        try:
            return names_beside([folder], NAMES_REMEDY)
        except (ConfigError, DataError, StorageError, OSError) as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        read_names = list(pool.map(read, folders))
    unfit: dict[str, Exception] = {}
    before: dict[int, str] = {}
    first = ""
    for folder, found in zip(folders, read_names, strict=True):
        if isinstance(found, Exception):
            unfit[folder] = found
            continue
        try:
            refuse_others(found, names, folder, f"the reference v{state.reference.version:04d}", NAMES_REMEDY)
            refuse_others(found, before, folder, first, NAMES_REMEDY)
        except DataError as error:
            unfit[folder] = error
        else:
            first = first or (folder if found else "")
            before |= found
    return unfit


def _folder(url: str) -> str:
    """The folder of a shard, with a slash at its end."""
    return (absolute(url) if is_local(url) else url).rpartition("/")[0] + "/"


def _offered(url: str, state: State, unfit: Mapping[str, Exception]) -> Offered:
    url.encode()  # a folder above may have a name that is not UTF-8, which the ledger cannot hold
    seen = _fingerprint(url)
    digest = known = state.seen.get(seen)
    if digest is None:
        if (error := unfit.get(_folder(url))) is not None:
            raise error
        digest = sha256_file(url)
    if known is None and _fingerprint(url) != seen:
        raise _Changing(f"{url} changed while it was read; the next ingest reads it again")
    return Offered(url=url, size=seen[1], modified=seen[2], sha256=digest)


def _fingerprint(url: str) -> tuple[str, int, str]:
    found = fingerprint(url)
    return str(found["url"]), int(found["size"]), str(found["modified"])
