"""The index: one walk over every shard that says which samples can be used, and why the others cannot.

It is the gatekeeper. Later stages read only samples whose status is `ok`; the others go to quarantine as they are.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import Part, Recipe, Workshop, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import BadImage, ImageConfig, decode
from sanitize.data.samples import (
    BadLabel,
    Sample,
    SampleLimits,
    ShardReader,
    find_image,
    printable,
    read_label,
)
from sanitize.data.sources import find_shards
from sanitize.data.tables import rows_name, write_rows
from sanitize.errors import DataError
from sanitize.progress import track
from sanitize.storage import fingerprint

MAX_CLASSES = 1000  # without n_classes, a larger label is taken for a mistake: one hostile label must not size a model
SCHEMA = pa.schema(
    {
        "position": pa.int64(),
        "key": pa.string(),
        "status": pa.string(),
        "reason": pa.string(),
        "label": pa.int64(),
        "height": pa.int32(),
        "width": pa.int32(),
        "image": pa.string(),
        "sha256": pa.string(),
        "members": pa.list_(pa.struct({"name": pa.string(), "size": pa.int64()})),
    }
)


class IndexConfig(BaseModel):
    """What a sample must have.

    Attributes:
        label: member that holds the class: the suffix of a file with an ascii integer, or "json:FIELD".
        n_classes: number of classes; None takes the largest label below 1,000, plus one.
        image: how images are decoded.
        limits: what one sample may cost.
        max_bad_fraction: share of unreadable samples in [0, 1] above which the run stops.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = Field(default="cls", pattern=r"^[^:.]+$|^json:.+$")
    n_classes: int | None = Field(default=None, gt=0)
    image: ImageConfig = ImageConfig()
    limits: SampleLimits = SampleLimits()
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)


def index_shards(
    config: IndexConfig,
    sources: Sequence[str] | str,
    out: str,
    compute: Compute,
    shards: Sequence[str] | None = None,
) -> Dataset:
    """Walk the shards once, decode every image once, and write one row a sample.

    Args:
        config: what a sample must have.
        sources: directories, globs, brace ranges or URLs of .tar / .tar.gz shards, in any order.
        out: folder of the artifact: `rows/SHARD.parquet`, `dataset.json`.
        compute: unused here but for the convention; nothing is random.
        shards: names of the shards to do now; None does all that are missing and finishes.

    Returns:
        The Dataset.

    Raises:
        ConfigError: no shards, or one of them twice.
        DataError: a shard cannot be opened, no sample is usable, or more than `max_bad_fraction` are not.
        ArtifactError: `out` was made from other shards.
    """
    compute.activate()
    found = find_shards(sources)
    recipe = Recipe(stage="index_shards", config=config.model_dump(mode="json"), inputs=dict.fromkeys(found, "shard"))
    with track("index", None) as advance:

        def write_part(shard: str, part: Part) -> None:
            rows, summary = index_shard(found[shard], config, advance)
            table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({"shard": json.dumps(summary)})
            write_rows(part, shard, table)
            part.counts.update(summary["counts"])

        return make(
            Dataset,
            out,
            recipe,
            parts=list(found),
            write_part=write_part,
            finish=lambda part, workshop: part.write_json("dataset.json", _describe(config, list(found), workshop)),
            only=shards,
            sources={shard: fingerprint(url) for shard, url in found.items()},
        )


def index_shard(
    url: str, config: IndexConfig, advance: Any = lambda _n: None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one shard in the order of its samples, and a summary of the shard itself."""
    reader = ShardReader(url, config.limits)
    rows = []
    for sample in reader:
        rows.append(_row(sample, config))
        advance(1)
    counts = Counter(samples=len(rows), unreadable=sum(row["status"] != "ok" for row in rows))
    return rows, {"sha256": reader.sha256, "bytes": reader.size, "damage": reader.damage, "counts": dict(counts)}


def _row(sample: Sample, config: IndexConfig) -> dict[str, Any]:
    row: dict[str, Any] = {
        "position": sample.position,
        "key": printable(sample.key),
        "members": [{"name": printable(name), "size": len(data)} for name, data in sample.members],
        "status": "unreadable",
        "reason": sample.problem,
    }
    if sample.problem is not None:
        return row
    try:
        name, data = find_image(sample)
        row |= {"image": printable(name), "sha256": hashlib.sha256(data).hexdigest()}
        row["label"] = read_label(sample, config.label, config.n_classes or MAX_CLASSES)
        row["height"], row["width"] = decode(data, config.image).shape[1:]
    except (LookupError, BadLabel, BadImage) as error:
        row["reason"] = str(error.args[0])
        return row
    row["status"] = "ok"
    return row


def _describe(config: IndexConfig, shards: list[str], workshop: Workshop) -> dict[str, Any]:
    """Facts over all shards; the place where too much bad data stops the run."""
    labels: Counter[int] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    reasons: Counter[str] = Counter()
    summaries = {}
    for shard in shards:
        rows = pa.BufferReader(workshop.read(rows_name(shard)))
        table = pq.read_table(rows, columns=["status", "reason", "label", "height", "width"])
        summaries[shard] = json.loads(table.schema.metadata[b"shard"])
        for row in table.to_pylist():
            if row["status"] == "ok":
                labels[row["label"]] += 1
                sizes[row["height"], row["width"]] += 1
            else:
                reasons[row["reason"]] += 1
    _refuse_if_bad(config, labels.total(), reasons, summaries)
    return {
        "n_classes": config.n_classes or max(labels) + 1,
        "labels": {str(label): labels[label] for label in sorted(labels)},
        "image_size": list(config.image.size or sizes.most_common(1)[0][0]),
        "label": config.label,
        "image": config.image.model_dump(mode="json"),
        "limits": config.limits.model_dump(mode="json"),
        "shards": summaries,
        "unreadable": dict(reasons.most_common()),
    }


def _refuse_if_bad(config: IndexConfig, n_ok: int, reasons: Counter[str], summaries: dict[str, Any]) -> None:
    n_bad = reasons.total()
    damaged = [f"{shard} ({s['damage']})" for shard, s in summaries.items() if s["damage"]]
    if n_bad > config.max_bad_fraction * (n_ok + n_bad):
        why = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
        raise DataError(
            f"{n_bad} of {n_ok + n_bad} samples are unreadable, more than max_bad_fraction={config.max_bad_fraction}: "
            f"{why}. Look with `sanitize inspect`; raise max_bad_fraction only if this is expected"
        )
    if n_ok == 0:
        raise DataError(
            f"no usable sample in {len(summaries)} shards{': ' + ', '.join(damaged[:3]) if damaged else ''}"
        )
