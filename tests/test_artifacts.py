import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from sanitize.artifacts import MANIFEST, Artifact, ArtifactBuilder, Part, Recipe, make, read_manifest, verify
from sanitize.errors import ArtifactError
from tests.side_by_side import side_by_side

RECIPE = Recipe(stage="count", config={"deep": {"q": 0.1}}, numerics={"seed": 0}, inputs={"data": "abc"})
PARTS = [f"shard-{i}.tar" for i in range(5)]


def write_part(name: str, part: Part) -> None:
    part.write(f"rows/{name}.txt", name.encode() * 3)
    part.counts["samples"] += len(name)


def finish(part: Part, builder: ArtifactBuilder) -> None:
    total = b"".join(builder.read(f"rows/{name}.txt") for name in PARTS)
    part.write("total.txt", total)


def make_counts(out: Path, recipe: Recipe = RECIPE, **changes: object) -> Artifact:
    arguments: dict = {"parts": PARTS, "write_part": write_part, "finish": finish} | changes
    return make(Artifact, out, recipe, **arguments)


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def refuse(*_: object) -> None:
    raise AssertionError("this was made already")


# --- what was altered is reported --------------------------------------------------------------------------------


def altered_by(file: Path, how: str) -> None:
    if how == "gone":
        file.unlink()
    elif how == "shorter":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "same size":
        file.write_bytes(b"x" * file.stat().st_size)
    else:
        file.write_bytes(file.read_bytes())


@pytest.mark.parametrize("how", ["gone", "shorter", "same size"])
def test_a_file_that_was_altered_since_it_was_written_is_named(tmp_path: Path, how: str) -> None:
    make_counts(tmp_path / "a")
    altered_by(tmp_path / "a/rows/shard-3.tar.txt", how)
    with pytest.raises(ArtifactError, match=r"shard-3\.tar\.txt (is gone|has changed) since it was written"):
        make_counts(tmp_path / "a", write_part=refuse, finish=refuse)


def test_a_file_that_was_copied_with_another_time_is_what_it_was(tmp_path: Path) -> None:
    first = make_counts(tmp_path / "a")
    altered_by(tmp_path / "a/rows/shard-3.tar.txt", "written again")
    assert make_counts(tmp_path / "a", write_part=refuse, finish=refuse) == first


# --- what is there is returned ----------------------------------------------------------------------------------


def test_a_finished_artifact_is_returned_and_not_made_again(tmp_path: Path) -> None:
    first = make_counts(tmp_path / "a")
    assert make_counts(tmp_path / "a", write_part=refuse, finish=refuse) == first
    assert first.digest == Artifact.load(tmp_path / "a").digest


def test_the_manifest_lists_every_file_and_adds_up_the_counts(tmp_path: Path) -> None:
    artifact = make_counts(tmp_path / "a")
    manifest = artifact.manifest()
    assert set(manifest.files) == {*(f"rows/{name}.txt" for name in PARTS), "total.txt"}
    assert manifest.counts == {"samples": sum(map(len, PARTS))}
    assert manifest.recipe == RECIPE
    assert artifact.file("total.txt").read_text() == "".join(name * 3 for name in PARTS)


@pytest.mark.parametrize(
    ("change", "field", "before", "now"),
    [
        ({"stage": "other"}, "stage", "count", "other"),
        ({"version": 2}, "version", "1", "2"),
        ({"config": {"deep": {"q": 0.25}}}, "config.deep.q", "0.1", "0.25"),
        ({"config": {"deep": {"q": 0.1}, "more": True}}, "config.more", "null", "true"),
        ({"numerics": {"seed": 7}}, "numerics.seed", "0", "7"),
        ({"inputs": {"data": "xyz"}}, "inputs.data", "abc", "xyz"),
    ],
)
def test_another_recipe_is_an_error_that_names_the_field_and_both_values(
    tmp_path: Path, change: dict, field: str, before: str, now: str
) -> None:
    make_counts(tmp_path / "a")
    with pytest.raises(ArtifactError) as error:
        make_counts(tmp_path / "a", RECIPE.model_copy(update=change))
    message = str(error.value)
    assert f"{field} was " in message
    assert before in message
    assert now in message
    assert str(tmp_path / "a") in message


