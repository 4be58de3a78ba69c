"""What `sanitize inspect` and `sanitize clean` say of shards that are lost, and their exit codes."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import shlex
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from flows.cli import app
from sanitize.compute import Compute
from sanitize.data.index import index_shards
from sanitize.jobs.clean import CleanConfig
from sanitize.settings import make_config

Good = Callable[..., list[tuple[str, bytes]]]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--quiet"])


@pytest.fixture
def folder(tmp_path: Path, make_tar: Callable[..., str], good: Good) -> Path:
    """Twenty shards in which all is well."""
    for i in range(20):
        make_tar(tmp_path / "in" / f"{i:04d}.tar", good(10))
    return tmp_path / "in"


def test_shards_in_which_all_is_well_have_one_line(folder: Path) -> None:
    result = run("inspect", folder)
    assert result.exit_code == 0
    assert "20 shards" in result.output
    assert "200 samples, 0 unreadable; 0 shards damaged, 0 refused" in result.output
    assert ".tar" not in result.output
    assert list(json.loads(run("inspect", folder, "--json").stdout)["shards"]) == [f"{i:04d}.tar" for i in range(20)]


def test_formats_are_counted_by_content(tmp_path: Path, make_tar: Callable[..., str], good: Good) -> None:
    picture = dict(good(1))["good0000.png"]
    names = {"a.png": picture, "b.jpg": picture, "c.tif": b"II*\0", "d.gif": b"no image"}
    make_tar(tmp_path / "x.tar", [m for n, d in names.items() for m in ((n, d), (f"{n[0]}.cls", b"0"))])
    found = json.loads(run("inspect", tmp_path / "x.tar", "--json").stdout)
    assert found["formats"] == {"png": 2, "tiff": 1, "unknown": 1}
    assert found["shards"]["x.tar"]["formats"] == found["formats"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: 10 * 512 + 60])


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "truncated"),
        (lambda p: p.write_bytes(b""), "an empty file"),
        (lambda p: p.write_bytes(p.read_bytes() + b"garbage"), "behind the end"),
        (lambda p: p.write_bytes(gzip.compress(p.read_bytes()) + b"garbage"), "behind the end"),
        (lambda p: p.write_bytes(bz2.compress(p.read_bytes()) + b"garbage"), "behind the end"),
        (lambda p: p.with_suffix(".tar.lzma").write_bytes(p.read_bytes()), "lzma compressed"),
        (lambda p: p.with_name("l.tar").symlink_to(p), "same file"),
        (lambda p: p.with_name("l.tar").symlink_to("/etc/hostname"), "leads out of"),
        (lambda p: os.mkfifo(p.with_name("f.tar")), "not a regular file"),
    ],
)
def test_one_bad_shard_is_exit_code_1_and_the_only_one_named(
    folder: Path, damage: Callable[[Path], object], says: str
) -> None:
    damage(folder / "0007.tar")
    result = run("inspect", folder)
    assert result.exit_code == 1
    assert says in result.output
    assert "0008.tar" not in result.output
    summary = json.loads(run("inspect", folder, "--json").stdout)
    said = [s["damage"] for s in summary["shards"].values() if s["damage"]] + list(summary["refused"].values())
    assert [says in reason for reason in said] == [True]


def test_too_many_unreadable_samples_are_exit_code_1(folder: Path, make_tar: Callable[..., str], good: Good) -> None:
    make_tar(folder / "bad.tar", [*good(10), *((f"{i}.cls", b"1") for i in range(11))])
    result = run("inspect", folder)
    assert (result.exit_code, "bad.tar" in result.output) == (0, True)  # 11 of 221
    assert run("inspect", folder, "--max-bad-fraction", 0.049).exit_code == 1
    assert run("inspect", folder / "bad.tar").exit_code == 1
    assert run("inspect", folder, "--label", "txt").exit_code == 1  # nothing is usable


def next_of(folder: Path, *options: Any) -> tuple[int, list[str]]:
    """Exit code, and what `inspect` says to do next."""
    result = run("inspect", folder, *options, "--json")
    assert "Traceback" not in result.output
    return result.exit_code, json.loads(result.stdout)["next"]


def pack(folder: Path, make_tar: Callable[..., str], members: dict[str, Any], n: int = 12) -> Path:
    """A shard of `n` samples; a member is bytes or a function from the number of the sample to bytes."""
    make_tar(
        folder / "x.tar",
        [
            (f"{i:04d}.{suffix}", data(i) if callable(data) else data)
            for i in range(n)
            for suffix, data in members.items()
        ],
    )
    return folder


CASES = {
    "two pictures": (("left.png", "right.png"), {"cls": b"1"}, ["image.member=left.png"]),
    "compound label": (("input.png",), {"output.cls": lambda i: b"%d" % (i % 2)}, ["output.cls"]),
    "names": (("png",), {"cls": lambda i: (b"cat", b"dog")[i % 2]}, ["classes=names"]),
    "nested": (("png",), {"json": lambda i: json.dumps({"a": {"class_id": i % 2}}).encode()}, ["json:a.class_id"]),
    "nested names": (
        ("png",),
        {"json": lambda i: json.dumps({"class": "no"}).encode()},
        ["json:class", "classes=names"],
    ),
    "many classes": (("png",), {"cls": lambda i: b"%d" % (2000 + i)}, ["n_classes=2012"]),
    "captions": (("png",), {"txt": b"a photo"}, ["--label none"]),
}


GIVEN = {"no field": ("--label", "json"), "wrong member": ("--set", "image.member=png")}
CASES |= {
    "no field": (("png",), {"json": lambda i: json.dumps({"class": i % 2}).encode()}, ["--label json:class"]),
    "wrong member": (("left.png", "right.png"), {"cls": b"1"}, ["image.member=left.png"]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_next_command_works(
    name: str, tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes]
) -> None:
    pictures, others, words = CASES[name]
    given = GIVEN.get(name, ())
    folder = pack(tmp_path / "a folder", make_tar, dict.fromkeys(pictures, make_png) | others)
    code, (command, *_) = next_of(folder, *given)
    assert code == 1
    assert all(word in command for word in words)
    for _ in range(3):  # at most three steps lead to the command that cleans
        arguments = shlex.split(command)
        assert arguments[0] == "sanitize"
        if arguments[1] == "clean":
            break
        code, (command, *_) = next_of(Path(arguments[2]), *arguments[3:])
    assert code == 0
    assert arguments[1] == "clean"
    make_config(CleanConfig, {}, {"shards": [arguments[3]]}, arguments[5::2][: arguments.count("--set")])


Member = tuple[str, bytes]


def apart(members: list[Member]) -> list[Member]:
    return sorted(members, key=lambda member: member[0][-3:])


def renamed(members: list[Member], how: Callable[[str], str]) -> list[Member]:
    return [(how(name), data) for name, data in members]


def in_folders(name: str) -> str:
    return f"train/{'images' if name.endswith('png') else 'labels'}/a b/{name}"


def by_class(members: list[Member]) -> list[Member]:
    pictures = [one for one in members if one[0].endswith("png")]
    return [(f"data/{('cat', 'dog')[i % 2]}/{name}", data) for i, (name, data) in enumerate(pictures)]


def without_some(members: list[Member]) -> list[Member]:
    """Captions; a fifth of the pictures is missing."""
    some = [member for i, member in enumerate(members) if i % 10]
    return [(name.replace(".cls", ".txt"), data) for name, data in some]


UNPACKED: dict[str, tuple[Callable[[list[Member]], list[Member]], list[str], int]] = {
    "apart": (apart, [], 20),
    "folders": (lambda members: renamed(members, in_folders), [], 20),
    "dots": (lambda members: renamed(members, lambda name: f"v1.2/./2022.{name}"), [], 20),
    "classes": (by_class, [], 20),
    "pictures are missing": (without_some, ["--label", "none"], 16),
    "readme": (lambda members: [("README.md", b"?"), ("LICENSE", b"?"), *members], [], 20),
}


def follow(folder: Path, code: int, lines: list[str]) -> tuple[int, list[str]]:
    """Paste what `inspect` says to do next, up to the next `inspect`; its exit code and what it says then."""
    for line in lines:
        shell, _, command = line.rpartition(" && sanitize ")
        if line.startswith("mkdir "):
            subprocess.run(["bash", "-c", shell or line], check=True, cwd=folder)
        if command.startswith("import "):
            assert run(*shlex.split(command)).exit_code == 0
            return next_of(Path("shards"))
        if line.startswith("sanitize inspect "):
            words = shlex.split(line)[2:]
            return next_of(Path(words[0]), *words[1:])
    return code, lines


@pytest.mark.parametrize("name", UNPACKED)
def test_the_commands_for_another_layout_work(
    name: str, tmp_path: Path, make_tar: Callable[..., str], good: Good, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, options, n = UNPACKED[name]
    make_tar(tmp_path / "a folder" / "x y.tar", change(good(20)))
    code, lines = next_of(tmp_path / "a folder" / "x y.tar", *options)
    assert code == 1
    if name == "classes":  # the first line says that there are no labels
        lines = lines[1:]
    code, lines = follow(tmp_path, code, lines)
    assert code == 0, lines
    arguments = shlex.split(lines[0])
    assert arguments[:2] == ["sanitize", "clean"]
    config = make_config(CleanConfig, {}, {"shards": [arguments[3]]}, arguments[5::2][: arguments.count("--set")])
    assert index_shards(config.index, config.shards, "index", Compute(device="cpu")).n_samples == n


def test_joined_archives_and_archives_in_an_archive_are_taken_apart(
    tmp_path: Path, make_tar: Callable[..., str], good: Good, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = [Path(make_tar(tmp_path / f"{name}.tar", good(20, name))) for name in "ab"]
    (tmp_path / "joined").mkdir()
    whole = tmp_path / "joined" / "x.tar"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    code, lines = next_of(whole)
    assert code == 1
    whole.rename("x.tar")
    whole.parent.rmdir()
    code, lines = follow(tmp_path, code, [line.replace(str(whole), "x.tar") for line in lines])
    assert (code, lines) == (0, ["sanitize clean --shards joined.tar --out runs/first"])
    assert "40 samples" in run("inspect", "joined.tar").output
    make_tar(tmp_path / "outer.tar", [(part.name, part.read_bytes()) for part in parts])
    code, lines = follow(tmp_path, *next_of(Path("outer.tar")))
    assert (code, lines) == (0, ["sanitize clean --shards unpacked --out runs/first"])


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ((), {}),
        (
            ("--label", "json:a.b", "--max-bad-fraction", 0.25, "--set", "image.channels=1"),
            {"json": b'{"a": {"b": 1}}'},
        ),
    ],
)
def test_options_are_kept_in_the_next_command(
    options: tuple[Any, ...],
    more: dict[str, bytes],
    tmp_path: Path,
    make_tar: Callable[..., str],
    make_png: Callable[..., bytes],
) -> None:
    folder = pack(tmp_path / "in", make_tar, {"1.png": make_png, "2.png": make_png, "cls": b"1", **more})
    _, (command, *_) = next_of(folder, *options)
    given = [str(word) for word in options]
    assert all(word in shlex.split(command) for word in given)
    code, (command, *_) = next_of(folder, *shlex.split(command)[3:])
    assert code == 0
    assert ("index.max_bad_fraction=0.25" in command) == bool(options)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (b"[0.9, 0.1, 0]", "soft labels"),
        (b"[1, 0, 1]", "not one class"),
        (b"3.0", "write 3"),
        ("\ufeff3".encode(), "byte order mark"),
    ],
)
def test_labels_that_are_not_one_class_are_refused_with_the_remedy(
    label: bytes, says: str, tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes]
) -> None:
    result = run("inspect", pack(tmp_path / "in", make_tar, {"png": make_png, "cls": label}))
    assert result.exit_code == 1
    assert says in result.output
    assert "table:labels.csv#class" in result.output


def test_one_sentence_for_all_samples_and_three_examples(
    tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes]
) -> None:
    folder = pack(tmp_path / "in", make_tar, {"1.png": make_png, "2.png": make_png, "cls": b"0"}, n=40)
    result = run("inspect", folder)
    assert result.output.count("set index.image.member to") == 1
    assert "members: 1.png: 40, 2.png: 40, cls: 40" in result.output
    assert "0002 in x.tar at byte" in result.output
    assert "0003 in x.tar" not in result.output
    (kind,) = json.loads(run("inspect", folder, "--json").stdout)["reasons"]
    data = (folder / "x.tar").read_bytes()
    assert [example["key"] for example in kind["examples"]] == [f"{i:04d}" for i in range(40)]
    assert all(data[one["byte"] :].startswith(one["key"].encode()) for one in kind["examples"])


def test_folders_of_splits_are_offered_as_no_classes(
    tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes]
) -> None:
    for folder, is_class in (("training", False), ("val", False), ("cats", True)):
        shard = make_tar(tmp_path / f"{folder}.tar", [(f"{folder}/{i}.png", make_png(i)) for i in range(3)])
        result = run("inspect", shard)
        assert ("if the folders are the classes" in result.output) == is_class
        assert "if the class is in the name" in result.output
        assert "1 shard, " in result.output


def test_image_text_shards_are_cleaned_without_labels(
    tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes]
) -> None:
    members = [
        (f"{i:04d}.{suffix}", data)
        for i in range(60)
        for suffix, data in (("png", make_png(i, size=(16, 16))), ("txt", b"caption %d" % i))
        if i % 30 or suffix == "txt"  # two pictures are missing
    ]
    make_tar(tmp_path / "in" / "x.tar", members)
    config = tmp_path / "config.yaml"
    embedder = {"kind": "simclr", "architecture": QUICK["architecture"], "optim": {"epochs": 1, "batch_size": 16}}
    settings = {"index": {"label": None}, "embedder": embedder, "scorers": [{"kind": "rca"}]}
    config.write_text(yaml.safe_dump(settings | {"compute": {"device": "cpu"}, "shards": [str(tmp_path / "in")]}))
    result = run("clean", config, "--out", tmp_path / "run", "--direct", "--json")
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)["samples"]
    assert (counts["samples"], counts["unreadable"]) == (60, 2)
    shards = tmp_path / "run" / "50-shards"
    with tarfile.open(shards / "clean" / "x.tar") as clean, tarfile.open(shards / "quarantine" / "x.tar") as rest:
        kept, removed = clean.getnames(), rest.getnames()
    assert sorted(name for name in [*kept, *removed] if name.endswith(".txt")) == [f"{i:04d}.txt" for i in range(60)]
    assert {"0000.txt", "0030.txt", "0000.sanitize.json"} <= set(removed)
    croissant = json.loads((shards / "croissant.json").read_text())
    assert [records["name"] for records in croissant["recordSet"]] == ["images"]
    assert "no labels are read" in (tmp_path / "run" / "90-report" / "index.html").read_text()
    config.write_text(yaml.safe_dump({"index": {"label": None}, "shards": [str(tmp_path / "in")]}))
    refused = run("clean", config, "--out", tmp_path / "run2", "--direct")
    assert refused.exit_code == 2
    assert "embedder.kind=simclr" in " ".join(refused.output.split())


QUICK = {
    "architecture": {"kind": "convnet", "widths": [4]},
    "optim": {"epochs": 1, "batch_size": 32},
    "min_steps": 1,
    "max_steps": 1,
}


def clean(source: Path, *, index: dict[str, Any] | None = None) -> Result:
    config = source.parent / "config.yaml"
    settings = {"embedder": QUICK, "compute": {"device": "cpu"}, "index": index or {}, "shards": [str(source)]}
    config.write_text(yaml.safe_dump(settings))
    return run("clean", config, "--out", source.parent / "run", "--direct", "--json")


@pytest.mark.hostile
def test_other_compressions_under_any_name_are_cleaned_like_the_others(folder: Path) -> None:
    (folder / "0003.tar").write_bytes(gzip.compress((folder / "0003.tar").read_bytes(), mtime=0))
    (folder / "0004.tar").rename(folder / "0004.TAR")
    (folder / "0005.tar.xz").write_bytes(lzma.compress((folder / "0005.tar").read_bytes()))
    (folder / "0005.tar").unlink()
    (folder / "0006.tar").write_bytes(bz2.compress((folder / "0006.tar").read_bytes()))
    result = clean(folder)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["samples"]["samples"], summary["damaged_shards"]) == (200, {})
    assert len(list(Path(summary["clean"]).iterdir())) == 20


@pytest.mark.hostile
@pytest.mark.parametrize("name", ["0007.tar", "more.tar.lzma"])
def test_a_shard_of_which_nothing_is_read_fails_the_run_and_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(lzma.compress((folder / "0007.tar").read_bytes(), lzma.FORMAT_ALONE))
    n_read = 200 if name == "more.tar.lzma" else 190
    result = clean(folder)
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert f"{name} (lzma compressed: not read" in result.output
    result = clean(folder, index={"max_bad_shards": 1})
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["samples"]["samples"], summary["bad_shards"]) == (n_read, [name])
    assert "lzma compressed" in summary["damaged_shards"][name]
    written = [path.name for path in Path(summary["clean"]).iterdir()]
    assert ("more.tar.lzma" in written, len(written)) == (False, 20)
    plain = run("clean", folder.parent / "config.yaml", "--out", folder.parent / "run", "--direct")
    assert "1 shard is damaged, and what could not be read" in plain.output
    assert f"nothing read of shard {name}: lzma compressed" in plain.output


def test_hygiene_is_printed_and_in_the_json(
    tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes]
) -> None:
    members = [(f"{i:04d}.{s}", d) for i in range(20) for s, d in (("png", make_png(i % 19)), ("cls", b"0"))]
    make_tar(tmp_path / "x.tar", members)  # the last picture is the first
    shown = run("inspect", tmp_path / "x.tar", "--hygiene")
    assert shown.exit_code == 0, shown.output
    assert "exact duplicate" in shown.output
    assert "2 copies of one file, class 0: 0000, 0019\n" in shown.output  # both are named: no dots
    assert shown.output.splitlines()[-1].startswith("next: sanitize clean")
    found = json.loads(run("inspect", tmp_path / "x.tar", "--hygiene", "--json").stdout)["hygiene"]
    assert found["counts"]["exact_duplicate"] == 1
    assert "exact duplicate" not in run("inspect", tmp_path / "x.tar").output
    shown = run("inspect", tmp_path / "x.tar", "--hygiene").output
    assert shown.index("exact duplicate") < shown.index("next:")  # what to do comes last


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (("--set", "verify=json:other", "--hygiene"), "2 of 2 samples have no hash that can be read"),
        (("--set", "verify=json:sha", "--hygiene"), "1 of 2 samples has no hash that can be read"),
        (("--set", "verify=json:sha"), "index.verify is looked at with --hygiene only"),
        (("--set", "check=headers", "--hygiene"), "hygiene looked at nothing"),
        (("--set", "check=digest", "--hygiene"), "hygiene looked for equal files only"),
        (("--hygiene",), None),
    ],
)
def test_what_was_not_compared_is_noted(
    options: tuple[str, ...],
    note: str | None,
    tmp_path: Path,
    make_tar: Callable[..., str],
    make_png: Callable[..., bytes],
) -> None:
    """ "Nothing found" must not be said of what nobody looked at."""
    records = [{"sha": hashlib.sha256(make_png(0)).hexdigest()}, {"sha": "sha256:" + "0" * 64}]
    members = [
        (f"{i}.{suffix}", data)
        for i, record in enumerate(records)
        for suffix, data in (("png", make_png(i)), ("cls", b"0"), ("json", json.dumps(record).encode()))
    ]
    make_tar(tmp_path / "x.tar", members)
    found = json.loads(run("inspect", tmp_path / "x.tar", *options, "--json").stdout)
    assert len(found["notes"]) == (note is not None)
    assert note is None or found["notes"][0].startswith(note)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--label", ".cls"), "without its first dot"),
        (("--label", "JSON:class"), "json:FIELD, table:FILE#COLUMN, or none"),
        (("--set", "image.member=.left.png"), "without its first dot: left.png"),
        (("--set", "verify=sha256"), "json:FIELD, or table:FILE#COLUMN"),
        (("--set", "classes=[no, cat]"), "False is no text; in YAML, put it in quotes"),
    ],
)
def test_wrong_places_are_refused_in_words(option: tuple[str, str], message: str, folder: Path) -> None:
    result = run("inspect", folder, *option)
    assert result.exit_code == 2
    assert message in result.output
