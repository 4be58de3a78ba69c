import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sanitize.data.labels import BadLabel, read_label
from sanitize.data.samples import (
    Sample,
    SampleLimits,
    ShardReader,
    find_image,
    printable,
    split_name,
)

MakeTar = Callable[..., str]


def read(url: str, **limits: int) -> tuple[list[Sample], ShardReader]:
    reader = ShardReader(url, SampleLimits(**limits))
    return list(reader), reader


def summary(samples: list[Sample]) -> list[tuple[str, list[str], str | None]]:
    return [(s.key, [name for name, _ in s.members], s.problem) for s in samples]


def special(name: str, type: bytes, link: str = "elsewhere") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, link
    return info


# --- grouping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_that_share_a_key_are_one_sample(tmp_path: Path, make_tar: MakeTar, mode: str, format: int) -> None:
    long = "folder/" * 20 + "long"
    members = [("a.jpg", b"1"), ("a.cls", b"2"), ("b/a.jpg", b"3"), ("b/a.seg.png", b""), (f"{long}.x", b"5" * 2000)]
    path = make_tar(tmp_path / ("x.tar.gz" if mode == "w:gz" else "x.tar"), members, mode, format)
    samples, reader = read(path)
    assert summary(samples) == [
        ("a", ["a.jpg", "a.cls"], None),
        ("b/a", ["b/a.jpg", "b/a.seg.png"], None),
        (long, [f"{long}.x"], None),
    ]
    assert [data for s in samples for _, data in s.members] == [data for _, data in members]
    assert [s.position for s in samples] == [0, 1, 2]
    assert reader.damage is None
    assert reader.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert reader.size == Path(path).stat().st_size


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("a.jpg", "a", "jpg"),
        ("a.SEG.Png", "a", "seg.png"),
        ("d.x/a.jpg", "d.x/a", "jpg"),
        ("d.x/a", "d.x/a", ""),
        (".hidden", "", "hidden"),
        ("d/.cls", "d/", "cls"),
        ("plain", "plain", ""),
        ("a.", "a", ""),
    ],
)
def test_key_and_suffix_are_split_at_the_first_dot_of_the_base_name(name: str, key: str, suffix: str) -> None:
    assert split_name(name) == (key, suffix)


def test_keys_are_those_webdataset_forms(tmp_path: Path, make_tar: MakeTar) -> None:
    import webdataset as wds

    names = ["a.jpg", "a.cls", "b.x/a.y.png", "b.x/a.cls", "b.x/c.jpg", "d/e/f.tar.gz"]
    path = make_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names])
    theirs = list(wds.WebDataset([path], shardshuffle=False, empty_check=False))
    ours = read(path)[0]
    assert [s.key for s in ours] == [s["__key__"] for s in theirs]
    for sample, other in zip(ours, theirs, strict=True):
        assert {split_name(name)[1]: data for name, data in sample.members} == {
            name: data for name, data in other.items() if not name.startswith("__")
        }


def test_directories_are_stepped_over_and_split_no_sample(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [special("d/", tarfile.DIRTYPE), ("a.jpg", b"1"), special("e", tarfile.DIRTYPE), ("a.cls", b"2")]
    samples, _ = read(make_tar(tmp_path / "x.tar", members))
    assert summary(samples) == [("a", ["a.jpg", "a.cls"], None)]


@pytest.mark.hostile
def test_a_key_that_comes_back_later_is_refused_and_the_first_stands(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3"), ("a.jpg", b"4"), ("c.jpg", b"5")]
    samples, _ = read(make_tar(tmp_path / "x.tar", members))
    assert [(s.key, s.problem is None) for s in samples] == [("a", True), ("b", True), ("a", False), ("c", True)]
    assert samples[2].problem == "key 'a' occurs a second time in the shard"


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (special("b.lnk", tarfile.SYMTYPE, "/etc/passwd"), "no regular file: symbolic link"),
        (special("b.lnk", tarfile.LNKTYPE, "a.jpg"), "no regular file: hard link"),
        (special("b.dev", tarfile.CHRTYPE), "no regular file: character device"),
        (special("b.fifo", tarfile.FIFOTYPE), "no regular file: fifo"),
        (("b.jpg", b"other"), "occurs twice"),
    ],
)
def test_one_odd_member_costs_its_sample_and_no_other(
    tmp_path: Path, make_tar: MakeTar, member: tuple[str, bytes] | tarfile.TarInfo, reason: str
) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), member, ("c.jpg", b"3")]
    samples, reader = read(make_tar(tmp_path / "x.tar", members))
    assert [s.key for s in samples] == ["a", "b", "c"]
    assert [s.problem is None for s in samples] == [True, False, True]
    assert reason in str(samples[1].problem)
    assert samples[1].members[0] == ("b.jpg", b"2")
    assert reader.damage is None


