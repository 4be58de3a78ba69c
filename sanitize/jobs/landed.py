"""Listing of incoming shards: shards to offer to the ledger, and refused files with their reasons."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from sanitize.data.sources import list_sources
from sanitize.entries import Offered, Refused
from sanitize.errors import ConfigError, DataError, StorageError
from sanitize.ledger import State
from sanitize.progress import track
from sanitize.storage import fingerprint, sha256_file


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


def list_shards(sources: Sequence[str], state: State) -> Landed:
    """List all incoming shards. A shard that was seen before is known by size and time, and is not read again.

    Raises:
        ConfigError: a source is no folder, pattern or URL, or there is no reference.
        StorageError: storage answers for none of the shards.
    """
    state.reference  # noqa: B018 - raises where there is none, before any shard is read
    found = list_sources(sources, may_come=True)
    urls = list(found.shards.values())
    landed = Landed([], [], [refuse(url, reason) for url, reason in sorted(found.refused.items())], [], [])

    def look(url: str) -> Offered | Refused | Exception:
        try:
            return _offered(url, state)
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


def _offered(url: str, state: State) -> Offered:
    url.encode()  # a folder above may have a name that is not UTF-8, which the ledger cannot hold
    seen = _fingerprint(url)
    digest = known = state.seen.get(seen)
    if digest is None:
        digest = sha256_file(url)
    if known is None and _fingerprint(url) != seen:
        raise _Changing(f"{url} changed while it was read; the next ingest reads it again")
    return Offered(url=url, size=seen[1], modified=seen[2], sha256=digest)


def _fingerprint(url: str) -> tuple[str, int, str]:
    found = fingerprint(url)
    return str(found["url"]), int(found["size"]), str(found["modified"])
