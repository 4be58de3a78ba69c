"""The index: one pass over every shard that finds the usable samples, and a reason for each of the others.

Later stages read only samples of status `ok`; the others go to quarantine unchanged. `IndexConfig.check` sets the depth
of the check; only "decode" proves that images can be decoded.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import ArtifactBuilder, Part, Sources
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import BadImage, ImageConfig, decode, image_format
from sanitize.data.rows import plain_rows, read_rows
from sanitize.data.samples import (
    BadLabel,
    Sample,
    SampleLimits,
    ShardReader,
    find_image,
    image_name,
    read_label,
)
from sanitize.data.sources import find_shards, fingerprint_shards
from sanitize.data.tables import rows_name, write_rows
from sanitize.errors import DataError
from sanitize.stage import Advance, Bars, Work, stage
from sanitize.tar.compression import not_read, unread_suffix
from sanitize.tar.names import printable

_MAX_NAMED = 10  # shards in a message
MAX_CLASSES = 1000  # limit without n_classes: one hostile label must not set the size of a model


class IndexConfig(BaseModel):
    """Requirements on samples.

    Attributes:
        check: depth of the check. "decode": each image is decoded, so that later stages can read all `ok` samples.
            "digest": images are hashed, not decoded. "headers": only labels are read, and no byte is hashed; a changed
            shard is then recognised by its size and modification time.
        label: member with the class: the suffix of a file with an ascii integer, or "json:FIELD". None reads no labels:
            all samples are of class 0.
        n_classes: number of classes; None takes the largest label below 1,000, plus one.
        image: settings of decoding.
        limits: limits on the cost of one sample.
        max_bad_fraction: share of unreadable samples in [0, 1] above which the run stops. The bytes behind the place
            where a shard is damaged count as so many samples as fit there.
        max_bad_shards: number of damaged shards without a usable sample above which the run stops: the number of
            samples in them is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: Literal["decode", "digest", "headers"] = "decode"
    label: str | None = Field(default="cls", pattern=r"^[^:.]+$|^json:.+$")
    n_classes: int | None = Field(default=None, gt=0)
    image: ImageConfig = ImageConfig()
    limits: SampleLimits = SampleLimits()
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    max_bad_shards: int = Field(default=0, ge=0)


@stage(Dataset, version=3, gpu=False, draws="nothing")
def index_shards(
    config: IndexConfig,
    sources: Sequence[str] | str | Sources,
    out: str,
    compute: Compute,
    shards: Sequence[str] | None = None,
) -> Work:
    """Read the shards once, check every sample as `config.check` says, and write one row a sample.

    Args:
        config: requirements on samples.
        sources: directories, globs, brace ranges or URLs of .tar / .tar.gz shards, in any order; or the shards that
            were found, with their fingerprints (`fingerprint_shards`).
        out: folder of the artifact: `rows/SHARD.parquet`, `dataset.json`.
        compute: threads; no random numbers are drawn.
        shards: names of the shards to index now; None indexes all missing ones and finishes.

    Returns:
        The Dataset.

    Raises:
        ConfigError: no shards, or one of them twice.
        DataError: a shard cannot be opened, no sample is usable, more than `max_bad_fraction` of the samples or more
            than `max_bad_shards` shards are unreadable.
        ArtifactError: `out` was made from other shards.
    """
    found = sources if isinstance(sources, Mapping) else fingerprint_shards(find_shards(sources))
    found = dict(sorted(found.items()))
    _refuse_unread(config, found)

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        table, summary = index_shard(str(found[shard]["url"]), config, advance)
        write_rows(part, shard, table.replace_schema_metadata({"shard": json.dumps(summary)}))
        part.counts.update(summary["counts"])

    def finish(part: Part, builder: ArtifactBuilder) -> None:
        part.write_json("dataset.json", _describe(config, list(found), builder))

    return Work(
        parts=list(found),
        write_part=write_part,
        finish=finish,
        sources=found,
        bar=Bars("index"),
        inputs=dict.fromkeys(found, "shard"),
    )


def _refuse_unread(config: IndexConfig, found: Mapping[str, object]) -> None:
    """Raise DataError if the names alone show too many unreadable shards."""
    unread = {shard: not_read(unread_suffix(shard)) for shard in found if unread_suffix(shard)}
    if len(unread) > config.max_bad_shards:
        raise DataError(_too_many(unread, len(found), config))


def index_shard(
    url: str, config: IndexConfig, advance: Callable[[int], None] = lambda _n: None
) -> tuple[pa.Table, dict[str, Any]]:
    """Rows of one shard in the order of its samples (rows.SCHEMA), and a summary of the shard itself.

    The summary has sha256, bytes, damage and counts; `unread`: bytes behind the damage; `formats`: number of images
    of each format that were read, usable or not.
    """
    n_classes, headers_only = config.n_classes or MAX_CLASSES, config.check == "headers"
    suffix = (config.label or "").partition(":")[0].lower() if headers_only else None

    formats: Counter[str] = Counter()

    def judge(sample: Sample) -> dict[str, Any]:
        judged = _judge(sample, config, n_classes)
        if judged.get("sha256"):  # the image was read
            formats[image_format(find_image(sample)[1]) or "unknown"] += 1
        return judged

    found = None
    if headers_only and config.label is not None and not unread_suffix(url):
        found = plain_rows(url, config.limits, config.label, n_classes, judge, advance)
    if found is None:
        found = read_rows(ShardReader(url, config.limits, suffix, digest=not headers_only), judge, advance)
    n_bad = len(found.table) - found.table["status"].to_pylist().count("ok")
    summary = {"sha256": found.sha256, "bytes": found.size, "damage": found.damage, "unread": found.n_unread}
    counts = {"samples": len(found.table), "unreadable": n_bad}
    return found.table, summary | {"counts": counts, "formats": dict(formats)}


