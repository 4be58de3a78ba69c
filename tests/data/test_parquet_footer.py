"""Parquet files of little but a footer: what it claims is refused before pyarrow holds it."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.data.parquet_footer import check_footer
from sanitize.errors import DataError
from sanitize.importing.arrow import ParquetGroups

pytestmark = pytest.mark.hostile

# Read files by the reader named, each in a process of its own, and print a line for each: error, rise of memory in MiB.
READ = """
import json, os, re, sys
from pathlib import Path
from sanitize.data.labels import LabelReader
from sanitize.data.stated_hashes import StatedHashes
from sanitize.errors import SanitizeError
from sanitize.importing.arrow import ParquetGroups

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

reader, *places = sys.argv[1:]
for place in places:
    if os.fork():
        os.wait()
        continue
    before, message = peak(), ""
    try:
        if reader == "import":
            list(ParquetGroups(place).groups("key"))
        else:
            {"labels": LabelReader, "hashes": StatedHashes}[reader](f"table:{place}#class")
    except SanitizeError as error:
        message = str(error)
    print(json.dumps([message, peak() - before]), flush=True)
    os._exit(0)
"""


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def integer(n: int) -> bytes:
    return varint(2 * n)


def column(name: bytes) -> bytes:
    return b"\x15\x0c\x25\x00\x18" + varint(len(name)) + name + b"\0"


def parquet(columns: bytes, n: int, groups: int = 0, chunks: int = 0) -> bytes:
    """A file of nothing but a footer, in Thrift's compact protocol: `n` columns, and row groups of `chunks` columns."""
    root = b"\x48\x01r\x15" + integer(n) + b"\0"
    footer = b"\x15\x02\x19\xfc" + varint(n + 1) + root + columns + b"\x16" + integer(groups)
    group = b"\x19\xfc" + varint(chunks) + b"\x26\x08\0" * chunks + b"\x16\x00\x16\x02\0"
    footer += b"\x19\xfc" + varint(groups) + group * groups + b"\0"
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def nested(depth: int, name: bytes, leaves: int) -> bytes:
    """A file of nothing but a footer: columns inside of groups, one inside the other, of one name."""
    group = b"\x35\x02\x18" + varint(len(name)) + name + b"\x15"  # and the number of children
    n = 1 + depth + leaves
    schema = b"\x48\x01r\x15" + integer(1) + b"\0" + (group + integer(1) + b"\0") * (depth - 1)
    schema += group + integer(leaves) + b"\0" + column(b"key") * leaves
    footer = b"\x15\x02\x19\xfc" + varint(n) + schema + b"\x16\x00\x19\x0c\0"
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


NAMED = column(b"key") + column(b"class")
TWENTY, THOUSAND = NAMED + column(b"c") * 18, NAMED + column(b"c") * 998
TOO_LARGE = (
    r"has a footer of [\d,]+ bytes(, more than 16,777,216| that needs more than 256 MiB of memory): write it again"
)
REFUSED = {
    "two million columns": parquet(NAMED + column(b"c00000") * (2 * 10**6 - 2), 2 * 10**6),
    "columns without a name": parquet(NAMED + column(b"") * 200_000, 200_002),
    "row groups of many columns": parquet(TWENTY, 20, 60, 11_000),
    "many row groups of twenty columns": parquet(TWENTY, 20, 58_250, 20),
    "many row groups of a thousand columns": parquet(THOUSAND, 1000, 1_389, 1_000),
    "a group with a long name": nested(1, b"g" * 1_000_000, 900),
}
# As much as is read, of each kind.
READ_STILL = {
    "row groups of many columns": parquet(TWENTY, 20, 2, 99_000),
    "many row groups of twenty columns": parquet(TWENTY, 20, 11_000, 20),
    "many row groups of two columns": parquet(NAMED, 2, 75_000, 2),
    "many row groups of a thousand columns": parquet(THOUSAND, 1000, 235, 1_000),
    "columns": parquet(NAMED + column(b"") * 3_990, 3_992),
    "a group with a long name": nested(1, b"g" * 70_000, 900),
    "groups with names": nested(95, b"g" * 128, 3_800),
}


