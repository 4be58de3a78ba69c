"""Objects behind URLs: failed requests are repeated, and objects are read and written whole."""

import hashlib
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sanitize import remote, storage
from sanitize.artifacts import MANIFEST, Artifact, Part, Recipe, make, verify
from sanitize.data.sources import find_shards, refuse_inside
from sanitize.errors import ArtifactError, ConfigError, DataError, StorageError
from tests.faulty_proxy import FAULTS, FaultyProxy, faulty_proxy
from tests.s3 import s3_bucket

RECIPE = Recipe(stage="test", config={"a": 1})


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FaultyProxy]]:
    """A bucket behind a proxy that spoils a quarter of all answers."""
    with s3_bucket(monkeypatch, rate=1 / 4, seed=1) as found:
        yield found


def put(url: str, data: bytes) -> str:
    with fsspec.open(url, "wb") as file:
        file.write(data)
    return url


def test_what_may_pass_is_tried_again_and_what_may_not_is_raised_at_once(no_pauses: None) -> None:
    calls: list[int] = []

    def fails(times: int, error: Exception) -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    assert remote.retried(lambda: fails(3, OSError("busy")), "read it") == "done"
    assert len(calls) == 4
    calls.clear()
    with pytest.raises(StorageError, match=r"cannot read it: RuntimeError: busy \(8 attempts\)"):
        remote.retried(lambda: fails(99, RuntimeError("busy")), "read it")
    assert len(calls) == remote.ATTEMPTS
    calls.clear()
    with pytest.raises(FileNotFoundError):
        remote.retried(lambda: fails(99, FileNotFoundError("x")), "read it")
    assert len(calls) == 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_range_reader_reads_like_a_file(data: st.DataObject) -> None:
    content = random.Random(0).randbytes(data.draw(st.integers(0, 300)))
    url = put(f"memory://{uuid.uuid4().hex}", content)
    with remote.RangeReader(url, block=data.draw(st.integers(1, 64))) as reader:
        for _ in range(data.draw(st.integers(1, 8))):
            at = data.draw(st.integers(0, 320))
            assert reader.seek(at) == at
            n = data.draw(st.integers(0, 100))
            piece = b""
            while len(piece) < n and (more := reader.read(n - len(piece))):
                piece += more
            assert piece == content[at : at + n]
        assert reader.seek(0, os.SEEK_END) == len(content)
        assert reader.seek(-len(content), os.SEEK_CUR) == 0
        assert reader.readall() == content