def _judge(sample: Sample, config: IndexConfig, n_classes: int) -> dict[str, Any]:
    """Status of a sample, the reason where it is not "ok", and its properties."""
    if sample.problem is not None:
        return {"status": "unreadable", "reason": sample.problem}
    found: dict[str, Any] = {}
    try:
        found["image"] = printable(image_name(name for name, _ in sample.sizes))
        if config.check != "headers":
            found["sha256"] = hashlib.sha256(find_image(sample)[1]).hexdigest()
        found["label"] = 0 if config.label is None else read_label(sample, config.label, n_classes)
        if config.check == "decode":
            found["height"], found["width"] = decode(find_image(sample)[1], config.image).shape[1:]
    except (LookupError, BadLabel, BadImage) as error:
        return found | {"status": "unreadable", "reason": str(error.args[0])}
    return found | {"status": "ok"}


def _describe(config: IndexConfig, shards: list[str], builder: ArtifactBuilder) -> dict[str, Any]:
    """Content of dataset.json. Raises DataError where too much data is bad."""
    labels: Counter[int] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    reasons: Counter[str] = Counter()
    summaries = {}
    for shard in shards:
        rows = pa.BufferReader(builder.read(rows_name(shard)))
        table = pq.read_table(rows, columns=["status", "reason", "label", "height", "width"])
        summaries[shard] = json.loads(table.schema.metadata[b"shard"])
        is_ok = pc.equal(table["status"], "ok")
        ok = table.filter(is_ok)
        labels.update({row["values"]: row["counts"] for row in pc.value_counts(ok["label"]).to_pylist()})
        by_size = ok.group_by(["height", "width"]).aggregate([([], "count_all")])
        sizes.update({(row["height"], row["width"]): row["count_all"] for row in by_size.to_pylist()})
        reasons.update(table["reason"].filter(pc.invert(is_ok)).to_pylist())
    _refuse_if_bad(config, labels.total(), reasons, summaries)
    common = common_size(sizes, config.image.max_side) if config.check == "decode" else None
    return {
        "n_classes": config.n_classes or max(labels) + 1,
        "labels": {str(label): labels[label] for label in sorted(labels)},
        "image_size": config.image.size or common,
        "check": config.check,
        "label": config.label,
        "image": config.image.model_dump(mode="json"),
        "limits": config.limits.model_dump(mode="json"),
        "shards": summaries,
        "unreadable": dict(reasons.most_common()),
    }


def common_size(sizes: Mapping[tuple[int, int], int], max_side: int | None) -> tuple[int, int]:
    """The size at which a data set is read.

    Args:
        sizes: (H, W) -> number of images.
        max_side: largest side of the result; None takes the most common size as it is.

    Returns:
        The most common size or, if less than half of the images have it, the median height and the median width;
        scaled down to `max_side`, never up.
    """
    if max_side is None:
        return max(sizes, key=lambda size: sizes[size])
    size = max(sizes, key=lambda size: (sizes[size], size))  # no tie depends on the order of the shards
    if 2 * sizes[size] < sum(sizes.values()):
        size = _median(sizes, 0), _median(sizes, 1)
    scale = min(1.0, max_side / max(size))
    return max(1, round(scale * size[0])), max(1, round(scale * size[1]))


def _median(sizes: Mapping[tuple[int, int], int], axis: int) -> int:
    """Lower median of the heights (axis 0) or widths (axis 1)."""
    ordered = sorted((size[axis], n) for size, n in sizes.items())
    seen = accumulate(n for _, n in ordered)
    half = sum(sizes.values()) / 2
    return next(side for (side, _), n in zip(ordered, seen, strict=True) if n >= half)


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


def _refuse_if_bad(
    config: IndexConfig, n_ok: int, reasons: Mapping[str, int], summaries: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise DataError where too much data is bad.

    Args:
        config: limits on bad data.
        n_ok: number of usable samples.
        reasons: reason -> number of unreadable samples.
        summaries: summary of each shard, from `index_shard`.
    """
    n_lost, bad = lost_samples(summaries), bad_shards(summaries)
    n_bad = sum(reasons.values()) + n_lost
    why = []
    if n_bad > config.max_bad_fraction * (n_ok + n_bad):
        lost = {"behind damage in a shard (about)": n_lost} if n_lost else {}
        most = "; ".join(f"{n} x {reason}" for reason, n in Counter({**reasons, **lost}).most_common(3))
        why.append(
            f"{n_bad} of {n_ok + n_bad} samples are unreadable, more than max_bad_fraction={config.max_bad_fraction}: "
            f"{most}. Look with `sanitize inspect`; raise max_bad_fraction only if this is expected"
        )
    elif n_ok == 0:
        damaged = [f"{printable(shard)} ({s['damage']})" for shard, s in summaries.items() if s["damage"]]
        why.append(f"no usable sample in {len(summaries)} shards{': ' if damaged else ''}{_some(damaged)}")
    if len(bad) > config.max_bad_shards and (n_ok or n_bad):
        why.append(_too_many(bad, len(summaries), config))
    if why:
        raise DataError(". ".join(why))


def _too_many(bad: Mapping[str, str], n_shards: int, config: IndexConfig) -> str:
    named = [f"{printable(shard)} ({damage})" for shard, damage in bad.items()]
    return (
        f"{len(bad)} of {n_shards} shards could not be read, more than max_bad_shards={config.max_bad_shards}: "
        f"{_some(named)}. Repair or remove them, or raise index.max_bad_shards to go on without them"
    )


def _some(what: Sequence[str]) -> str:
    return ", ".join(what[:_MAX_NAMED]) + (f" and {len(what) - _MAX_NAMED} more" if len(what) > _MAX_NAMED else "")
