"""What `sanitize inspect` and `sanitize clean` say of shards that are lost, and their exit codes."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from flows.cli import app

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
    assert run("inspect", folder, "--label", "none").exit_code == 1  # nothing is usable


QUICK = {"architecture": {"kind": "convnet", "widths": [4]}, "optim": {"epochs": 1, "batch_size": 32}}


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
    assert "1 shards are damaged, and what could not be read" in plain.output
    assert f"nothing read of shard {name}: lzma compressed" in plain.output