def read(files: dict[str, bytes], reader: str, folder: Path) -> dict[str, tuple[str, int]]:
    """The error of a reader for each file, and how much the peak of its memory rose, in MiB."""
    paths = [folder / f"{i}.parquet" for i in range(len(files))]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    ran = subprocess.run(
        [sys.executable, "-c", READ, reader, *map(str, paths)], capture_output=True, text=True, timeout=300, check=True
    )
    found = dict(zip(files, map(json.loads, ran.stdout.splitlines()), strict=True))
    assert all("\n" not in message for message, _ in found.values())
    return found


@pytest.mark.parametrize("reader", ["labels", "hashes", "import"])
def test_a_footer_that_would_take_much_memory_is_refused_before_it_is_read(tmp_path: Path, reader: str) -> None:
    found = read(REFUSED, reader, tmp_path)
    assert {kind: message for kind, (message, _) in found.items() if not re.search(TOO_LARGE, message)} == {}
    assert {kind: n_mib for kind, (_, n_mib) in found.items() if n_mib > 50} == {}


@pytest.mark.parametrize("reader", ["labels", "import"])
def test_a_footer_that_is_read_takes_less_than_300_mib(tmp_path: Path, reader: str) -> None:
    found = read(READ_STILL, reader, tmp_path)
    assert {kind: message for kind, (message, _) in found.items() if re.search(TOO_LARGE, message)} == {}
    assert {kind: n_mib for kind, (_, n_mib) in found.items() if n_mib > 300} == {}


def test_a_file_of_small_images_with_statistics_has_a_large_footer_and_is_read(tmp_path: Path) -> None:
    """The smallest and largest image of each row group are in the footer: 5 MB for 100,000 images of 2 KB."""
    path = tmp_path / "x.parquet"
    images = [{"bytes": i.to_bytes(2, "big") + bytes(2_300), "path": f"{i}.png"} for i in range(4_000)]
    pq.write_table(pa.table({"image": images, "label": range(4_000)}), path, row_group_size=4)
    assert pq.read_metadata(path).serialized_size > 4 << 20
    assert len(list(ParquetGroups(str(path)).groups("image"))) == 1_000


def check(data: bytes) -> None:
    check_footer(io.BytesIO(data), "x", "write it again")


def ordinary() -> bytes:
    file = io.BytesIO()
    columns = {"key": ["a", None], "class": [1.0, 2.0], "x": [[{"y": True}], []], "z": [[(1, "b")], None]}
    kinds = [("key", pa.string()), ("class", pa.float64()), ("x", pa.list_(pa.struct({"y": pa.bool_()})))]
    schema = pa.schema([*kinds, ("z", pa.map_(pa.int8(), pa.string()))], {"a": "b" * 300})
    sorting = [pq.SortingColumn(0)]
    pq.write_table(pa.table(columns, schema), file, row_group_size=1, sorting_columns=sorting, write_page_index=True)
    return file.getvalue()


def test_the_footer_of_an_ordinary_file_is_read_to_its_last_byte() -> None:
    data = ordinary()
    check(data)
    n = int.from_bytes(data[-8:-4], "little")
    assert n == pq.read_metadata(io.BytesIO(data)).serialized_size
    for less in [*range(1, 100), *range(100, n + 1, 23)]:
        with pytest.raises(DataError, match="its footer is damaged"):
            check(data[: -8 - less] + (n - less).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" * 2, b"key,class\na,1\n", b"PAR1\xff\xff\xff\xffPAR1"])
def test_what_does_not_end_with_a_footer_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="x cannot be read as a Parquet file: it does not end with a footer"):
        check(data)


def test_encrypted_files_are_refused() -> None:
    with pytest.raises(DataError, match="x is encrypted"):
        check(ordinary()[:-4] + b"PARE")


@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 20))
def test_a_changed_footer_is_read_or_refused_by_a_data_error(new: bytes, start: int, left_out: int) -> None:
    data = ordinary()
    n = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - n : -8]
    footer = footer[:start] + new + footer[start + left_out :]
    try:
        check(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    except DataError:
        return


def test_structures_deep_inside_each_other_are_refused() -> None:
    for body in (b"\x1c" * 5_000, b"\x19" * 5_000, (b"\x1b\x01" + b"\xbb") * 5_000):
        with pytest.raises(DataError, match="its footer is damaged"):
            check(b"PAR1" + body + len(body).to_bytes(4, "little") + b"PAR1")
