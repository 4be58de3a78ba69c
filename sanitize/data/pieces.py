"""Reading an uncompressed shard again, by the offsets in its index: many samples at once where the archive is plain.

Shapes: K samples of a piece, N members of theirs.
"""

import io
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sanitize.data.samples import Sample, SampleLimits, SampleReader, ShardFile
from sanitize.tar.names import printable, split_usual
from sanitize.tar.plain import NotPlain, PlainMembers, normalised, parse_plain
from sanitize.tar.read import TarLimits

_PIECE_BYTES = 1 << 20  # bytes read at once; members of larger samples are read one by one


class Moved(Exception):
    """The shard has changed since it was indexed, at the sample of this position."""

    def __init__(self, position: int) -> None:
        self.position = position


class Piece(NamedTuple):
    """Neighbouring samples of a shard.

    Attributes:
        positions: positions in the shard.
        keys: keys of the samples.
        bounds: K + 1 indices: sample i has the members bounds[i], …, bounds[i + 1] - 1.
        members: members of all samples; offsets count from the beginning of the piece.
    """

    positions: range
    keys: list[str]
    bounds: list[int]
    members: PlainMembers

    def samples(self, which: Iterable[int] | None = None) -> Iterator[Sample]:
        """The samples; or only those of the indices `which` in the piece."""
        names, sizes_N = self.members.names_N.astype(str).tolist(), self.members.sizes_N.tolist()
        start_N, window = self.members.payloads_N.tolist(), self.members.window
        for i in range(len(self.keys)) if which is None else which:
            own = range(self.bounds[i], self.bounds[i + 1])
            members = [(names[j], window[start_N[j] : start_N[j] + sizes_N[j]]) for j in own]
            yield Sample(self.positions[i], self.keys[i], members, None, [(names[j], sizes_N[j]) for j in own])

    def payloads(self, names: list[str]) -> list[bytes]:
        """Payloads of the members with these (ASCII) names, in the order of the shard."""
        members = self.members
        is_wanted_N = np.isin(members.names_N, np.array(names, "S"))
        starts, sizes = members.payloads_N[is_wanted_N].tolist(), members.sizes_N[is_wanted_N].tolist()
        return [members.window[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def normalised(self, keep_K: np.ndarray) -> bytes:
        """The samples with `keep_K` (bool) True, as TarWriter writes them."""
        return normalised(self.members, np.repeat(keep_K, np.diff(self.bounds)))


def read_pieces(file: ShardFile, rows: pa.Table, limits: SampleLimits) -> Iterator[Piece | Sample]:
    """All samples of a shard, in order; one by one where a piece is not ordinary.

    Args:
        file: the shard, at its beginning.
        rows: its index rows (rows.SCHEMA).
        limits: limits of the index.

    Raises:
        Moved: names or sizes of members differ from those in the index. Other changes show in the digest of the file.
    """
    start_K, end_K = rows["start"].to_numpy(), rows["end"].to_numpy()
    lists = rows["members"].combine_chunks()
    bounds, names, sizes = lists.offsets.to_numpy(), lists.values.field("name"), lists.values.field("size").to_numpy()
    keys, first, at = rows["key"].to_pylist(), 0, 0
    while first < len(rows):
        start = int(start_K[first])
        stop = max(first + 1, int(np.searchsorted(end_K, start + _PIECE_BYTES, "right")))
        size = int(end_K[stop - 1]) - start
        file.skip(start - at)
        span, at = _Span(file, size), start + size
        stream: Any = span
        try:
            if size > _PIECE_BYTES:
                raise NotPlain
            data = span.read(size)
            stream = io.BytesIO(data)
            own = slice(bounds[first], bounds[stop])
            members = _members(data, sizes[own], limits)
            if not pa.array(members.names_N).cast(pa.string()).equals(names[own]):
                raise Moved(first)
            yield Piece(range(first, stop), keys[first:stop], (bounds[first : stop + 1] - own.start).tolist(), members)
        except NotPlain:
            yield from as_indexed(SampleReader(stream, limits), rows.slice(first, stop - first), first)
        file.skip(span.left)
        first = stop


def _members(data: bytes, sizes_N: np.ndarray, limits: SampleLimits) -> PlainMembers:
    """All members of an ordinary piece. Raises NotPlain for others."""
    members = parse_plain(data, TarLimits(max_member_bytes=limits.max_sample_bytes))
    if not np.array_equal(members.sizes_N, sizes_N):
        raise NotPlain  # perhaps a member belongs to no sample
    if split_usual(members.names_N) is None or len(np.unique(members.names_N)) < len(sizes_N):
        raise NotPlain
    return members


def as_indexed(samples: Iterable[Sample], rows: pa.Table, first: int = 0) -> Iterator[Sample]:
    """The same samples, with positions from `first` on. Raises Moved where names or sizes differ from `rows`."""
    wanted = rows["members"].to_pylist()
    n = 0
    for sample in samples:
        if n == len(wanted) or [{"name": printable(name), "size": size} for name, size in sample.sizes] != wanted[n]:
            raise Moved(first + n)
        yield sample._replace(position=first + n)
        n += 1
    if n != len(wanted):
        raise Moved(first + n)


class _Span:
    """The next bytes of a file as a stream."""

    def __init__(self, file: ShardFile, size: int) -> None:
        self._file = file
        self.left = size

    def read(self, n: int) -> bytes:
        """At most `n` bytes, forward only."""
        data = self._file.read(min(n, self.left))
        self.left -= len(data)
        return data

    def seekable(self) -> bool:
        """No."""
        return False
