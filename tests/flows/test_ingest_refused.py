"""No file stops the others: hostile names and shards are refused, once and by name, and every batch has an end."""

import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flows.cli import app
from flows.start import start
from sanitize import ledger as ledger_module
from sanitize.errors import ArtifactError, ConfigError, StorageError
from sanitize.jobs import JOBS, landed, unfit
from sanitize.jobs.ingest import BatchConfig, claim
from sanitize.jobs.landed import list_shards
from sanitize.jobs.run import Run
from sanitize.jobs.store import decide, list_batches, list_refused
from sanitize.ledger import Ledger, State
from sanitize.storage import exclusive, sha256_file
from tests.flows.stores import CPU, config_of, feed_of, land

Outcome = dict[str, Any]


class Killed(BaseException):
    """The process dies here."""


class UpToTheIndex(Run):
    """The index is made by the real stage; the next stage meets a fault of ours, so no network has to run."""

    def sharded(self, folder: str, function: Any, shards: Any, *inputs: Any) -> Any:
        if folder == "00-index":
            return super().sharded(folder, function, shards, *inputs)
        raise RuntimeError("a fault of ours")


def quick(store: Path, incoming: Path, kind: type[Run] = UpToTheIndex, **more: Any) -> Outcome:
    return JOBS["ingest"].function(config_of(incoming, **more), kind(store, CPU))


