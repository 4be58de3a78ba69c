"""Damaged shards and unreadable samples: how much they cost, and the errors where that is too much."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sanitize.data.index_config import IndexConfig
from sanitize.data.reasons import Reasons
from sanitize.errors import DataError
from sanitize.plural import are, counted
from sanitize.tar.compression import not_read, unread_suffix
from sanitize.tar.names import printable

_MAX_NAMED = 10  # shards in a message
_STOPPED = re.compile(r" at byte \d+$")  # end of the `damage` of a ShardReader that stopped
_LARGE_LABEL = re.compile(r"label (\d+) is not in ")


def bad_shards(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Damaged shards without a usable sample, with the damage. An empty archive is not damaged.

    Args:
        summaries: summary of each shard, from `index_shard` or `dataset.json`.
    """
    return {
        shard: str(summary["damage"])
        for shard, summary in summaries.items()
        if summary["damage"] and summary["counts"]["samples"] == summary["counts"]["unreadable"]
    }


def lost_samples(summaries: Mapping[str, Mapping[str, Any]]) -> int:
    """Samples behind the places where shards are damaged, by their mean size before; bad shards count none.

    Args:
        summaries: as for `bad_shards`.
    """
    bad = bad_shards(summaries)
    return sum(
        round(summary["counts"]["samples"] * summary["unread"] / max(1, summary["bytes"] - summary["unread"]))
        for shard, summary in summaries.items()
        if shard not in bad
    )


def stopped_early(summary: Mapping[str, Any]) -> bool:
    """True where a shard was not read to its end; otherwise `damage` is an oddity that cost no sample.

    Args:
        summary: summary of the shard, from `index_shard` or `dataset.json`.
    """
    return _STOPPED.search(summary["damage"] or "") is not None


def is_loss_unknown(summary: Mapping[str, Any]) -> bool:
    """True where a shard lost samples and the file does not tell how many: it is cut off, or compressed.

    Args:
        summary: as for `stopped_early`.
    """
    is_cut = str(summary["damage"]).startswith(("truncated in ", "compressed stream is cut"))
    return stopped_early(summary) and (is_cut or lost_samples({"": summary}) == 0)


def refuse_unread(config: IndexConfig, found: Mapping[str, object]) -> None:
    """Raise DataError if the names alone show too many unreadable shards."""
    unread = {shard: not_read(unread_suffix(shard)) for shard in found if unread_suffix(shard)}
    if len(unread) > config.max_bad_shards:
        raise DataError(_too_many(unread, len(found), config))


def refuse_if_bad(config: IndexConfig, n_ok: int, found: Reasons, summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise DataError where too much data is bad.

    Args:
        config: limits on bad data.
        n_ok: number of usable samples.
        found: reasons of unreadable samples.
        summaries: summary of each shard, from `index_shard`.
    """
    n_lost, bad = lost_samples(summaries), bad_shards(summaries)
    n_bad = sum(found.counts().values()) + n_lost
    why = []
    if n_bad > config.max_bad_fraction * (n_ok + n_bad):
        lost = [f"{n_lost} x behind damage in a shard (about)"] if n_lost else []
        most = "; ".join([*([found.most()] if found.counts() else []), *lost])
        why.append(
            f"{n_bad:,} of {counted(n_ok + n_bad, 'sample')} {are(n_bad)} unreadable, more than "
            f"max_bad_fraction={config.max_bad_fraction}: {most}. {_what_to_do(config, found)}"
        )
    elif n_ok == 0:
        damaged = [f"{printable(shard)} ({s['damage']})" for shard, s in summaries.items() if s["damage"]]
        why.append(
            f"no usable sample in {counted(len(summaries), 'shard')}{': ' if damaged else ''}{first_few(damaged)}"
        )
    if len(bad) > config.max_bad_shards and (n_ok or n_bad):
        why.append(_too_many(bad, len(summaries), config))
    if why:
        raise DataError(". ".join(why))


def _what_to_do(config: IndexConfig, found: Reasons) -> str:
    largest = max_label(found) if config.n_classes is None else None
    if largest is not None:
        return f"Labels go up to {largest}: set index.n_classes={largest + 1} if these are the classes"
    return "Look with `sanitize inspect`, which says what to do; raise max_bad_fraction only if this is expected"


def max_label(found: Reasons) -> int | None:
    """The largest label that was refused for the number of classes, if that is the most frequent reason."""
    kinds = found.kinds()
    match = _LARGE_LABEL.match(kinds[0].largest) if kinds else None
    return int(match[1]) if match else None


def _too_many(bad: Mapping[str, str], n_shards: int, config: IndexConfig) -> str:
    named = [f"{printable(shard)} ({damage})" for shard, damage in bad.items()]
    return (
        f"{len(bad):,} of {counted(n_shards, 'shard')} could not be read, more than "
        f"max_bad_shards={config.max_bad_shards}: "
        f"{first_few(named)}. Repair or remove them, or raise index.max_bad_shards to go on without them"
    )


def first_few(what: Sequence[str]) -> str:
    """The first names in a list, for a message, and how many more there are."""
    return ", ".join(what[:_MAX_NAMED]) + (f" and {len(what) - _MAX_NAMED} more" if len(what) > _MAX_NAMED else "")
