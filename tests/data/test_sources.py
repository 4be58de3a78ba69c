import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from sanitize.data.sources import find_shards, list_sources
from sanitize.errors import ConfigError, DataError
from sanitize.storage import check_url, fingerprint, open_read
from sanitize.tar.names import printable


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Shards at two depths, one name in two folders, and files that are no shards."""
    for name in ("b/x.tar", "a/x.tar", "a/deep/y.tar.gz", "z.tgz", "notes.txt", "a/x.tar.md5", "a/index.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.fixture
def memory() -> str:
    """A folder in fsspec's memory file system, with two shards."""
    folder = f"memory://{uuid.uuid4().hex}"
    for name in ("train/0.tar", "train/1.tar", "extra/0.tar", "readme.md"):
        with fsspec.open(f"{folder}/{name}", "wb") as file:
            file.write(name.encode())
    return folder


def test_a_directory_is_searched_at_every_depth(tree: Path) -> None:
    assert find_shards(str(tree)) == {
        "a/deep/y.tar.gz": f"{tree}/a/deep/y.tar.gz",
        "a/x.tar": f"{tree}/a/x.tar",
        "b/x.tar": f"{tree}/b/x.tar",
        "z.tgz": f"{tree}/z.tgz",
    }


def test_names_are_below_the_folder_that_all_shards_share(tree: Path) -> None:
    assert list(find_shards(f"{tree}/a")) == ["deep/y.tar.gz", "x.tar"]
    assert list(find_shards(f"{tree}/a/deep")) == ["y.tar.gz"]
    assert list(find_shards(f"{tree}/a/x.tar")) == ["x.tar"]
    assert list(find_shards([f"{tree}/a/x.tar", f"{tree}/b/x.tar"])) == ["a/x.tar", "b/x.tar"]


def test_globs_braces_lists_and_file_urls(tree: Path) -> None:
    both = {"a/x.tar": f"{tree}/a/x.tar", "b/x.tar": f"{tree}/b/x.tar"}
    assert find_shards(f"{tree}/*/*.tar") == both
    assert find_shards(f"{tree}/{{a,b}}/x.tar") == both
    assert find_shards(f"file://{tree}/{{a,b}}/x.tar") == both
    for i in range(12):
        (tree / f"train-{i:06d}.tar").touch()
    assert list(find_shards(f"{tree}/train-{{000002..000010}}.tar")) == [f"train-{i:06d}.tar" for i in range(2, 11)]
    assert list(find_shards(f"{tree}/**/y.*")) == ["y.tar.gz"]