@pytest.mark.hostile
@pytest.mark.parametrize(
    "name",
    ["../b.jpg", "/etc/b.jpg", "d/../../b.jpg", "C:b.jpg", "..\\b.jpg", "\\b.jpg", "b\n.jpg", "b\x1b[31m.jpg"],
)
def test_names_that_lead_out_of_the_folder_or_into_the_terminal_are_refused(
    tmp_path: Path, make_tar: MakeTar, name: str
) -> None:
    samples, _ = read(make_tar(tmp_path / "x.tar", [("a.jpg", b"1"), (name, b"2"), ("z.jpg", b"3")]))
    assert [s.problem is None for s in samples] == [True, False, True]
    assert "unsafe member name" in str(samples[1].problem)
    assert str(samples[1].problem).isprintable()


@pytest.mark.hostile
def test_names_of_arbitrary_bytes_survive(tmp_path: Path, make_tar: MakeTar) -> None:
    raw = b"caf\xe9-\xff".decode("utf-8", "surrogateescape")
    samples, _ = read(make_tar(tmp_path / "x.tar", [(f"{raw}.jpg", b"1"), (f"{raw}.cls", b"2")]))
    assert summary(samples) == [(raw, [f"{raw}.jpg", f"{raw}.cls"], None)]
    assert printable(raw) == "caf\\xe9-\\xff"


@pytest.mark.hostile
def test_a_sample_that_is_too_large_is_refused_and_not_held(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [("a.jpg", b"1" * 600), ("a.txt", b"2" * 600), ("b.jpg", b"3" * 1000), ("c.jpg", b"4" * 1001)]
    samples, reader = read(make_tar(tmp_path / "x.tar", members), max_sample_bytes=1000)
    assert [s.problem is None for s in samples] == [False, True, False]
    assert "larger than max_sample_bytes 1000" in str(samples[0].problem)
    assert sum(len(data) for _, data in samples[0].members) <= 1000
    assert reader.damage is None


@pytest.mark.hostile
def test_a_sample_of_too_many_members_is_refused_and_not_held(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [(f"a.{i}", b"") for i in range(5000)] + [("b.jpg", b"1")]
    samples, _ = read(make_tar(tmp_path / "x.tar", members), max_members=10)
    assert [s.problem for s in samples] == ["sample has more than max_members 10", None]
    assert len(samples[0].members) <= 10


# --- damaged archives -------------------------------------------------------------------------------------------


def cut(path: str, n: int) -> str:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:n] if n >= 0 else data[: len(data) + n])
    return path


@pytest.fixture
def three(tmp_path: Path, make_tar: MakeTar) -> str:
    """a (two members), b (two), c (one), each member one header block and one payload block."""
    members = [("a.jpg", b"1" * 512), ("a.cls", b"2"), ("b.jpg", b"3" * 512), ("b.cls", b"4"), ("c.jpg", b"5")]
    return make_tar(tmp_path / "three.tar", members)


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("n_bytes", "whole", "broken"),
    [
        (0, [], []),
        (100, [], []),  # in the very first header
        (512 + 100, [], []),  # in the first payload
        (2 * 512 + 100, [], ["a"]),  # in the header of a.cls
        (4 * 512 + 100, [], ["a"]),  # in the header of b.jpg: whether more of a was to come is not known
        (6 * 512 + 100, ["a"], ["b"]),  # in the header of b.cls
        (7 * 512 + 100, ["a", "b"], []),  # in the padding behind b.cls: nothing is lost
    ],
)
def test_a_shard_that_is_cut_gives_the_samples_before_the_cut(
    three: str, n_bytes: int, whole: list[str], broken: list[str]
) -> None:
    samples, reader = read(cut(three, n_bytes))
    assert [s.key for s in samples if s.problem is None] == whole
    assert [s.key for s in samples if s.problem is not None] == broken
    assert reader.damage
    assert all("damaged" in str(s.problem) for s in samples if s.problem)