def tar_of(label: bytes, n: int, png: Callable[..., bytes], seed: int) -> bytes:
    """`n` samples with this label; another seed makes other bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(n):
            for suffix, data in (("png", png(100 * seed + i, (8, 8), "L")), ("cls", label)):
                info = tarfile.TarInfo(f"s{seed}-{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def with_label(shard: str, label: bytes) -> bytes:
    """A copy of a shard in which every sample has this label."""
    file = io.BytesIO()
    with tarfile.open(shard) as old, tarfile.open(fileobj=file, mode="w") as tar:
        for member in old:
            data = old.extractfile(member).read()  # type: ignore[union-attr]
            data = label if member.name.endswith(".cls") else data
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


# --- names and shards, end to end -------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_hostile_files_are_refused_once_and_by_name_and_the_rest_is_released(
    store: Path, incoming: Path, digits: Any
) -> None:
    land(digits.shards()[8:10], incoming)
    shutil.copy2(digits.shards()[10], incoming / f"{'n' * 215}.tar")  # files of ours named after it are shortened
    unread = ["line\nbreak.tar", "a::b.tar", f"{'n' * 229}.tar", "fifo.tar", "nowhere.tar", "folder.tar", "x.tar.lz4"]
    for name in (*unread[:3], unread[-1]):
        shutil.copy2(digits.shards()[11], incoming / name)
    os.mkfifo(incoming / "fifo.tar")
    (incoming / "nowhere.tar").symlink_to("/nowhere/at/all.tar")
    (incoming / "folder.tar").mkdir()
    (incoming / "labels.tar").write_bytes(with_label(digits.shards()[12], b"99"))
    (incoming / "empty.tar").write_bytes(b"")
    (incoming / "noise.tar").write_bytes(bytes(range(256)) * 40)
    bad = ["empty.tar", "labels.tar", "noise.tar"]
    command = ["ingest", "--shards", str(incoming), "--store", str(store), "--direct", "--device", "cpu", "-q"]
    runner = CliRunner()
    found = runner.invoke(app, [*command, "--json"])
    assert found.exit_code == 3, found.output
    result = json.loads(found.stdout)
    assert [batch["status"] for batch in result["batches"]] == ["split", "accepted"]
    assert result["batches"][1]["shards"] == 3
    refused = {shard["shard"].rpartition("/")[2]: shard for shard in result["refused"]}
    assert set(refused) == {*unread, *bad}
    assert "100 x label 99 is not in 0..9" in refused["labels.tar"]["reasons"][0]
    assert all(bool(refused[name]["sha256"]) == (name in bad) for name in refused)
    assert len([line for line in feed_of(store) if line["batch"]]) == 3

    entries = Ledger(str(store)).read().n_entries
    shutil.copy2(incoming / "labels.tar", incoming / "the-same-bytes.tar")
    again = runner.invoke(app, [*command, "--json"])
    assert again.exit_code == 0, again.output
    result = json.loads(again.stdout)
    assert (result["batches"], result["refused"], result["new"], result["duplicates"]) == ([], [], 0, 1)
    assert Ledger(str(store)).read().n_entries == entries + 1  # the copy was noted

    shown = runner.invoke(app, ["batches", "--store", str(store)]).output
    assert "labels.tar" in shown
    assert "line break.tar" in shown  # on one line
    rows = json.loads(runner.invoke(app, ["batches", "--store", str(store), "--json", "--status", "refused"]).stdout)
    assert {row["shard"].rpartition("/")[2] for row in rows} == set(refused)


def test_a_refused_shard_is_offered_again_after_retry_and_a_changed_one_of_itself(
    store: Path, incoming: Path, digits: Any
) -> None:
    (incoming / "bad.tar").write_bytes(with_label(digits.shards()[12], b"99"))
    (refused,) = quick(store, incoming)["refused"]
    assert [row["shard"] for row in list_refused(str(store))] == [str(incoming / "bad.tar")]
    with pytest.raises(ConfigError, match=r"no refused shard is called so; `sanitize batches` lists all"):
        decide(str(store), "other.tar", "retried")
    decided = decide(str(store), "bad.tar", "retried", "Ada", "the limits were raised")
    assert decided["sha256"] == [refused["sha256"]]
    assert list_refused(str(store)) == []
    (again,) = quick(store, incoming)["refused"]
    assert again["sha256"] == refused["sha256"]
    assert [batch["status"] for batch in list_batches(str(store))] == ["split", "split"]
    shutil.copy2(digits.shards()[13], incoming / "bad.tar")
    assert quick(store, incoming)["new"] == 1
    last = list_batches(str(store))[1]["batch"]
    assert decide(str(store), last, "retried")["shards"] == [str(incoming / "bad.tar")]  # all that it refused
    again = decide(str(store), last, "retried")
    assert (again["already"], again["shards"]) == (True, [str(incoming / "bad.tar")])


def test_the_limit_of_unreadable_samples_is_of_each_shard_and_can_be_raised(
    store: Path, incoming: Path, make_png: Callable[..., bytes]
) -> None:
    good, bad = tar_of(b"1", 9, make_png, 1), tar_of(b"77", 1, make_png, 2)
    (incoming / "mixed.tar").write_bytes(good[: 9 * 2048] + bad)  # the ninth of headers and payloads, no end marker
    (incoming / "good.tar").write_bytes(tar_of(b"3", 200, make_png, 3))
    result = quick(store, incoming)
    assert ["1 of 10 samples is unreadable" in r["reasons"][0] for r in result["refused"]] == [True]
    assert [batch["status"] for batch in result["batches"]] == ["split", "failed"]
    decide(str(store), "mixed.tar", "retried")
    result = quick(store, incoming, max_bad_fraction=0.2)
    assert result["refused"] == []
    assert result["batches"][0]["shards"] == 1


def cut(data: bytes) -> bytes:
    """Cut off in the payload of a sample."""
    return data[: len(data) * 6 // 10 // 2048 * 2048 + 600]


def holed(data: bytes) -> bytes:
    """Noise where a header should be."""
    at = len(data) * 3 // 10 // 2048 * 2048
    return data[:at] + bytes(range(256)) * 2 + data[at + 512 :]


DAMAGED: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "cut": ("lost.tar", cut, "lost an unknown number of samples behind the .*max_bad_shards=0"),
    "cut gzip": ("lost.tar.gz", lambda data: gzip.compress(data)[:6000], "lost an unknown number .*stream is cut"),
    "hole": ("lost.tar", holed, "samples are unreadable, more than max_bad_fraction=0.05: .* x behind the damage"),
    "hole in gzip": ("lost.tar.gz", lambda data: gzip.compress(holed(data)), "lost an unknown number of samples"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_shard_that_lost_a_part_is_refused_and_the_rest_of_its_batch_goes_on(
    store: Path, incoming: Path, digits: Any, damage: str
) -> None:
    name, damaged, why = DAMAGED[damage]
    data = Path(digits.shards()[12]).read_bytes()
    (incoming / name).write_bytes(damaged(data))
    for i in range(8):  # so that the batch as a whole is within the limits
        shutil.copy2(digits.shards()[8 + i if i != 4 else 17], incoming / f"whole-{i}.tar")
    result = quick(store, incoming)
    ((where, reason),) = [(shard["shard"], shard["reasons"][0]) for shard in result["refused"]]
    assert Path(where).name == name
    assert re.search(why, reason)
    assert [(batch["status"], batch["shards"]) for batch in result["batches"]] == [("split", 9), ("failed", 8)]


def test_a_person_can_let_a_cut_shard_in_and_its_batch_names_the_loss(store: Path, incoming: Path, digits: Any) -> None:
    (incoming / "cut.tar").write_bytes(cut(Path(digits.shards()[12]).read_bytes()))
    shutil.copy2(digits.shards()[8], incoming / "whole.tar")
    (batch,) = start(config_of(incoming, max_bad_shards=1), str(store), direct=True)["batches"]
    assert batch["status"] in ("accepted", "held")
    assert [reason for reason in batch["reasons"] if reason.startswith(f"{incoming}/cut.tar is damaged")]
    assert not [reason for reason in batch["reasons"] if "whole.tar" in reason]


def test_a_shard_that_changes_or_goes_after_it_was_claimed_is_refused_and_offered_as_it_is_now(
    store: Path, incoming: Path, make_png: Callable[..., bytes]
) -> None:
    for seed, name in enumerate(("changes.tar", "goes.tar", "stays.tar")):
        (incoming / name).write_bytes(tar_of(b"1", 3, make_png, seed))
    ledger = Ledger(str(store))
    claim(config_of(incoming), ledger.read().new(list_shards([str(incoming)], ledger.read()).offered), ledger)
    kept = (incoming / "goes.tar").read_bytes()
    (incoming / "goes.tar").unlink()
    changes = incoming / "changes.tar"
    mark = changes.stat()
    changes.write_bytes(tar_of(b"1", 3, make_png, 9))
    os.utime(changes, ns=(mark.st_atime_ns, mark.st_mtime_ns))  # neither size nor time tells
    assert changes.stat().st_size == mark.st_size
    result = quick(store, incoming)
    assert {r["shard"].rpartition("/")[2]: r["sha256"] for r in result["refused"]} == {
        "changes.tar": "",
        "goes.tar": "",
    }
    assert [b["status"] for b in result["batches"]] == ["split", "failed"]
    state = Ledger(str(store)).read()
    assert {s.sha256 for s in list(state.batches.values())[1].claim.shards} >= {sha256_file(changes)}
    (incoming / "goes.tar").write_bytes(kept)
    assert quick(store, incoming)["new"] == 1
    assert list_refused(str(store)) == []


def test_a_shard_that_grows_while_it_is_read_and_one_that_storage_keeps_wait_for_the_next_ingest(
    store: Path, incoming: Path, make_png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("grows.tar", "kept.tar", "stays.tar")):
        (incoming / name).write_bytes(tar_of(b"1", 3, make_png, seed))

    def read(url: str) -> str:
        if url.endswith("kept.tar"):
            raise StorageError("cannot read kept.tar: it is in an archive (8 attempts)")
        if url.endswith("grows.tar"):
            with Path(url).open("ab") as file:
                file.write(bytes(512))
        return sha256_file(url)

    with monkeypatch.context() as patched:
        patched.setattr(landed, "sha256_file", read)
        result = quick(store, incoming)
    assert (result["new"], result["refused"]) == (1, [])
    assert "grows.tar changed while it was read" in result["changing"][0]
    assert "it is in an archive" in result["unreadable"][0]
    assert quick(store, incoming)["new"] == 2


# --- every claimed batch has an end -----------------------------------------------------------------------------


def test_a_fault_of_ours_fails_its_batch_alone(store: Path, incoming: Path, make_png: Callable[..., bytes]) -> None:
    for seed in range(2):
        (incoming / f"{seed}.tar").write_bytes(tar_of(b"1", 3, make_png, seed))
    result = quick(store, incoming, max_shards=1)
    assert [b["status"] for b in result["batches"]] == ["failed", "failed"]
    assert result["batches"][0]["reasons"] == ["RuntimeError: a fault of ours"]
    assert quick(store, incoming)["batches"] == []


def test_a_fault_that_one_shard_brings_out_costs_that_shard(
    store: Path, incoming: Path, make_png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        (incoming / f"{seed}.tar").write_bytes(tar_of(b"1", 3, make_png, seed))

    def index(url: str, *args: Any) -> Any:
        if url.endswith("1.tar"):
            raise AssertionError("never seen before")
        return real(url, *args)

    real = unfit.index_shard
    monkeypatch.setattr(unfit, "index_shard", index)
    monkeypatch.setattr("sanitize.data.index.index_shard", index)
    result = quick(store, incoming)
    assert [r["shard"].rpartition("/")[2] for r in result["refused"]] == ["1.tar"]
    assert "AssertionError: never seen before" in result["refused"][0]["reasons"][0]
    assert [b["shards"] for b in result["batches"]] == [3, 2]


@pytest.mark.parametrize("decision", ["retried", "rejected"])
def test_storage_that_fails_one_batch_does_not_stop_the_next_and_a_person_can_give_it_up(
    store: Path, incoming: Path, make_png: Callable[..., bytes], decision: Any
) -> None:
    (incoming / "a.tar").write_bytes(tar_of(b"1", 3, make_png, 0))
    ledger = Ledger(str(store))
    batch = claim(config_of(incoming), list_shards([str(incoming)], ledger.read()).offered, ledger)
    assert batch is not None
    name = batch.claim.batch
    (store / "batches").mkdir()
    (store / "batches" / name).write_bytes(b"in the way")
    (incoming / "b.tar").write_bytes(tar_of(b"1", 3, make_png, 1))
    for _ in range(2):
        stuck, *others = quick(store, incoming)["batches"]
        assert (stuck["batch"], stuck["status"]) == (name, "claimed")
    assert others == []
    assert [b["status"] for b in list_batches(str(store))] == ["claimed", "failed"]
    decide(str(store), name, decision, "Ada", "a file is in its place")
    row = list_batches(str(store))[0]
    assert (row["status"], row["outcome"], row["decision"]["decision"]) == (decision, "failed", decision)
    assert "given up by Ada" in row["reasons"][0]
    assert quick(store, incoming)["new"] == (1 if decision == "retried" else 0)


def test_a_batch_that_another_process_is_at_work_on_is_not_given_up(
    store: Path, incoming: Path, make_png: Callable[..., bytes]
) -> None:
    (incoming / "a.tar").write_bytes(tar_of(b"1", 3, make_png, 0))
    ledger = Ledger(str(store))
    batch = claim(config_of(incoming), list_shards([str(incoming)], ledger.read()).offered, ledger)
    assert batch is not None
    with exclusive(store / "batches" / batch.claim.batch), pytest.raises(ArtifactError, match="another process"):
        decide(str(store), batch.claim.batch, "retried")
    with pytest.raises(ConfigError, match="is claimed; only a held or accepted batch can be approved"):
        decide(str(store), batch.claim.batch, "approved")


@pytest.mark.parametrize(
    ("error", "is_storage"),
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.ENAMETOOLONG, "too long"), False),
        (OSError("an image decoder says so"), False),
        (RuntimeError("ours"), False),
    ],
)
def test_what_may_pass_leaves_a_batch_claimed_and_what_will_not_fails_it(error: Exception, is_storage: bool) -> None:
    assert unfit.is_storage(error) == is_storage


def test_a_damaged_reference_is_said_before_anything_is_claimed(
    store: Path, incoming: Path, make_png: Callable[..., bytes]
) -> None:
    (incoming / "a.tar").write_bytes(tar_of(b"1", 3, make_png, 0))
    config = store / "reference/v0001/config.yaml"
    config.write_text(config.read_text().replace("level: 0.01", "level: 0.02"))
    with pytest.raises(ArtifactError, match=r"config\.yaml is not what the ledger names"):
        quick(store, incoming)
    assert Ledger(str(store)).read().batches == {}


def test_one_sample_is_a_batch(store: Path, incoming: Path, make_png: Callable[..., bytes]) -> None:
    (incoming / "one.tar").write_bytes(tar_of(b"4", 1, make_png, 0))
    (batch,) = start(config_of(incoming), str(store), direct=True)["batches"]
    assert batch["status"] in ("accepted", "held")
    assert batch["samples"]["samples"] == 1


def test_a_folder_whose_name_is_not_utf8_is_refused_and_others_go_on(
    store: Path, tmp_path: Path, make_png: Callable[..., bytes]
) -> None:
    odd, plain = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "plain"
    for seed, folder in enumerate((odd, plain)):
        folder.mkdir()
        (folder / "a.tar").write_bytes(tar_of(b"1", 3, make_png, seed))
    config = config_of(plain).model_copy(update={"shards": (str(odd), str(plain))})
    result = JOBS["ingest"].function(config, UpToTheIndex(store, CPU))
    assert result["new"] == 1
    assert ["caf\\xe9" in shard["shard"] for shard in result["refused"]] == [True]


# --- any names, any shards, killed anywhere ---------------------------------------------------------------------

NASTY = st.text(st.sampled_from("ab.:*?[]{}%$ \\'\"\n\t\x1b\u200b\u00e9\udcff,;|~-#"), min_size=1, max_size=12)
NAMES = st.one_of(NASTY, st.sampled_from(["..", "a::b", "n" * 216, "n" * 240, ".hidden", "x.tar", "{0..9}"]))
KINDS = st.sampled_from(["good", "good", "bad labels", "empty", "noise", "cut"])


def content_of(kind: str, seed: int, png: Callable[..., bytes]) -> bytes:
    if kind == "good":
        return tar_of(b"%d" % (seed % 10), 2, png, seed)
    if kind == "bad labels":
        return tar_of(b"99", 2, png, seed)
    return {"empty": b"", "noise": bytes([seed]) * 3000, "cut": tar_of(b"1", 1, png, seed)[:700]}[kind]


@settings(max_examples=25)
@given(
    files=st.lists(st.tuples(NAMES, KINDS), max_size=6, unique_by=lambda file: file[0]),
    max_shards=st.integers(1, 4),
    deaths=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=4),
)
def test_whatever_lands_and_wherever_it_dies_each_shard_ends_once(
    files: list[tuple[str, str]],
    max_shards: int,
    deaths: list[tuple[int, bool]],
    referenced: Path,
    make_png: Callable[..., bytes],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, incoming = shutil.copytree(referenced, Path(folder) / "store"), Path(folder) / "in"
        incoming.mkdir()
        kinds: dict[str, str] = {}
        for seed, (name, kind) in enumerate(files):
            data = content_of(kind, seed, make_png)
            try:
                (incoming / f"{name}.tar").write_bytes(data)
            except OSError:
                continue  # no file can have this name
            kinds[f"{name}.tar"] = kind
        for after, is_written in deaths:
            with suppress(Killed), dying(after, is_written):
                quick(store, incoming, max_shards=max_shards)
        quick(store, incoming, max_shards=max_shards)
        state = Ledger(str(store)).read()
        check(state, incoming, kinds)
        quick(store, incoming, max_shards=max_shards)
        assert Ledger(str(store)).read().n_entries == state.n_entries  # nothing is named or claimed twice


def dying(after: int, is_written: bool) -> Any:
    """The process dies where it appends entry number `after`: before it is written, or behind."""
    real, count = ledger_module.create_new, 0

    def create_new(url: str, data: bytes) -> bool:
        nonlocal count
        count += 1
        if count <= after:
            return real(url, data)
        if is_written:
            real(url, data)
        raise Killed

    return patch.object(ledger_module, "create_new", create_new)


def check(state: State, incoming: Path, kinds: dict[str, str]) -> None:
    assert state.unfinished == []
    batches = state.batches.values()
    alive = [shard.sha256 for batch in batches if batch.outcome != "split" for shard in batch.claim.shards]
    assert len(alive) == len(set(alive))
    refused = {shard.url.rpartition("/")[2]: shard for shard in state.refused.values()}
    for name, kind in kinds.items():
        shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        digest = hashlib.sha256((incoming / name).read_bytes()).hexdigest()
        if shown in refused and not refused[shown].sha256:
            assert digest not in alive  # its name is unfit, whatever it holds
            continue
        assert (digest in alive) == (kind == "good"), (name, kind)
        if kind != "good":
            assert digest in {shard.sha256 for shard in state.refused.values()}
    fit = {name for name in kinds if name.isascii() and name.isprintable() and "::" not in name and len(name) < 200}
    assert not {name for name in fit & refused.keys() if not refused[name].sha256}


def test_settings_of_an_older_claim_still_parse() -> None:
    later = ("max_bad_fraction", "max_bad_shards")
    older = {name: value for name, value in BatchConfig().model_dump(mode="json").items() if name not in later}
    assert BatchConfig.model_validate(older) == BatchConfig()