@pytest.mark.parametrize("source", ["{}/a/*.tgz", "{}/new-{{000..002}}.tar", "{}/empty", "{}/**/none.tar", "*.none"])
def test_shards_that_may_still_come_are_no_error_where_their_folder_is(
    tree: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    (tree / "empty").mkdir()
    source = source.format(tree)
    assert find_shards(source, may_come=True) == {}
    assert list(find_shards([source, f"{tree}/b"], may_come=True)) == ["x.tar"]
    with pytest.raises(ConfigError, match="no shards"):
        find_shards([source, f"{tree}/b"])


@pytest.mark.parametrize("source", ["{}/mistyped", "{}/mistyped/*.tar", "{}/mistyped/0.tar"])
def test_a_folder_that_is_not_there_is_an_error_even_where_shards_may_come(tree: Path, source: str) -> None:
    with pytest.raises(ConfigError, match="mistyped"):
        find_shards(source.format(tree), may_come=True)


def test_the_order_of_sources_is_forgotten(tree: Path) -> None:
    sources = [f"{tree}/b/x.tar", f"{tree}/a", f"{tree}/z.tgz"]
    first, second = find_shards(sources), find_shards(sources[::-1])
    assert list(first.items()) == list(second.items())
    assert list(first) == sorted(first)


def test_relative_paths_become_absolute(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "a")
    assert find_shards("x.tar") == {"x.tar": f"{tree}/a/x.tar"}
    assert find_shards("../b") == {"x.tar": f"{tree}/b/x.tar"}


def test_what_macos_puts_beside_shards_is_no_shard(tree: Path, memory: str) -> None:
    (tree / "b/._x.tar").write_bytes(b"\0\5\x16\7")
    with fsspec.open(f"{memory}/train/._0.tar", "wb") as file:
        file.write(b"\0\5\x16\7")
    assert find_shards(str(tree / "b")) == {"x.tar": f"{tree}/b/x.tar"}
    assert list(find_shards(f"{memory}/train")) == ["0.tar", "1.tar"]
    assert list(find_shards(str(tree / "b/._x.tar"))) == ["._x.tar"]  # named by the user


def test_a_path_that_is_not_there_is_said_not_to_be_there(tree: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        find_shards(str(tree / "c"))


def test_a_path_with_glob_characters_in_it_is_found(tree: Path) -> None:
    odd = tree / "[v1]"
    odd.mkdir()
    (odd / "x.tar").touch()
    assert list(find_shards(str(odd))) == ["x.tar"]
    assert list(find_shards(str(odd / "x.tar"))) == ["x.tar"]


def test_links_that_are_named_or_matched_keep_their_names(tree: Path) -> None:
    links = tree / "links"
    links.mkdir()
    (links / "first.tar").symlink_to(tree / "a/x.tar")
    (links / "second.tar").symlink_to(tree / "b/x.tar")
    for source in ("first.tar", "*.tar", "{first,second}.tar"):
        assert find_shards(f"{links}/{source}")["first.tar"] == f"{links}/first.tar"


def test_a_folder_that_is_a_link_is_searched(tree: Path) -> None:
    (tree / "link").symlink_to(tree / "a")
    assert find_shards(str(tree / "link")) == {
        "deep/y.tar.gz": f"{tree}/link/deep/y.tar.gz",
        "x.tar": f"{tree}/link/x.tar",
    }


@pytest.mark.parametrize("again", ["a/x.tar", "a", "a/*.tar", "b/../a/x.tar"])
def test_a_shard_given_twice_is_refused(tree: Path, again: str) -> None:
    with pytest.raises(ConfigError, match=r"a/x\.tar is listed twice"):
        find_shards([f"{tree}/a/x.tar", f"{tree}/{again}"])


@pytest.mark.parametrize("source", ["none-*.tar", "missing.tar", "empty", "missing/"])
def test_nothing_found_is_an_error(tree: Path, source: str) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(ConfigError, match="no shards"):
        find_shards(f"{tree}/{source}")
    with pytest.raises(ConfigError, match="no shards"):
        find_shards([])


@pytest.mark.parametrize("sources", [["{}/a/x.tar", "{}/missing.tar"], ["{}/{{a,b,c}}/x.tar"], ["{}/a", "{}/*.zip"]])
def test_one_source_of_several_that_finds_nothing_is_an_error_too(tree: Path, sources: list[str]) -> None:
    """A missing shard in a range is lost data, and must be an error."""
    with pytest.raises(ConfigError, match="no shards"):
        find_shards([source.format(tree) for source in sources])


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "PIPE:cat x.tar",
        "shell://x.tar",
        "{memory:/,zip:/}/x.tar",
        "git://x.tar",
        "github://a:b@main/x.tar",
        "sftp://host/x.tar",
        "ssh://host/x.tar",
        "simplecache::memory://x.tar",
        "zip://x.tar::memory://y.zip",
        "{simplecache:,}:memory://x.tar",
        "zip://x.tar",
        "{pipe,memory}://x.tar",
        "reference://x.tar",
        "nonsense://x.tar",
    ],
)
@pytest.mark.hostile
def test_urls_that_do_more_than_read_bytes_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="refused"):
        find_shards([url])
    if "{" not in url:
        for function in (check_url, open_read, fingerprint):
            with pytest.raises(ConfigError, match="refused"):
                function(url)


def test_a_file_system_that_is_not_installed_is_an_error_of_ours() -> None:
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="s3fs"):
            find_shards("s3://bucket/x.tar")


@pytest.mark.parametrize(
    ("name", "says"),
    [("x.JPG", r"1 \.jpg\. `sanitize import`"), ("x.cpio", r"1 \.cpio\. A tar"), ("", "Check the path")],
)
def test_a_folder_without_shards_says_what_it_holds_and_what_to_do(tmp_path: Path, name: str, says: str) -> None:
    if name:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=says):
        find_shards(str(tmp_path))