@pytest.mark.parametrize("content", ["nothing", "a file inside", "a file instead"])
def test_a_folder_that_is_no_artifact_is_left_alone(tmp_path: Path, content: str) -> None:
    out = tmp_path / "a"
    if content == "a file instead":
        out.write_text("mine")
    else:
        out.mkdir()
    if content == "a file inside":
        (out / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not an artifact"):
        make_counts(out)
    assert content == "nothing" or (out if out.is_file() else out / "thesis.txt").read_text() == "mine"


def test_a_source_that_changed_is_an_error_and_one_that_moved_is_not(tmp_path: Path) -> None:
    source = {"x.tar": {"url": "/here/x.tar", "size": 10, "modified": 5}}
    make_counts(tmp_path / "a", sources=source)
    moved = {"x.tar": source["x.tar"] | {"url": "/there/x.tar"}}
    make_counts(tmp_path / "a", sources=moved, write_part=refuse)
    for name, value in (("size", 11), ("modified", 6)):
        with pytest.raises(ArtifactError, match=r"x\.tar has changed"):
            make_counts(tmp_path / "a", sources={"x.tar": source["x.tar"] | {name: value}})


def test_the_digest_depends_on_recipe_and_content_alone(tmp_path: Path) -> None:
    digest = make_counts(tmp_path / "a").digest
    source = {"x.tar": {"url": "/here/x.tar", "size": 10, "modified": 5}}
    assert make_counts(tmp_path / "deep/down/b", sources=source).digest == digest
    assert make_counts(tmp_path / "c", RECIPE.model_copy(update={"numerics": {"seed": 1}})).digest != digest
    assert make_counts(tmp_path / "d", finish=None).digest != digest


# --- resuming ---------------------------------------------------------------------------------------------------


def test_finished_parts_are_never_made_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def failing_at(stop: str | None) -> Callable[[str, Part], None]:
        def write(name: str, part: Part) -> None:
            calls.append(name)
            write_part(name, part)
            if name == stop:
                raise RuntimeError("power cut")

        return write

    for stop in (PARTS[2], PARTS[4]):
        with pytest.raises(RuntimeError, match="power cut"):
            make_counts(tmp_path / "a", write_part=failing_at(stop))
        assert not (tmp_path / "a").exists()
    resumed = make_counts(tmp_path / "a", write_part=failing_at(None))
    assert calls == [*PARTS[:3], *PARTS[2:], PARTS[4]]
    assert resumed.digest == make_counts(tmp_path / "b").digest
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


def test_an_exception_while_writing_a_file_leaves_neither_folder_nor_temporary_file(tmp_path: Path) -> None:
    def write(name: str, part: Part) -> None:
        with part.create("big.bin") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_counts(tmp_path / "a", write_part=write)
    assert not (tmp_path / "a").exists()
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".tmp-") or p.name == "big.bin"]


def test_a_file_of_a_part_that_was_never_finished_does_not_get_into_the_artifact(tmp_path: Path) -> None:
    def write(name: str, part: Part) -> None:
        part.write("left-over.txt", b"from a run that drew other random numbers")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        make_counts(tmp_path / "a", write_part=write)
    artifact = make_counts(tmp_path / "a")
    assert verify(tmp_path / "a") == []
    assert not artifact.file("left-over.txt").exists()


def test_what_a_run_with_another_recipe_left_is_thrown_away(tmp_path: Path) -> None:
    other = RECIPE.model_copy(update={"config": {"deep": {"q": 0.9}}})

    def wrong(name: str, part: Part) -> None:
        part.write(f"rows/{name}.txt", b"by the other recipe")

    make_counts(tmp_path / "a", other, write_part=wrong, only=PARTS[:3])
    assert make_counts(tmp_path / "a").digest == make_counts(tmp_path / "b").digest


def test_parts_made_from_a_source_that_changed_since_are_thrown_away(tmp_path: Path) -> None:
    """The run is killed, a shard is replaced, the run goes on: half of the index would be of the old shard."""
    before = {"x.tar": {"url": "x.tar", "size": 10, "modified": 5}}
    after = {"x.tar": {"url": "x.tar", "size": 10, "modified": 6}}

    def stale(name: str, part: Part) -> None:
        part.write(f"rows/{name}.txt", b"of the old shard")

    make_counts(tmp_path / "a", write_part=stale, only=PARTS[:3], sources=before)
    assert make_counts(tmp_path / "a", sources=after).digest == make_counts(tmp_path / "b").digest


@pytest.mark.parametrize("groups", [[PARTS], [PARTS[:2], PARTS[2:]], [[p] for p in PARTS[::-1]], [PARTS[1:2]], []])
def test_parts_made_in_groups_give_the_digest_of_one_go(tmp_path: Path, groups: list[list[str]]) -> None:
    for group in groups:
        handle = make_counts(tmp_path / "a", only=group)
        assert handle.digest == ""
        assert not (tmp_path / "a").exists()
    grouped = make_counts(tmp_path / "a")
    assert grouped.digest == make_counts(tmp_path / "b").digest
    assert grouped.manifest() == Artifact.load(tmp_path / "b").manifest()


