"""The fast readers of plain archives against the strict reader and the writer, on archives of several programs."""

import io
import itertools
import tarfile

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sanitize.tar.plain import NotPlain, normalised, parse_plain, read_plain
from sanitize.tar.read import Member, TarDamage, TarLimits, TarReader
from sanitize.tar.write import TarWriter

LIMITS = TarLimits()
KINDS = ("ours", "ustar", "gnu", "pax", "mixed")
sizes = st.one_of(st.integers(0, 1600), st.sampled_from([511, 512, 513, 1024, 2047, 2048, 2049, 20_000, 70_000]))


def archive(kind: str, payloads: list[bytes]) -> bytes:
    """The payloads as files 0.a, 1.a, …; "pax" has a header for each time, as webdataset writes it."""
    file = io.BytesIO()
    if kind == "ours":
        tar = TarWriter(file)
        for i, data in enumerate(payloads):
            tar.add(f"{i}.a", data)
        tar.close()
        return file.getvalue()
    form = tarfile.GNU_FORMAT if kind == "gnu" else tarfile.USTAR_FORMAT if kind == "ustar" else tarfile.PAX_FORMAT
    with tarfile.open(fileobj=file, mode="w", format=form) as out:
        for i, data in enumerate(payloads):
            info = tarfile.TarInfo(f"{i}.a")
            info.size, info.uid, info.uname, info.mode = len(data), 1000, "alice", 0o600
            info.mtime = 1.7e9 + i / 3 if kind == "pax" or i % 2 else 1_700_000_000  # type: ignore[assignment]
            out.addfile(info, io.BytesIO(data))
    return file.getvalue()


def strictly(data: bytes) -> tuple[list[Member], str | None]:
    """Members that TarReader finds, and its damage or warning."""
    reader = TarReader(io.BytesIO(data), LIMITS)
    try:
        return list(reader), reader.warning
    except TarDamage as error:
        return [], error.reason


def plainly(data: bytes) -> list[tuple[str, int, int, int]] | None:
    """(name, size, start, end) of each member; None for an archive that is not plain."""
    found = []
    try:
        for members in read_plain(io.BytesIO(data), LIMITS):
            columns = (members.sizes_N.tolist(), members.starts_N.tolist(), members.ends_N.tolist())
            found += list(zip(members.names_N.astype(str).tolist(), *columns, strict=True))
            for start, size in zip(members.payloads_N.tolist(), members.sizes_N.tolist(), strict=True):
                assert size > 2048 or len(members.window) >= start + size
    except NotPlain:
        return None
    return found


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_plain_archives_are_read_as_the_strict_reader_reads_them(kind: str, data: st.DataObject) -> None:
    payloads = [b"p" * n for n in data.draw(st.lists(sizes, min_size=1, max_size=40))]
    made = archive(kind, payloads)
    members, warning = strictly(made)
    assert warning is None
    assert plainly(made) == [(m.name, m.size, m.start, m.end) for m in members]


def test_so_are_more_members_than_are_looked_at_together() -> None:
    for kind in KINDS:
        made = archive(kind, [bytes(n % 700) for n in range(5000)])
        assert plainly(made) == [(m.name, m.size, m.start, m.end) for m in strictly(made)[0]]


@pytest.mark.hostile
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_of_a_damaged_archive_they_say_the_same_or_nothing(kind: str, data: st.DataObject) -> None:
    """Bytes changed, cut off or inserted, mostly in headers: payloads may contain anything."""
    made = bytearray(archive(kind, [b"p" * n for n in data.draw(st.lists(sizes, min_size=1, max_size=6))]))
    for _ in range(data.draw(st.integers(1, 3))):
        how = data.draw(st.sampled_from(["byte", "cut", "put in", "block"]))
        at = data.draw(st.integers(0, len(made) - 1))
        if how == "byte":
            block = at // 512 * 512
            at = min(
                len(made) - 1, block + data.draw(st.sampled_from([0, 5, 99, 107, 124, 130, 135, 148, 156, 257, 345]))
            )
            made[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del made[at:]
        elif how == "put in":
            made[at:at] = bytes(data.draw(st.integers(1, 600)))
        else:
            del made[at // 512 * 512 : at // 512 * 512 + 512]
        assume(len(made) > 0)
    found = plainly(bytes(made))
    if found is not None:
        members, warning = strictly(bytes(made))
        assert warning is None
        assert all(m.kind == "file" for m in members)
        assert found == [(m.name, m.size, m.start, m.end) for m in members]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_piece_is_normalised_to_what_the_writer_writes(kind: str, data: st.DataObject) -> None:
    payloads = [bytes([1 + i % 255]) * n for i, n in enumerate(data.draw(st.lists(sizes, min_size=1, max_size=12)))]
    made = archive(kind, payloads)
    ends = [member.end for member in strictly(made)[0]]
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(ends) - 1)] * 2)))
    piece = parse_plain(made[ends[first - 1] if first else 0 : ends[last]], LIMITS)
    assert piece.sizes_N.tolist() == [len(payload) for payload in payloads[first : last + 1]]
    keep = data.draw(st.lists(st.booleans(), min_size=last - first + 1, max_size=last - first + 1))
    wanted = io.BytesIO()
    writer = TarWriter(wanted)
    for i in itertools.compress(range(first, last + 1), keep):
        writer.add(f"{i}.a", payloads[i])
    assert normalised(piece, np.array(keep)) == wanted.getvalue()


def test_padding_that_holds_something_is_cleared() -> None:
    made = bytearray(archive("ours", [b"abc", b"de"]))
    made[512 + 100] = made[1536 + 2] = 120
    piece = parse_plain(bytes(made[:2048]), LIMITS)
    assert normalised(piece, np.array([True, True])) == archive("ours", [b"abc", b"de"])[:2048]


@pytest.mark.parametrize("cut", [1, 511, 512, 513, 1024])
def test_a_piece_must_begin_and_end_with_members(cut: int) -> None:
    made = archive("ours", [b"abc", b"de"])[:2048]
    for piece in (made[cut:], made[:-cut], made + bytes(cut)):
        if piece not in (made[:1024], made[1024:]):
            with pytest.raises(NotPlain):
                parse_plain(piece, LIMITS)


def test_a_payload_that_looks_like_headers_is_left_to_the_strict_reader() -> None:
    inner = archive("ours", [b"inner"])
    with pytest.raises(NotPlain):
        parse_plain(archive("ours", [inner])[: 512 + len(inner)], LIMITS)
    made = archive("ours", [b"x", inner, b"y"])
    assert plainly(made) in (None, [(m.name, m.size, m.start, m.end) for m in strictly(made)[0]])
