"""Index rows of one shard: sample by sample, or, where the archive is plain, by columns, with the same result.

Shapes: N members, K samples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa

from sanitize.data.decode import IMAGE_SUFFIXES
from sanitize.data.samples import Sample, SampleLimits, ShardFile, ShardReader, is_picture
from sanitize.storage import open_read
from sanitize.tar.names import FOLDER_BYTES, printable, split_usual
from sanitize.tar.plain import SMALL, NotPlain, PlainMembers, read_plain
from sanitize.tar.read import TarLimits

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
SEVERAL = SCHEMA.append(pa.field("sample", pa.int64()))  # one row a picture; `sample` counts the samples of a shard
_JUDGED = ("status", "reason", "label", "height", "width", "image", "sha256")
_IMAGE_SUFFIXES = np.array([suffix.encode() for suffix in sorted(IMAGE_SUFFIXES)])
_MAX_DIGITS = 6  # digits of a label that is read by columns
# From a sample and the number of its first row to the columns _JUDGED of its rows.
Judge = Callable[[Sample, int], Sequence[Mapping[str, Any]]]


class ShardRows(NamedTuple):
    """Rows in the order of the samples, and properties of the shard; see ShardReader."""

    table: pa.Table
    sha256: str | None
    size: int
    damage: str | None
    n_unread: int
    n_of_macos: int = 0


def read_rows(
    reader: ShardReader, judge: Judge, advance: Callable[[int], None], schema: pa.Schema = SCHEMA
) -> ShardRows:
    """The rows of each sample of `reader`; the first of them has its members."""
    columns: dict[str, list[Any]] = {name: [] for name in schema.names if name != "members"}
    names: list[str] = []
    sizes: list[int] = []
    counts: list[int] = []
    for sample in reader:
        rows = judge(sample, len(counts))
        key = printable(sample.key)
        own = {"key": key, "start": sample.start, "end": sample.end, "sample": sample.position}
        for row in rows:
            columns["position"].append(len(columns["position"]))
            for name in _JUDGED:
                columns[name].append(row.get(name))
            for name in own.keys() & columns.keys():
                columns[name].append(own[name])
        names += [printable(name) for name, _ in sample.sizes]
        sizes += [size for _, size in sample.sizes]
        counts += [len(sample.sizes), *[0] * (len(rows) - 1)]
        advance(1)
    table = _table(columns, names, sizes, counts, schema)
    return ShardRows(table, reader.sha256 or None, reader.size, reader.damage, reader.n_unread, reader.n_of_macos)


def _table(columns: Mapping[str, Any], names: Any, sizes: Any, counts: Any, schema: pa.Schema = SCHEMA) -> pa.Table:
    """Table from columns, the `names` and `sizes` of all members, and the number of members of each row."""
    members = SCHEMA.field("members").type
    pairs = pa.StructArray.from_arrays([_strings(names), pa.array(sizes, pa.int64())], fields=list(members.value_type))
    lists = pa.ListArray.from_arrays(pa.array(np.cumsum([0, *counts]), pa.int32()), pairs, members)
    arrays = {
        f.name: pa.array(_strings(columns[f.name]) if f.type == pa.string() else columns[f.name], f.type)
        for f in schema
        if f.name != "members"
    }
    return pa.table(arrays | {"members": lists}, schema=schema)


def _strings(values: Any) -> pa.StringArray:
    return pa.array(values).cast(pa.string()) if isinstance(values, np.ndarray) else pa.array(values, pa.string())


def plain_rows(
    url: str,
    limits: SampleLimits,
    suffix: str,
    n_classes: int,
    judge: Judge,
    advance: Callable[[int], None],
    member: str | None = None,
) -> ShardRows | None:
    """The same by columns, with only the payloads of labels read; None for a shard that is not ordinary throughout.

    Args:
        url: path or URL of the shard.
        limits: limits on the cost of one sample.
        suffix: lower-case suffix of the members with labels.
        n_classes: number of classes; labels at or above it are refused. 0 leaves all labels to `judge`.
        judge: function for samples without exactly one image and one label of digits alone.
        advance: function called with the number of finished samples.
        member: `ImageConfig.member`.
    """
    try:
        plain = _read(url, limits, suffix, n_classes, _plain_suffixes(member))
    except NotPlain:
        return None
    n = len(plain.names_N)
    first_K = np.flatnonzero(np.append(True, plain.keys_N[1:] != plain.keys_N[:-1]))
    counts_K = np.diff(first_K, append=n)
    keys_K = plain.keys_N[first_K]
    if (
        len(np.unique(keys_K)) < len(keys_K)
        or len(np.unique(np.char.lower(plain.names_N))) < n
        or counts_K.max() > limits.max_members
        or np.add.reduceat(plain.sizes_N, first_K).max() > limits.max_sample_bytes
    ):
        return None
    columns = {
        "position": np.arange(len(keys_K)),
        "key": keys_K,
        "start": plain.starts_N[first_K],
        "end": plain.ends_N[first_K + counts_K - 1],
        **_judged(plain, first_K, counts_K, judge),
    }
    advance(len(keys_K))
    return ShardRows(_table(columns, plain.names_N, plain.sizes_N, counts_K), None, plain.size, None, 0)


def _plain_suffixes(member: str | None) -> np.ndarray:
    """Suffixes that make the only member with one of them the image of its sample."""
    if member is None:
        return _IMAGE_SUFFIXES
    is_suffix = member != "first" and is_picture(member.lower()) and member.isascii()
    return np.array([member.lower().encode()] if is_suffix else [], "S")


class _Plain(NamedTuple):
    """All N members of a plain shard.

    Attributes:
        names_N, keys_N: names and keys, dtype S.
        is_image_N, is_label_N: masks by suffix, bool.
        label_N: labels, -1 for other members.
        sizes_N, starts_N, ends_N: as in PlainMembers.
        odd_labels: index -> payload of members that should be labels.
        size: size of the shard in bytes.
    """

    names_N: np.ndarray
    keys_N: np.ndarray
    is_image_N: np.ndarray
    is_label_N: np.ndarray
    label_N: np.ndarray
    sizes_N: np.ndarray
    starts_N: np.ndarray
    ends_N: np.ndarray
    odd_labels: dict[int, bytes]
    size: int


def _read(url: str, limits: SampleLimits, suffix: str, n_classes: int, image_suffixes: np.ndarray) -> _Plain:
    columns: list[tuple[np.ndarray, ...]] = []
    odd_labels: dict[int, bytes] = {}
    n = listed = folders = 0
    with open_read(url) as file:
        stream = ShardFile(file, url, digest=False)
        for found in read_plain(cast(BinaryIO, stream), TarLimits(max_member_bytes=limits.max_sample_bytes)):
            usual = split_usual(found.names_N)
            # Names and 512 bytes a member, as in SampleReader.
            listed += int((np.char.str_len(found.names_N) + 512).sum())
            folders += int(np.char.count(found.names_N, b"/").sum())  # an upper bound
            if usual is None or listed + FOLDER_BYTES * folders > limits.max_listing_bytes:
                raise NotPlain
            is_label_N = usual[1] == suffix.encode()
            label_N = np.full(len(is_label_N), -1)
            label_N[is_label_N] = _labels(found, is_label_N, n_classes)
            for i in np.flatnonzero(is_label_N & (label_N < 0)).tolist():
                start, size = int(found.payloads_N[i]), int(found.sizes_N[i])
                if size > SMALL:
                    raise NotPlain
                odd_labels[n + i] = found.window[start : start + size]
            is_image_N = np.isin(usual[1], image_suffixes)
            members = (found.sizes_N, found.starts_N, found.ends_N)
            columns.append((found.names_N, usual[0], is_image_N, is_label_N, label_N, *members))
            n += len(label_N)
        size = stream.finish()[1]
    if not columns:
        raise NotPlain
    names_N, keys_N, *others = (np.concatenate(column) for column in zip(*columns, strict=True))
    is_image_N, is_label_N, label_N, sizes_N, starts_N, ends_N = others
    return _Plain(names_N, keys_N, is_image_N, is_label_N, label_N, sizes_N, starts_N, ends_N, odd_labels, size)


def _labels(found: PlainMembers, is_label_N: np.ndarray, n_classes: int) -> np.ndarray:
    """Labels (M,) of the members `is_label_N`; -1 for payloads that are not a few digits, or are n_classes or more."""
    size_M, start_M = found.sizes_N[is_label_N], found.payloads_N[is_label_N]
    fits_M = (size_M > 0) & (size_M <= _MAX_DIGITS)
    digit_MX = np.frombuffer(found.window + bytes(_MAX_DIGITS), np.uint8)[
        np.where(fits_M, start_M, 0)[:, None] + np.arange(_MAX_DIGITS)
    ] - np.uint8(ord("0"))
    counts_MX = np.arange(_MAX_DIGITS) < size_M[:, None]
    place_MX = 10 ** np.clip(size_M[:, None] - 1 - np.arange(_MAX_DIGITS), 0, _MAX_DIGITS)
    label_M = np.where(counts_MX, digit_MX * place_MX, 0).sum(1)
    good_M = fits_M & ~(counts_MX & (digit_MX > 9)).any(1) & (label_M < n_classes)
    return np.where(good_M, label_M, -1)


def _judged(plain: _Plain, first_K: np.ndarray, counts_K: np.ndarray, judge: Judge) -> dict[str, Any]:
    """Columns of _JUDGED: most samples have one image and one label, and need no call of `judge`."""
    label_K = np.maximum.reduceat(plain.label_N, first_K)
    easy_K = (np.add.reduceat(plain.is_image_N, first_K, dtype=int) == 1) & (label_K >= 0)
    easy_K &= np.add.reduceat(plain.is_label_N, first_K, dtype=int) == 1
    image_K = np.maximum.reduceat(np.arange(len(plain.names_N)) * plain.is_image_N, first_K)
    columns: dict[str, list[Any]] = {name: [None] * len(first_K) for name in _JUDGED}
    columns["status"] = ["ok"] * len(first_K)
    columns["label"] = label_K.tolist()
    columns["image"] = plain.names_N[image_K].astype(str).tolist()
    for k in np.flatnonzero(~easy_K).tolist():
        (judged,) = judge(_sample(plain, k, range(int(first_K[k]), int(first_K[k] + counts_K[k]))), k)
        for name in _JUDGED:
            columns[name][k] = judged.get(name)
    return columns


def _sample(plain: _Plain, position: int, at: range) -> Sample:
    names = plain.names_N[at.start : at.stop].astype(str).tolist()
    sizes = list(zip(names, plain.sizes_N[at.start : at.stop].tolist(), strict=True))
    labels = [(names[i - at.start], _payload(plain, i)) for i in at if plain.is_label_N[i]]
    return Sample(position, plain.keys_N[at[0]].decode(), labels, None, sizes)


def _payload(plain: _Plain, i: int) -> bytes:
    return plain.odd_labels[i] if i in plain.odd_labels else b"%d" % plain.label_N[i]
