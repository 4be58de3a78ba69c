"""Parquet files of little but a footer: what it claims is refused before pyarrow holds it."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sanitize.data.parquet_footer import footer_bytes

pytestmark = pytest.mark.hostile

# Read a file by the reader named, in a process of its own; print the error and the memory above that before, in MiB.
READ = """
import json, re, sys
from pathlib import Path
from sanitize.data.labels import LabelReader
from sanitize.data.stated_hashes import StatedHashes
from sanitize.errors import SanitizeError
from sanitize.importing.arrow import ParquetGroups

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

place, reader = sys.argv[1:]
before, message = peak(), ""
try:
    if reader == "import":
        list(ParquetGroups(place).groups("key"))
    else:
        {"labels": LabelReader, "hashes": StatedHashes}[reader](f"table:{place}#class")
except SanitizeError as error:
    message = str(error)
print(json.dumps([message, peak() - before]))
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


NAMED = column(b"key") + column(b"class")
FILES = {
    "a million columns": (parquet(NAMED + column(b"c00000") * (10**6 - 2), 10**6), "has a footer of 13,"),
    "columns without a name": (parquet(NAMED + column(b"") * 200_000, 200_002), "Exceeded size limit"),
    "row groups of many columns": (parquet(NAMED + column(b"c") * 18, 20, 60, 11_000), "class|key|columns|read"),
}


@pytest.mark.parametrize("reader", ["labels", "hashes", "import"])
@pytest.mark.parametrize("kind", FILES)
def test_a_footer_of_columns_is_refused_in_bounded_memory_and_time(tmp_path: Path, kind: str, reader: str) -> None:
    data, says = FILES[kind]
    path = tmp_path / "x.parquet"
    path.write_bytes(data)
    ran = subprocess.run(
        [sys.executable, "-c", READ, str(path), reader], capture_output=True, text=True, timeout=120, check=True
    )
    message, n_mib = json.loads(ran.stdout)
    assert n_mib < 600
    assert "\n" not in message
    if reader != "import" or kind != "row groups of many columns":  # these are listed, and no row is read
        assert any(part in message for part in says.split("|"))


def test_the_footer_of_an_ordinary_file_is_measured() -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"], "class": [1]}), file)
    assert footer_bytes(file) == pq.read_metadata(file).serialized_size
    for data in (b"", b"PAR1", b"PAR1" * 2, b"key,class\na,1\n"):
        assert footer_bytes(io.BytesIO(data)) == 0