@pytest.mark.hostile
def test_a_broken_header_ends_the_shard_there(three: str) -> None:
    data = bytearray(Path(three).read_bytes())
    data[6 * 512 + 3] ^= 1  # a letter of the name b.cls: only the checksum can tell
    Path(three).write_bytes(data)
    samples, reader = read(three)
    assert [(s.key, s.problem is None) for s in samples] == [("a", True), ("b", False)]
    assert "checksum" in str(reader.damage)
    assert str(6 * 512) in str(reader.damage)


@pytest.mark.hostile
def test_a_missing_end_marker_is_said_and_costs_nothing(three: str) -> None:
    samples, reader = read(cut(three, 10 * 512))
    assert [s.problem for s in samples] == [None, None, None]
    assert "end-of-archive" in str(reader.damage)


@pytest.mark.hostile
def test_data_hidden_behind_the_end_is_said(three: str) -> None:
    Path(three).write_bytes(Path(three).read_bytes() * 2)
    samples, reader = read(three)
    assert len(samples) == 3
    assert "behind the end" in str(reader.damage)


@pytest.mark.hostile
@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip at all", "empty"])
def test_a_damaged_gzip_stream_gives_what_came_before(tmp_path: Path, make_tar: MakeTar, damage: str) -> None:
    import random

    noise = random.Random(0)
    members = [(f"{i:03d}.bin", noise.randbytes(3000)) for i in range(100)]
    path = Path(make_tar(tmp_path / "x.tar.gz", members, "w:gz"))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    else:
        data = data[:0] if damage == "empty" else bytearray(b"not gzip, not tar, just text " * 40)
    path.write_bytes(data)
    samples, reader = read(str(path))
    assert reader.damage
    if damage in ("cut", "flipped"):
        # A flipped byte may change one payload before anything can tell: the checksum stands at the very end.
        assert [s.members[0] for s in samples[:40] if s.problem is None] == members[:40]
    else:
        assert samples == []
    assert reader.sha256 == hashlib.sha256(data).hexdigest()


def test_a_gzip_stream_of_several_members_is_read_to_the_end(tmp_path: Path, make_tar: MakeTar) -> None:
    plain = Path(make_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 5000), ("b.jpg", b"2")])).read_bytes()
    path = tmp_path / "x.tgz"
    path.write_bytes(gzip.compress(plain[:3000]) + gzip.compress(plain[3000:]))
    samples, reader = read(str(path))
    assert [s.key for s in samples] == ["a", "b"]
    assert reader.damage is None
    assert reader.size == path.stat().st_size


# --- labels and images ------------------------------------------------------------------------------------------


def sample(**members: bytes) -> Sample:
    return Sample(0, "k", [(f"k.{name}", data) for name, data in members.items()], None)


@pytest.mark.parametrize("text", [b"3", b" 3\n", b"+3", b"003", b"3\r\n", b"\t3"])
def test_labels_are_ascii_integers_with_space_around_them(text: bytes) -> None:
    assert read_label(sample(cls=text), "cls", 10) == 3
    assert read_label(sample(CLS=text), "cls", 10) == 3


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not an integer"),
        (b"cat", "not an integer"),
        (b"3.0", "not an integer"),
        (b"3 4", "not an integer"),
        (b"0x3", "not an integer"),
        (b"1_0", "not an integer"),
        (b"\xd9\xa3", "not an integer"),  # an Arabic three: int() would read it
        (b"\xff\xfe3\x00", "not an integer"),
        (b"nan", "not an integer"),
        (b"1" + b"0" * 400, "not an integer"),
        (b"9" * 10_000_000, "not an integer"),
        (b"-1", "not in 0..9"),
        (b"10", "not in 0..9"),
        (b"999999999999999999", "not in 0..9"),
    ],
)
def test_other_labels_are_refused_with_a_reason_fit_for_a_terminal(text: bytes, reason: str) -> None:
    with pytest.raises(BadLabel) as error:
        read_label(sample(cls=text), "cls", 10)
    assert reason in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


@pytest.mark.hostile
@pytest.mark.parametrize("names", [("cls", "CLS"), ("Cls", "cls")])
def test_two_labels_are_as_bad_as_none(names: tuple[str, str]) -> None:
    """Otherwise the attacker could choose which of the two a trainer reads."""
    with pytest.raises(BadLabel, match=r"2 \.cls members"):
        read_label(sample(**{name: b"%d" % i for i, name in enumerate(names)}), "cls", 10)
    with pytest.raises(BadLabel, match=r"no \.cls member"):
        read_label(sample(txt=b"1"), "cls", 10)