def test_a_reader_holds_two_blocks_and_no_more(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(memory, bytes(1000))
    asked: list[tuple[int, int]] = []
    fs, _ = remote.filesystem(memory)
    whole = fs.cat_file

    def cat_file(path: str, start: int, end: int) -> bytes:
        asked.append((start, end))
        return bytes(whole(path, start=start, end=end))

    monkeypatch.setattr(fs, "cat_file", cat_file)
    with remote.RangeReader(memory, block=100) as reader:
        reader.read(1)
        time.sleep(0.1)  # time in which a reader without a bound would go on
        assert sorted(asked) == [(0, 100), (100, 200)]
        reader.seek(550)
        reader.read(1)
        time.sleep(0.1)
        assert sorted(asked)[2:] == [(550, 650), (650, 750)]


def test_a_server_that_ignores_ranges_is_refused(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(memory, bytes(1000))
    fs, _ = remote.filesystem(memory)
    monkeypatch.setattr(fs, "cat_file", lambda path, start, end: bytes(1000))
    with (
        remote.RangeReader(memory, block=100) as reader,
        pytest.raises(ValueError, match="sends more than"),
    ):
        reader.read(1)


def test_reads_go_on_at_the_offset_where_they_broke(
    faulty: tuple[str, FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, proxy = faulty
    monkeypatch.setattr(remote, "BLOCK", 1 << 16)
    content = random.Random(0).randbytes(3_000_000)
    with storage.create(f"{url}/shard.tar") as writer:
        writer.write(content)
    before = proxy.injected.copy()
    with storage.open_read(f"{url}/shard.tar") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == hashlib.sha256(content).hexdigest()  # type: ignore[arg-type]
    met = proxy.injected - before
    assert all(met[fault] for fault in FAULTS), met
    assert proxy.largest == 1 << 16  # no object is requested whole


def test_storage_does_with_urls_what_it_does_with_paths(faulty: tuple[str, FaultyProxy]) -> None:
    url, proxy = faulty
    for name in ("run/a/0.tar", "run/b.tar", "run/note.txt"):
        with storage.create(storage.join(url, name)) as writer:
            writer.write(name.encode())
    assert storage.read_bytes(f"{url}/run/b.tar") == b"run/b.tar"
    assert storage.exists(f"{url}/run/b.tar")
    assert storage.exists(f"{url}/run/a")
    assert not storage.exists(f"{url}/run/c")
    assert storage.names_below(f"{url}/run") == ["a/0.tar", "b.tar", "note.txt"]
    assert storage.names_below(f"{url}/nothing") == []
    assert find_shards(f"{url}/run") == {"a/0.tar": f"{url}/run/a/0.tar", "b.tar": f"{url}/run/b.tar"}
    assert find_shards(f"{url}/run/*.tar") == {"b.tar": f"{url}/run/b.tar"}
    first = storage.fingerprint(f"{url}/run/b.tar")
    assert first["size"] == 9
    with storage.create(f"{url}/run/b.tar") as writer:
        writer.write(b"ran/b.tar")
    assert storage.fingerprint(f"{url}/run/b.tar") != first
    storage.remove(f"{url}/run/a")
    storage.remove(f"{url}/run/nothing")
    assert storage.names_below(f"{url}/run") == ["b.tar", "note.txt"]
    with pytest.raises(DataError, match="cannot open"):
        storage.open_read(f"{url}/run/a/0.tar")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{url}/run/a/0.tar")
    assert proxy.injected.total() > 10


def test_an_object_whose_writer_fails_never_appears(memory: str) -> None:
    with pytest.raises(ZeroDivisionError), storage.create(f"{memory}/x") as writer:
        writer.write(bytes(1 // writer.size))
    assert not storage.exists(f"{memory}/x")


def test_a_store_that_never_answers_is_an_error(memory: str, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    with faulty_proxy(("127.0.0.1", 1), rate=0.0) as proxy:
        monkeypatch.setattr(proxy, "draw", lambda: "error before")
        with pytest.raises(StorageError, match=rf"cannot look at {proxy.url}/x: .*8 attempts"):
            storage.read_bytes(f"{proxy.url}/x")
    fs, _ = remote.filesystem(memory)

    def put_file(*_: str, **__: Any) -> None:
        raise ConnectionResetError("gone")

    monkeypatch.setattr(fs, "put_file", put_file)
    with pytest.raises(StorageError, match=rf"cannot write {memory}/x: .*gone.*8 attempts"):
        put_whole(f"{memory}/x", b"x")
    assert not storage.exists(f"{memory}/x")


def put_whole(url: str, data: bytes) -> None:
    with storage.create(url) as writer:
        writer.write(data)


def test_a_store_that_keeps_less_than_was_sent_is_sent_all_of_it_again(
    memory: str, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    fs, _ = remote.filesystem(memory)
    whole, calls = fs.put_file, []

    def put_file(file: str, path: str, **more: Any) -> None:
        calls.append(path)
        whole(file, path, **more)
        if len(calls) == 1:
            fs.pipe_file(path, b"ha")

    monkeypatch.setattr(fs, "put_file", put_file)
    put_whole(f"{memory}/x", b"half")
    assert storage.read_bytes(f"{memory}/x") == b"half"
    assert len(calls) == 2


def test_shards_are_read_from_a_web_server_and_what_is_missing_is_requested_once(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"shard")

    class Handler(SimpleHTTPRequestHandler):
        asked: ClassVar[list[str]] = []

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            self.asked.append(self.path)

        def log_error(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert find_shards(f"{url}/x.tar") == {"x.tar": f"{url}/x.tar"}
        assert storage.read_bytes(f"{url}/x.tar") == b"shard"
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(f"{url}/y.tar")
        server.shutdown()
    assert Handler.asked.count("/y.tar") == 2  # HEAD, then GET


def test_writing_to_a_read_only_protocol_is_an_error() -> None:
    with pytest.raises(StorageError, match="only read from"):
        put_whole("http://127.0.0.1:1/x", b"x")


def test_a_protocol_whose_library_is_missing_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match="pip install"):
        storage.read_bytes("gs://bucket/x")


def build(part_names: list[str], killed_at: str = "") -> tuple[dict, list[str]]:
    made: list[str] = []

    def write_part(name: str, part: Part) -> None:
        if name == killed_at:
            raise KeyboardInterrupt
        made.append(name)
        part.write(f"rows/{name}", name.encode())
        part.counts["samples"] += 1

    return {"parts": part_names, "write_part": write_part}, made


def test_a_remote_artifact_is_the_local_one_and_resumes(faulty: tuple[str, FaultyProxy], tmp_path: Path) -> None:
    url, _ = faulty
    names = ["a", "b", "c"]
    here = make(Artifact, tmp_path / "x", RECIPE, **build(names)[0])
    out = f"{url}/run/x"
    arguments, made = build(names, killed_at="c")
    with pytest.raises(KeyboardInterrupt):
        make(Artifact, out, RECIPE, **arguments)
    assert made == ["a", "b"]
    with pytest.raises(ArtifactError, match="not a finished artifact"):
        Artifact.load(out)
    arguments, made = build(names)
    there = make(Artifact, out, RECIPE, **arguments)
    assert made == ["c"]
    assert there.digest == here.digest
    assert there.read("rows/b") == b"b"
    assert verify(out) == []
    assert storage.names_below(f"{url}/run") == sorted(f"x/{n}" for n in (MANIFEST, "rows/a", "rows/b", "rows/c"))
    with pytest.raises(ArtifactError, match="another recipe"):
        make(Artifact, out, Recipe(stage="test", config={"a": 2}), **build(names)[0])


def test_parts_that_another_recipe_wrote_over_are_made_again(memory: str) -> None:
    out = f"{memory}/x"
    one, two = RECIPE, Recipe(stage="test", config={"a": 2})

    def write_as(text: bytes, stop: bool) -> dict:
        def write_part(name: str, part: Part) -> None:
            if stop and name == "b":
                raise KeyboardInterrupt
            part.write(name, text)

        return {"parts": ["a", "b"], "write_part": write_part}

    for recipe, text in ((one, b"one"), (two, b"two!")):
        with pytest.raises(KeyboardInterrupt):
            make(Artifact, out, recipe, **write_as(text, stop=True))
    artifact = make(Artifact, out, one, **write_as(b"one", stop=False))
    assert (artifact.read("a"), artifact.read("b")) == (b"one", b"one")
    assert verify(out) == []


def test_readers_trust_only_what_the_manifest_lists(memory: str) -> None:
    artifact = make(Artifact, f"{memory}/x", RECIPE, **build(["a", "b"])[0])
    put(artifact.url("rows/a"), b"?")
    put(artifact.url("rows/z"), b"z")
    with pytest.raises(ArtifactError, match="differs from the manifest"):
        artifact.read("rows/a")
    with pytest.raises(ArtifactError, match="has no rows/z"):
        artifact.read("rows/z")
    with pytest.raises(ArtifactError, match="not on this machine"):
        artifact.file("rows/b")
    problems = verify(artifact.path)
    assert [problem.partition("x/rows/")[2] for problem in problems] == [
        "z: not listed in the manifest",
        "a: content differs from the manifest",
    ]


def test_a_run_folder_inside_a_searched_prefix_is_refused() -> None:
    for source, out in [
        ("s3://b/in", "s3://b/in/run"),
        ("s3://b/in/**/*.tar", "s3://b/in/run"),
        ("s3://b", "s3://b/r"),
    ]:
        with pytest.raises(ConfigError, match="lies inside"):
            refuse_inside([source], out)
    for source, out in [("s3://b/in", "s3://b/in2"), ("s3://b/in/*.tar", "s3://b/in/run"), ("s3://b/in", "in/run")]:
        refuse_inside([source], out)
