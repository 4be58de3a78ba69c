"""The index: one pass over every shard that finds the usable samples, and a reason for each of the others.

Later stages read only samples of status `ok`; the others go to quarantine unchanged. `IndexConfig.check` sets the depth
of the check; only "decode" proves that images can be decoded.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from sanitize.artifacts import ArtifactBuilder, Part, Sources
from sanitize.compute import Compute
from sanitize.data.bad_data import refuse_unread
from sanitize.data.dataset import Dataset
from sanitize.data.dataset_info import dataset_info, refuse_many_names
from sanitize.data.image_facts import ImageFacts, write_facts
from sanitize.data.index_config import IndexConfig, label_reader
from sanitize.data.judge import judge_sample
from sanitize.data.labels import LabelReader
from sanitize.data.layout import explained
from sanitize.data.rows import SCHEMA, SEVERAL, plain_rows, read_rows
from sanitize.data.samples import Sample, ShardReader
from sanitize.data.sources import find_shards, fingerprint_shards
from sanitize.data.stated_hashes import StatedHashes
from sanitize.data.tables import sample_starts, write_rows
from sanitize.stage import Advance, Bars, Work, stage
from sanitize.tar.compression import unread_suffix

__all__ = ["IndexConfig", "index_shard", "index_shards"]


@stage(Dataset, version=6, gpu=False, draws="nothing")
def index_shards(
    config: IndexConfig,
    sources: Sequence[str] | str | Sources,
    out: str,
    compute: Compute,
    shards: Sequence[str] | None = None,
) -> Work:
    """Read the shards once, check every sample as `config.check` says, and write one row a sample.

    With `image.member: all` there is one row a picture: `position` counts the rows of a shard, and a column `sample`
    its samples. An unreadable sample has one row.

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
    refuse_unread(config, found)
    labels = label_reader(config)
    hashes = None if config.verify is None else StatedHashes(config.verify)
    tables = {"label table": labels.sha256, "hash table": hashes.sha256 if hashes else None}

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        facts = ImageFacts() if config.has_facts else None
        table, summary = index_shard(str(found[shard]["url"]), config, advance, labels, facts, hashes)
        if facts is not None and hashes is not None:
            summary["hashes"] = facts.n_stated
        write_rows(
            part, shard, table.replace_schema_metadata((table.schema.metadata or {}) | {"shard": json.dumps(summary)})
        )
        if facts is not None:
            write_facts(part, shard, facts)
        part.counts.update(summary["counts"])

    def finish(part: Part, builder: ArtifactBuilder) -> None:
        part.write_json("dataset.json", dataset_info(config, list(found), builder))

    return Work(
        parts=list(found),
        write_part=write_part,
        finish=finish,
        sources=found,
        bar=Bars("index"),
        config=config.recipe(),
        inputs=dict.fromkeys(found, "shard") | {name: sha256 for name, sha256 in tables.items() if sha256},
    )


def index_shard(
    url: str,
    config: IndexConfig,
    advance: Callable[[int], None] = lambda _n: None,
    labels: LabelReader | None = None,
    facts: ImageFacts | None = None,
    hashes: StatedHashes | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """Rows of one shard in the order of its samples (rows.SCHEMA, rows.SEVERAL), and a summary of the shard itself.

    Where class names are gathered, `label` is the number of a name in the list `names` of the schema's metadata. The
    summary has sha256, bytes, damage and counts (of samples; with `image.member: all` also of usable pictures);
    `unread`: bytes behind the damage; `of_macos`: number of files of macOS, if there are any; `formats`: number of
    images of each format that were read, usable or not.

    Args:
        url: path or URL of the shard.
        config: requirements on samples.
        advance: function called with the number of finished samples.
        labels: `label_reader(config)`, if the caller has it.
        facts: facts about the images are added to it, as `config` says.
        hashes: images are compared with them, and what differs is added to `facts`.
    """
    headers_only = config.check == "headers"
    reader = labels or label_reader(config)
    names: dict[str, int] = {}
    formats: Counter[str] = Counter()

    def judge(sample: Sample, position: int) -> list[dict[str, Any]]:
        rows = judge_sample(sample, position, config, reader, formats, facts, hashes)
        for row in rows:
            if isinstance(name := row.get("label"), str):
                row["label"] = names.setdefault(name, len(names))
                refuse_many_names(len(names), url, config)
        return rows

    found = None
    if headers_only and reader.reads_members and not unread_suffix(url) and not config.has_several:
        integers = reader.n_classes if reader.is_plain else 0
        found = plain_rows(url, config.limits, reader.suffix, integers, judge, advance, config.image.member)
    if found is None:
        suffix = reader.suffix if headers_only else None
        shard = ShardReader(url, config.limits, suffix, digest=not headers_only)
        found = read_rows(shard, judge, advance, SEVERAL if config.has_several else SCHEMA)
    table = explained(found.table, config.label)
    n_bad = len(table) - table["status"].to_pylist().count("ok")
    summary = {"sha256": found.sha256, "bytes": found.size, "damage": found.damage, "unread": found.n_unread}
    if found.n_of_macos:
        summary["of_macos"] = found.n_of_macos
    counts = {"samples": len(sample_starts(table)), "unreadable": n_bad}
    if config.has_several:
        counts["pictures"] = len(table) - n_bad
    if config.classes == "names":
        table = table.replace_schema_metadata({"names": json.dumps(list(names))})
    return table, summary | {"counts": counts, "formats": dict(formats)}