def test_parts_made_by_many_workers_at_once(tmp_path: Path) -> None:
    """Workers that open a builder at the same moment keep what another has begun."""
    expected = make_counts(tmp_path / "expected").digest
    for attempt in range(10):
        out = tmp_path / f"{attempt}"
        if attempt % 2:  # something that all of them find stale
            make_counts(out, RECIPE.model_copy(update={"version": 9}), only=PARTS[:1])
        side_by_side(len(PARTS), lambda i, out=out: make_counts(out, only=[PARTS[i]]))
        assert make_counts(out, write_part=refuse).digest == expected


KILLED = """
    import os, pathlib, shutil, signal, sys

    from sanitize.artifacts import Artifact, Recipe, make

    where, out = sys.argv[1:]
    die = lambda *_args, **_kwargs: os.kill(os.getpid(), signal.SIGKILL)
    if where == "before the rename":
        pathlib.Path.rename = die
    if where == "after the rename":
        shutil.rmtree = die

    def write_part(name, part):
        with part.create(f"rows/{name}.txt") as file:
            file.write(name.encode())
            if where == "in a part" and name == "part-2":
                file.flush()
                die()
            file.write(name.encode() * 2)
        part.counts["samples"] += len(name)

    parts = [f"part-{i}" for i in range(4)]
    print(make(Artifact, out, Recipe(stage="count"), parts=parts, write_part=write_part).digest)
"""


@pytest.mark.slow
def test_killed_and_run_again_gives_the_digest_of_an_uninterrupted_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(KILLED))

    def run(where: str, out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), where, str(tmp_path / out)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())})

    whole = run("nowhere", "whole")
    assert whole.returncode == 0, whole.stderr
    for where in ("in a part", "before the rename", "after the rename"):
        assert run(where, where).returncode == -signal.SIGKILL
        again = run("nowhere", where)
        assert again.returncode == 0, again.stderr
        assert again.stdout == whole.stdout
        assert files_below(tmp_path / where) == files_below(tmp_path / "whole")
        assert verify(tmp_path / where) == []
    assert not list(tmp_path.glob(".*.partial"))


def test_a_killed_clean_up_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_counts(tmp_path / "a")
    assert (tmp_path / ".a.partial").exists()
    make_counts(tmp_path / "a", write_part=refuse)
    assert not (tmp_path / ".a.partial").exists()


def test_a_part_may_not_take_the_name_of_the_finishing_part(tmp_path: Path) -> None:
    """No name of a shard or a table makes its rows disappear."""
    artifact = make_counts(tmp_path / "a", parts=["_all"], finish=None)
    assert artifact.file("rows/_all.txt").read_text() == "_all" * 3
    assert set(artifact.manifest().files) == {"rows/_all.txt"}


# --- damage -----------------------------------------------------------------------------------------------------


def test_verify_finds_nothing_where_nothing_is_wrong(tmp_path: Path) -> None:
    make_counts(tmp_path / "a")
    assert verify(tmp_path / "a") == []


def test_verify_finds_changed_missing_and_extra_files(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make_counts(folder)
    same_size, longer, gone = (folder / "rows" / f"{name}.txt" for name in PARTS[:3])
    same_size.write_bytes(same_size.read_bytes()[:-1] + b"!")
    longer.write_bytes(longer.read_bytes() + b"!")
    gone.unlink()
    (folder / "rows" / ".hidden").write_text("extra")
    (folder / "extra").mkdir()
    (folder / "extra" / MANIFEST).write_text("{}")
    problems = "\n".join(verify(folder))
    assert len(verify(folder)) == 5
    assert f"{same_size}: content differs" in problems
    assert f"{longer}: content differs" in problems
    assert f"{gone}: missing" in problems
    assert f"{folder / 'rows' / '.hidden'}: not listed" in problems
    assert f"{folder / 'extra' / MANIFEST}: not listed" in problems


def test_a_handle_notices_that_its_manifest_was_changed(tmp_path: Path) -> None:
    artifact = make_counts(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest["counts"]["samples"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="not the artifact it was"):
        artifact.manifest()


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"recipe": 3}', b"\xff\xfe"])
def test_a_missing_or_damaged_manifest_is_an_artifact_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        read_manifest(tmp_path)
    with pytest.raises(ArtifactError):
        Artifact.load(tmp_path)


def test_recipe_refuses_unknown_fields() -> None:
    with pytest.raises(ValueError):
        Recipe(stage="x", seed=3)  # type: ignore[call-arg]
