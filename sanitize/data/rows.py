"""The index rows of one shard: sample by sample, or, where the archive is plain, by columns.

Both ways give the same rows. The second looks at all names with one regular expression and at the rest with numpy.
"""

import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa

from sanitize.data.decode import IMAGE_SUFFIXES
from sanitize.data.samples import USUAL_NAME, Sample, SampleLimits, ShardFile, ShardReader, printable
from sanitize.data.tar import TarLimits
from sanitize.data.tar_plain import SMALL, NotPlain, read_plain
from sanitize.storage import open_read

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
        "start": pa.int64(),
        "end": pa.int64(),
        "members": pa.list_(pa.struct({"name": pa.string(), "size": pa.int64()})),
    }
)
_JUDGED = ("status", "reason", "label", "height", "width", "image", "sha256")
_USUAL_LINES = re.compile(f"^{USUAL_NAME.pattern}$", re.ASCII | re.MULTILINE)
Judge = Callable[[Sample], Mapping[str, Any]]  # what it says of a sample: status, and others of _JUDGED


class ShardRows(NamedTuple):
    """Rows in the order of the samples, and what was found of the shard itself; see ShardReader."""

    table: pa.Table
    sha256: str | None
    size: int
    damage: str | None
    normal: bool


def read_rows(reader: ShardReader, judge: Judge, advance: Callable[[int], None]) -> ShardRows:
    """One row for each sample that `reader` gives."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names if name != "members"}
    names: list[str] = []
    sizes: list[int] = []
    counts: list[int] = []
    for sample in reader:
        judged = judge(sample)
        for name in _JUDGED:
            columns[name].append(judged.get(name))
        columns["position"].append(sample.position)
        columns["key"].append(printable(sample.key))
        columns["start"].append(sample.start)
        columns["end"].append(sample.end)
        names += [printable(name) for name, _ in sample.sizes]
        sizes += [size for _, size in sample.sizes]
        counts.append(len(sample.sizes))
        advance(1)
    table = _table(columns, names, sizes, counts)
    return ShardRows(table, reader.sha256 or None, reader.size, reader.damage, reader.normal)


def _table(columns: Mapping[str, Any], names: Sequence[str], sizes: Any, counts: Any) -> pa.Table:
    """`names` and `sizes` are those of all members, `counts` says how many each sample has."""
    members = SCHEMA.field("members").type
    pairs = pa.StructArray.from_arrays(
        [pa.array(names, pa.string()), pa.array(sizes, pa.int64())], fields=list(members.value_type)
    )
    lists = pa.ListArray.from_arrays(pa.array(np.cumsum([0, *counts]), pa.int32()), pairs, members)
    return pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA if f.name != "members"] + [lists], schema=SCHEMA)


def plain_rows(
    url: str, limits: SampleLimits, label: str, n_classes: int, judge: Judge, advance: Callable[[int], None]
) -> ShardRows | None:
    """The same by columns, reading no payloads but labels; None for a shard in which anything is odd.

    Args:
        url: of the shard.
        limits: what one sample may cost.
        label: where labels are, as `IndexConfig.label` says it.
        n_classes: labels at or above it are refused.
        judge: asked about samples that do not have exactly one image and one label of nothing but digits.
        advance: told of progress, in samples.
    """
    suffix, _, field = label.partition(":")
    try:
        plain = _read(url, limits, suffix.lower())
    except NotPlain:
        return None
    n = len(plain.keys)
    first_K = np.flatnonzero(np.fromiter(map(operator.ne, plain.keys, chain([None], plain.keys)), bool, n))
    counts_K = np.diff(first_K, append=n)
    keys = [plain.keys[i] for i in first_K.tolist()]
    if (
        len(set(keys)) < len(keys)
        or len(set(plain.names)) < n
        or counts_K.max() > limits.max_members
        or np.add.reduceat(plain.sizes_N, first_K).max() > limits.max_sample_bytes
    ):
        return None
    columns = {
        "position": np.arange(len(keys)),
        "key": keys,
        "start": plain.starts_N[first_K],
        "end": plain.ends_N[first_K + counts_K - 1],
        **_judged(plain, first_K, 0 if field else n_classes, judge),
    }
    advance(len(keys))
    return ShardRows(_table(columns, plain.names, plain.sizes_N, counts_K), None, plain.size, None, plain.normal)


class _Plain(NamedTuple):
    """All N members of a plain shard; `labels`: index -> payload of those that have the suffix of the label."""

    names: list[str]
    keys: list[str]
    suffixes: list[str]
    labels: dict[int, bytes]
    sizes_N: np.ndarray
    starts_N: np.ndarray
    ends_N: np.ndarray
    size: int
    normal: bool


def _read(url: str, limits: SampleLimits, suffix: str) -> _Plain:
    names: list[str] = []
    keys: list[str] = []
    suffixes: list[str] = []
    labels: dict[int, bytes] = {}
    arrays: list[tuple[np.ndarray, ...]] = []
    normal, listed = True, 0
    with open_read(url) as file:
        stream = ShardFile(file, url, digest=False)
        for found in read_plain(cast(BinaryIO, stream), TarLimits(max_member_bytes=limits.max_sample_bytes)):
            n, usual = len(found.sizes_N), _USUAL_LINES.findall(found.names)
            listed += len(found.names) + 1 + 511 * n  # newlines and all: names and 512 bytes a member, as SampleReader
            if len(usual) != n or listed > limits.max_listing_bytes:
                raise NotPlain
            batch_keys, batch_suffixes = zip(*usual, strict=True)
            for i in np.flatnonzero(_is_one_of(batch_suffixes, {suffix})).tolist():
                start, size = int(found.payloads_N[i]), int(found.sizes_N[i])
                if size > SMALL:
                    raise NotPlain
                labels[len(names) + i] = found.window[start : start + size]
            names += found.names.split("\n")
            keys += batch_keys
            suffixes += batch_suffixes
            arrays.append((found.sizes_N, found.starts_N, found.ends_N))
            normal = normal and found.normal
        size = stream.finish()[1]
    if not names:
        raise NotPlain
    sizes_N, starts_N, ends_N = map(np.concatenate, zip(*arrays, strict=True))
    return _Plain(names, keys, suffixes, labels, sizes_N, starts_N, ends_N, size, normal)


def _is_one_of(suffixes: Sequence[str], wanted: Collection[str]) -> np.ndarray:
    """Which suffixes are, in lower case, among the wanted."""
    found = {suffix for suffix in set(suffixes) if suffix.lower() in wanted}
    return np.fromiter(map(found.__contains__, suffixes), bool, len(suffixes))


def _judged(plain: _Plain, first_K: np.ndarray, n_classes: int, judge: Judge) -> dict[str, Any]:
    """The columns of _JUDGED: most samples have one image and one label, and need no judge."""
    n = len(plain.names)
    is_image_N, n_labels_N, label_N = _is_one_of(plain.suffixes, IMAGE_SUFFIXES), np.zeros(n, int), np.full(n, -1)
    at = list(plain.labels)
    n_labels_N[at] = 1
    label_N[at] = [int(d) if d.isdigit() and len(d) <= 18 else -1 for d in plain.labels.values()]
    label_K = np.maximum.reduceat(label_N, first_K)
    easy_K = (np.add.reduceat(is_image_N, first_K, dtype=int) == 1) & (np.add.reduceat(n_labels_N, first_K) == 1)
    easy_K &= (label_K >= 0) & (label_K < n_classes)
    image_K = np.maximum.reduceat(np.arange(n) * is_image_N, first_K)
    columns: dict[str, list[Any]] = {name: [None] * len(first_K) for name in _JUDGED}
    columns["status"] = ["ok"] * len(first_K)
    columns["label"] = label_K.tolist()
    columns["image"] = [plain.names[i] for i in image_K.tolist()]
    stops = [*first_K[1:].tolist(), n]
    for k in np.flatnonzero(~easy_K).tolist():
        judged = judge(_sample(plain, k, range(int(first_K[k]), stops[k])))
        for name in _JUDGED:
            columns[name][k] = judged.get(name)
    return columns


def _sample(plain: _Plain, position: int, at: range) -> Sample:
    members = [(plain.names[i], plain.labels[i]) for i in at if i in plain.labels]
    return Sample(position, plain.keys[at[0]], members, None, [(plain.names[i], int(plain.sizes_N[i])) for i in at])
