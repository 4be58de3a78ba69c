import hashlib
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from sanitize.errors import ArtifactError, DataError, SanitizeError
from sanitize.storage import create, exclusive, fingerprint, open_read, sha256_file


def test_a_missing_file_is_a_data_error_that_names_it(tmp_path: Path) -> None:
    for function in (open_read, fingerprint):
        for url in (f"{tmp_path}/missing.tar", f"memory://{uuid.uuid4().hex}.tar"):
            with pytest.raises(DataError, match=url.rpartition("/")[2]):
                function(url)
    with pytest.raises(SanitizeError):
        open_read(str(tmp_path))


def test_the_fingerprint_changes_with_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"123")
    first = fingerprint(str(path))
    assert first == fingerprint(f"file://{path}")
    assert first["url"] == str(path)
    os.utime(path, ns=(1, 1))
    second = fingerprint(str(path))
    path.write_bytes(b"1234")
    os.utime(path, ns=(1, 1))
    third = fingerprint(str(path))
    assert first["size"] == second["size"] == 3
    assert second["modified"] == third["modified"] == 1
    assert third["size"] == 4


def test_create_hashes_what_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    with create(path) as writer:
        writer.write(b"ab")
        writer.write(memoryview(b"cd"))
        assert not path.exists()
    assert path.read_bytes() == b"abcd"
    assert writer.sha256 == hashlib.sha256(b"abcd").hexdigest() == sha256_file(path)
    assert writer.size == 4


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_create_leaves_everything_as_it_was_when_interrupted(
    tmp_path: Path, before: bytes | None, error: type[BaseException]
) -> None:
    path = tmp_path / "file.bin"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(error), create(path) as writer:  # noqa: PT012
        writer.write(b"half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["file.bin"])
    assert before is None or path.read_bytes() == before


def test_a_locked_folder_is_refused_to_another_process_until_its_owner_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = "import sys; from pathlib import Path; from sanitize.storage import exclusive\n"
    script += "with exclusive(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ArtifactError, match="another process"), exclusive(folder):
        pass
    other.kill()
    other.communicate()
    with exclusive(folder):
        pass
    with exclusive(folder):
        pass