# --- what is refused ----------------------------------------------------------------------------------------------

Plant = Callable[[Path], object]


def touch_deep(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.touch()


REFUSED: dict[str, tuple[str, Plant, str]] = {
    "link out of the folder": ("b/l.tar", lambda p: p.symlink_to("/etc/hostname"), "leads out of"),
    "link to a folder elsewhere": ("b/l", lambda p: p.symlink_to("/usr"), "leads out of"),
    "link to another shard": ("b/l.tar", lambda p: p.symlink_to("../a/x.tar"), "count twice"),
    "link to nothing": ("b/l.tar", lambda p: p.symlink_to("nowhere"), "a link to nothing"),
    "link to itself": ("b/l.tar", lambda p: p.symlink_to("l.tar"), "a link to nothing"),
    "fifo": ("b/f.tar", os.mkfifo, "not a regular file"),
    "device": ("b/z.tar", lambda p: p.symlink_to("/dev/zero"), "leads out of"),
    "folder": ("b/d.tar", Path.mkdir, "it is a folder"),
    "newline": ("b/n\n.tar", Path.touch, "control characters"),
    "not UTF-8": ("b/\udce9.tar", Path.touch, "control characters"),
    "chain of URLs": ("b/x::y.tar", Path.touch, "'::'"),
    "too long a name": (f"b/{'n' * 251}.tar", Path.touch, "longer than 220 bytes"),
    "too deep a folder": ("/".join(["b", *["d" * 200] * 6, "x.tar"]), touch_deep, "longer than 1024 bytes"),
    "lz4": ("b/c.tar.lz4", Path.touch, "lz4 compressed: not read"),
    "lzma": ("b/c.TAR.LZMA", Path.touch, "lzma compressed: not read"),
    "zip": ("b/c.zip", Path.touch, "zip compressed: not read"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.hostile
def test_one_bad_file_is_refused_by_name_and_stops_no_other(what: str, tree: Path) -> None:
    before = find_shards(str(tree))
    name, plant, reason = REFUSED[what]
    plant(tree / name)
    shards, refused = list_sources(str(tree))
    assert shards == before
    assert list(refused) == [f"{tree}/{name}"]
    assert re.search(reason, refused[f"{tree}/{name}"])
    assert printable(name.rpartition("/")[2]) in refused[f"{tree}/{name}"]
    if "not read" in reason:  # the index says so, unless `max_bad_shards` allows it
        assert find_shards(str(tree)) == before | {name: f"{tree}/{name}"}
        return
    with pytest.raises((ConfigError, DataError), match=reason):
        find_shards(str(tree))


@pytest.mark.hostile
def test_what_is_named_is_refused_like_what_is_found(tree: Path) -> None:
    (tree / "l.tar").symlink_to("a/x.tar")
    with pytest.raises(ConfigError, match="same file"):
        find_shards([f"{tree}/a/x.tar", f"{tree}/l.tar"])
    with pytest.raises(ConfigError, match="same file"):
        find_shards([f"{tree}/a/*.tar", f"{tree}/*.tar"])
    (tree / "again").symlink_to("a")
    with pytest.raises(ConfigError, match="same file"):
        find_shards([f"{tree}/a", f"{tree}/again"])
    os.mkfifo(tree / "f.tar")
    with pytest.raises(DataError, match="not a regular file"):
        find_shards(f"{tree}/f.tar")


@pytest.mark.hostile
def test_where_shards_come_in_no_pattern_follows_a_link_out(tree: Path) -> None:
    (tree / "b/l.tar").symlink_to("/etc/hostname")
    (tree / "b/up").symlink_to(tree)
    assert f"{tree}/b/l.tar" in list_sources(f"{tree}/b/*.tar", may_come=True).refused
    assert f"{tree}/b/up/a/x.tar" in list_sources(f"{tree}/b/**/*.tar", may_come=True).refused
    assert list(find_shards(f"{tree}/b/*.tar")) == ["l.tar", "x.tar"]


def test_hard_links_are_files_of_their_own(tree: Path) -> None:
    (tree / "b/h.tar").hardlink_to(tree / "a/x.tar")
    assert "b/h.tar" in find_shards(str(tree))


@pytest.mark.hostile
def test_names_that_are_found_are_not_expanded_again(tree: Path) -> None:
    odd = tree / "odd"
    odd.mkdir()
    names = ["a{1,2}.tar", "[ab].tar", "*.tar", "$WDS_X.tar", "~.tar", " .tar", "n" * 216 + ".tar"]
    for name in names:
        (odd / name).touch()
    assert sorted(find_shards(str(odd))) == sorted(names)
    assert list(find_shards(str(odd / "a{1,2}.tar"))) == ["a{1,2}.tar"]


@pytest.mark.parametrize("name", ["x.TAR", "x.Tar.Gz", "x.TGZ"])
def test_suffixes_are_known_in_any_case(name: str, tree: Path, memory: str) -> None:
    (tree / name).touch()
    assert name in find_shards(str(tree))
    with fsspec.open(f"{memory}/{name}", "wb") as file:
        file.write(b"x")
    assert name in find_shards(memory)


def test_a_folder_without_shards_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.JPG", "a/b/3.jpg", "a/x.tar.md5", "a/README"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"found there: 3 \.jpg, 1 \.tar\.md5, 1 without a suffix"):
        find_shards(str(tmp_path))
    with pytest.raises(ConfigError, match=r"found there: 2 \.jpg, .*\. `sanitize import` makes shards of images"):
        find_shards(f"{tmp_path}/a/*.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="found there: no files"):
        find_shards(f"{tmp_path}/empty")


def test_a_bucket_without_shards_says_what_it_holds(memory: str) -> None:
    with fsspec.open(f"{memory}/pictures/1.jpg", "wb") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match=r"found there: 1 \.jpg"):
        find_shards(f"{memory}/pictures")


@pytest.mark.hostile
def test_a_shard_that_is_a_folder_of_others_too_is_refused(memory: str) -> None:
    """A bucket may hold both; a run folder cannot."""
    store = fsspec.filesystem("memory").store
    store[f"{memory.removeprefix('memory:/')}/train/0.tar/x.tar"] = fsspec.implementations.memory.MemoryFile()
    shards, refused = list_sources(memory)
    assert list(shards) == ["extra/0.tar", "train/0.tar/x.tar", "train/1.tar"]
    assert [url.endswith("/train/0.tar") for url in refused] == [True]
    with pytest.raises(ConfigError, match="folder of other shards"):
        find_shards(memory)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_cannot_be_listed_is_refused_by_name(tree: Path) -> None:
    (tree / "b").chmod(0)
    try:
        assert "b" in next(iter(list_sources(str(tree)).refused.values()))
        with pytest.raises(DataError, match="cannot list"):
            find_shards(str(tree))
    finally:
        (tree / "b").chmod(0o700)


# --- fsspec -----------------------------------------------------------------------------------------------------


def test_memory_urls_are_found_read_and_fingerprinted(memory: str) -> None:
    found = find_shards(memory)
    assert list(found) == ["extra/0.tar", "train/0.tar", "train/1.tar"]
    assert list(find_shards(f"{memory}/train/*.tar")) == ["0.tar", "1.tar"]
    assert list(find_shards(f"{memory}/train/{{0..1}}.tar")) == ["0.tar", "1.tar"]
    assert list(find_shards([f"{memory}/train/1.tar", f"{memory}/extra"])) == ["extra/0.tar", "train/1.tar"]
    for name, url in found.items():
        with open_read(url) as file:
            assert file.read() == name.encode()
            file.seek(1)
            assert file.read(2) == name.encode()[1:3]
        before = fingerprint(url)
        assert before["size"] == len(name)
        assert before["url"] == url
        with fsspec.open(url, "wb") as file:
            file.write(name[::-1].encode())
        assert fingerprint(url) != before


def test_memory_urls_given_twice_are_refused(memory: str) -> None:
    with pytest.raises(ConfigError, match="twice"):
        find_shards([memory, f"{memory}/train/0.tar"])


def test_local_and_remote_shards_in_one_list(memory: str, tree: Path) -> None:
    found = find_shards([f"{memory}/train/0.tar", f"{tree}/a/x.tar"])
    assert sorted(url.rpartition("/")[2] for url in found.values()) == ["0.tar", "x.tar"]
    assert len(set(found)) == 2


# --- local files ------------------------------------------------------------------------------------------------