@pytest.mark.parametrize("value", [3, "3", " 3 ", "+3"])
def test_labels_in_json(value: object) -> None:
    assert read_label(sample(json=json.dumps({"y": value, "z": 1}).encode()), "json:y", 10) == 3


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xff\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"y": ' + b"9" * 5000 + b"}", "JSON"),
        (b"[3]", "no field 'y'"),
        (b"3", "no field 'y'"),
        (b'{"x": 3}', "no field 'y'"),
        (b'{"y": 3.0}', "not an integer"),
        (b'{"y": true}', "not an integer"),
        (b'{"y": null}', "not an integer"),
        (b'{"y": NaN}', "not an integer"),
        (b'{"y": [3]}', "not an integer"),
        (b'{"y": "\\ud800"}', "not an integer"),  # a lone surrogate: valid JSON, but no text
        (b'{"y": "\\u0663"}', "not an integer"),
        (b'{"y": 1' + b"0" * 400 + b"}", "not an integer"),
        (b'{"y": -1}', "not in 0..9"),
        (b'{"y": 10}', "not in 0..9"),
    ],
)
def test_other_json_labels_are_refused(text: bytes, reason: str) -> None:
    with pytest.raises(BadLabel) as error:
        read_label(sample(json=text), "json:y", 10)
    assert reason in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.hostile
@pytest.mark.parametrize("depth", [100, 300, 600, 900, 950, 980, 990, 1000, 1100])
def test_json_nested_as_deep_as_the_parser_goes_is_refused(depth: int) -> None:
    text = b'{"y": ' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(BadLabel):
        read_label(sample(json=text), "json:y", 10)


def test_the_image_is_the_one_member_with_an_image_suffix() -> None:
    for suffix in (
        "jpg",
        "JPEG",
        "jfif",
        "jpe",
        "png",
        "webp",
        "ppm",
        "pgm",
        "PBM",
        "pnm",
        "GIF",
        "bmp",
        "tif",
        "tiff",
        "avif",
    ):
        assert find_image(sample(txt=b"0", **{suffix: b"1"}))[1] == b"1"
    with pytest.raises(LookupError, match="no image member"):
        find_image(sample(txt=b"0", svg=b"1"))
    with pytest.raises(LookupError, match="2 image members"):
        find_image(sample(jpg=b"1", png=b"2"))


@pytest.mark.parametrize(
    ("suffixes", "member", "wanted"),
    [
        (("left.jpg", "right.jpg"), "left.jpg", "left.jpg"),
        (("LEFT.JPG", "right.jpg"), "left.jpg", "LEFT.JPG"),
        (("left.png", "right.jpg"), "left.jpg", "left.png"),  # the same member in another format
        (("jpg", "png"), "png", "png"),
        (("2.jpg", "1.jpg"), "first", "2.jpg"),  # in the order of the shard
        (("txt", "input.jpg"), None, "input.jpg"),
        (("seg.png", "jpg"), None, "jpg"),
        (("left.jpg", "right.jpg"), None, "2 image members, 'left.jpg, right.jpg': set index.image.member"),
        (("left.jpg", "right.jpg"), "up.jpg", "no image members for index.image.member=up.jpg"),
        (("left.jpg", "left.png"), "left.webp", "2 image members for"),
        (("mp4", "txt"), None, "no image member beside 'mp4, txt'"),
    ],
)
def test_the_image_of_a_sample_with_several_members(suffixes: tuple[str, ...], member: str | None, wanted: str) -> None:
    if wanted in suffixes:
        assert find_image(sample(**dict.fromkeys(suffixes, b"")), member)[0] == f"k.{wanted}"
    else:
        with pytest.raises(LookupError) as error:
            find_image(sample(**dict.fromkeys(suffixes, b"")), member)
        assert wanted in str(error.value)


def test_nothing_is_unpickled(tmp_path: Path, make_tar: MakeTar) -> None:
    """A pickle is copied as bytes."""
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    data = pickle.dumps(Bomb())
    samples, _ = read(make_tar(tmp_path / "x.tar", [("a.pickle", data), ("a.pth", data)]))
    assert samples[0].members == [("a.pickle", data), ("a.pth", data)]
    assert not (tmp_path / "executed").exists()
    pickle.load(io.BytesIO(data))
    assert (tmp_path / "executed").exists()
