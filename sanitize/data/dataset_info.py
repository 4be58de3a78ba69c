"""Content of `dataset.json`: counts of all shards of an index, its classes and the size of its images."""

import json
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sanitize.artifacts import ArtifactBuilder
from sanitize.data.bad_data import first_few, refuse_if_bad
from sanitize.data.class_names import MAX_NAMES
from sanitize.data.index_config import IndexConfig
from sanitize.data.labels import notes_on
from sanitize.data.reasons import Reasons
from sanitize.data.shared_keys import SharedKeys
from sanitize.data.tables import read_table, rows_name
from sanitize.errors import DataError
from sanitize.plural import counted, have
from sanitize.tar.names import printable


def dataset_info(config: IndexConfig, shards: list[str], builder: ArtifactBuilder) -> dict[str, Any]:
    """Content of dataset.json. Raises DataError where too much data is bad, or a table labels a key of two shards."""
    labels: Counter[int] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    by_name: Counter[str] = Counter()
    reasons, shared = Reasons(), SharedKeys()
    summaries = {}
    for shard in shards:
        rows = pa.BufferReader(builder.read(rows_name(shard)))
        table = read_table(rows, ["status", "reason", "key", "start", "label", "height", "width"])
        summaries[shard] = json.loads(table.schema.metadata[b"shard"])
        is_ok = pc.equal(table["status"], "ok")
        ok = table.filter(is_ok)
        counts = {row["values"]: row["counts"] for row in pc.value_counts(ok["label"]).to_pylist()}
        if (names := shard_names(table)) is None:
            labels.update(counts)
        else:
            by_name.update({names[i]: n for i, n in counts.items()})
            refuse_many_names(len(by_name), "the shards", config)
        by_size = ok.group_by(["height", "width"]).aggregate([([], "count_all")])
        sizes.update({(row["height"], row["width"]): row["count_all"] for row in by_size.to_pylist()})
        reasons.add(shard, table)
        if config.has_table:
            shared.add(shard, ok["key"].to_pylist())
    if (problem := shared.problem()) is not None:
        raise DataError(problem)
    classes = list(config.classes) if isinstance(config.classes, tuple) else sorted(by_name) or None
    if config.n_classes is not None and len(by_name) > config.n_classes:
        raise DataError(
            f"{len(by_name)} class names, more than index.n_classes={config.n_classes}: "
            f"{first_few([printable(name) for name in classes or ()])}. Set index.classes to the names that are classes"
        )
    if by_name:
        labels.update({label: by_name[name] for label, name in enumerate(classes or ())})
    n_ok = sum(summary["counts"]["samples"] - summary["counts"]["unreadable"] for summary in summaries.values())
    refuse_if_bad(config, n_ok, reasons, summaries)
    common = common_size(sizes, config.image.max_side) if config.check == "decode" else None
    n_classes = config.n_classes or (len(classes) if classes else max(labels) + 1)
    return {
        "n_classes": n_classes,
        "classes": classes,
        **({"class_names": _names_below(config.class_names, n_classes)} if config.class_names else {}),
        "notes": [
            *([] if config.label is None else notes_on(labels, config.n_classes, classes)),
            *notes_on_hashes(config.verify, summaries),
            *notes_on_shards(summaries),
        ],
        "labels": {str(label): labels[label] for label in sorted(labels)},
        "image_size": config.image.size or common,
        "check": config.check,
        "label": config.label,
        "image": config.image.model_dump(mode="json"),
        "limits": config.limits.model_dump(mode="json"),
        "shards": summaries,
        "unreadable": reasons.counts(),
    }


def _names_below(names: Mapping[int, str], n_classes: int) -> dict[str, str]:
    return {str(number): names[number] for number in sorted(names) if number < n_classes}


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


def notes_on_shards(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is odd about the shards and costs no sample.

    Args:
        summaries: summary of each shard, from `index_shard` or `dataset.json`.
    """
    n = sum(summary.get("of_macos", 0) for summary in summaries.values())
    belong = "belongs to no sample and is left out" if n == 1 else "belong to no sample and are left out"
    return [f"{counted(n, 'file')} of macOS (._NAME, .DS_Store) {belong}"] if n else []


def notes_on_hashes(verify: str | None, summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many samples have no hash to be compared with: most often the field has another name, or its value a prefix.

    Args:
        verify: `IndexConfig.verify`.
        summaries: summary of each shard, from `index_shards`.
    """
    if verify is None:
        return []
    n_ok = sum(summary["counts"]["samples"] - summary["counts"]["unreadable"] for summary in summaries.values())
    n = n_ok - sum(summary.get("hashes", 0) for summary in summaries.values())
    none = "no image was compared" if n == n_ok else "these images were not compared"
    return [
        f"{n:,} of {counted(n_ok, 'sample')} {have(n)} no hash that can be read at index.verify={verify}: {none}"
    ] * (n > 0)


def shard_names(table: pa.Table) -> list[str] | None:
    """Class names of the labels of a shard, if they are gathered; see `index_shard`."""
    stored = (table.schema.metadata or {}).get(b"names")
    return None if stored is None else list(json.loads(stored))


def refuse_many_names(n: int, where: str, config: IndexConfig) -> None:
    """Raise DataError for more class names than a data set may have."""
    if n > MAX_NAMES:
        raise DataError(
            f"more than {MAX_NAMES:,} class names in {printable(where)}: index.label={config.label} is no class, but "
            "perhaps a caption or an id; name another member, or index.label=none"
        )
