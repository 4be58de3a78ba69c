"""Causes of an unfinished batch: storage, or shards that cannot be in a batch."""

import errno
import logging
from typing import Any

import pyarrow as pa

from sanitize.artifacts import MANIFEST
from sanitize.data.bad_data import is_loss_unknown, lost_samples, stopped_early
from sanitize.data.dataset import Dataset
from sanitize.data.index import index_shard
from sanitize.data.index_config import IndexConfig
from sanitize.data.reasons import gathered
from sanitize.entries import ClaimEntry, Offered, Refused
from sanitize.errors import DataError, ShardError, StorageError
from sanitize.jobs.landed import as_utf8
from sanitize.plural import are, counted
from sanitize.storage import exists, fingerprint, join, sha256_file

logger = logging.getLogger("sanitize.ingest")
MAX_REASON = 500  # characters
# Errors that repeat: names that no file can have. All other errors of system calls may pass.
_LASTING = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def is_storage(error: Exception) -> bool:
    """True where storage or Prefect's server failed, so that another attempt may finish the batch."""
    if _is_of_prefect(error):
        return True
    cause = error if isinstance(error, OSError) else error.__cause__
    number = cause.errno if isinstance(cause, OSError) else None
    if number in _LASTING:
        return False
    return isinstance(error, StorageError) or (isinstance(error, OSError) and number is not None)


def _is_of_prefect(error: BaseException | None) -> bool:
    """True where the error or one of its causes comes from Prefect or a request to its server."""
    while error is not None:
        if type(error).__module__.partition(".")[0] in ("prefect", "httpx", "httpcore"):
            return True
        error = error.__cause__ or error.__context__
    return False


def unfit_shards(dataset: Dataset, claim: ClaimEntry, config: IndexConfig) -> list[Refused]:
    """Shards of an indexed batch that have changed, have too many unreadable samples, or are cut off."""
    found = []
    n_cut = sum(map(is_loss_unknown, dataset.info["shards"].values()))
    for shard in claim.shards:
        summary, source = dataset.info["shards"][shard.name], dataset.manifest().sources[shard.name]
        mark = source["size"], str(source["modified"])
        if _has_changed(shard, summary["sha256"], mark):
            found.append(_changed(shard))
        elif _is_bad(summary, config, n_cut):
            found.append(_refused(shard, _why_bad(dataset.rows(shard.name, ["reason"]), summary, config)))
    return found


def look_again(claim: ClaimEntry, config: IndexConfig, folder: str, error: Exception) -> list[Refused]:
    """Shards that caused a batch to fail, found by checking each shard alone; empty if no shard is the cause.

    Args:
        claim: claim of the batch.
        config: index settings of the batch.
        folder: folder of the batch; where the index was finished, only later changes are looked for.
        error: error of the batch; a ShardError names its shard.

    Raises:
        StorageError, OSError: storage does not answer.
    """
    is_indexed = exists(join(folder, "00-index", MANIFEST))
    culprit = error.shard if isinstance(error, ShardError) else ""
    found = []
    for shard in claim.shards:
        refused = _look(shard, None if is_indexed else config)
        if refused is None and shard.name == culprit:
            refused = _refused(shard, str(error))
        if refused is not None:
            found.append(refused)
    return found


def _look(shard: Offered, config: IndexConfig | None) -> Refused | None:
    try:
        found = fingerprint(shard.url)
        if _has_changed(shard, sha256_file(shard.url), (found["size"], str(found["modified"]))):
            return _changed(shard)
    except (DataError, OSError) as error:
        return _refused(shard, str(error), by_bytes=False)
    if config is None:
        return None
    try:
        table, summary = index_shard(shard.url, config)
    except StorageError:
        raise
    except (DataError, OSError) as error:
        return _refused(shard, str(error), by_bytes=False)
    except Exception as error:  # a bug of this package that these bytes trigger
        logger.exception("shard %s cannot be indexed", shard.url)
        return _refused(shard, f"it cannot be indexed: {type(error).__name__}: {error}")
    return _refused(shard, _why_bad(table, summary, config)) if _is_bad(summary, config) else None


def _has_changed(shard: Offered, sha256: str | None, mark: tuple[Any, Any]) -> bool:
    """True where the shard is not the claimed one; judged by size and time where the index has no hash."""
    return mark != (shard.size, shard.modified) if sha256 is None else sha256 != shard.sha256


def _is_bad(summary: dict[str, Any], config: IndexConfig, n_cut: int = 1) -> bool:
    """True for a shard that no batch can take; `n_cut` shards of its batch lost an unknown number of samples."""
    n, n_bad, _ = _counts(summary)
    is_cut = is_loss_unknown(summary) and n_cut > config.max_bad_shards
    return bool(n_bad == n or n_bad > config.max_bad_fraction * n or is_cut)


def _counts(summary: dict[str, Any]) -> tuple[int, int, int]:
    """Number of samples, of unreadable ones, and of those behind damage, which are in both numbers."""
    n, n_bad, n_lost = summary["counts"]["samples"], summary["counts"]["unreadable"], lost_samples({"": summary})
    return n + n_lost, n_bad + n_lost, n_lost


def _why_bad(table: pa.Table, summary: dict[str, Any], config: IndexConfig) -> str:
    n, n_bad, n_lost = _counts(summary)
    damage = f"; the archive is damaged: {summary['damage']}" if summary["damage"] else ""
    if n == 0:
        return f"it has no samples{damage}"
    if n_bad < n and n_bad <= config.max_bad_fraction * n:
        return (
            f"it lost an unknown number of samples behind the {'one' if n == 1 else f'{n:,}'} that {are(n)} there "
            f"({summary['damage']}), and not more than max_bad_shards={config.max_bad_shards} such shards may be in a "
            "batch. Let the whole shard land"
        )
    lost = [f"about {n_lost} x behind the damage"] if n_lost else []
    why = "; ".join([gathered(reason for reason in table["reason"].to_pylist() if reason).most(), *lost])
    limit = f"more than max_bad_fraction={config.max_bad_fraction}" if n_bad < n else "all there are"
    return f"{n_bad:,} of {counted(n, 'sample')} {are(n_bad)} unreadable, {limit}: {why}{damage}"


def losses(dataset: Dataset, claim: ClaimEntry) -> list[str]:
    """A sentence for each shard of a batch of which a part could not be read."""
    summaries = [(shard.url, dataset.info["shards"][shard.name]) for shard in claim.shards]
    return [
        as_utf8(f"{url} is damaged, and what is behind the damage is lost: {summary['damage']}")
        for url, summary in summaries
        if stopped_early(summary)
    ]


def _changed(shard: Offered) -> Refused:
    return _refused(shard, "it has changed since it was claimed; its present content is offered again", by_bytes=False)


def _refused(shard: Offered, reason: str, by_bytes: bool = True) -> Refused:
    text = as_utf8(reason)[:MAX_REASON]
    sha256 = shard.sha256 if by_bytes else ""
    return Refused(url=shard.url, size=shard.size, modified=shard.modified, sha256=sha256, reason=text)
