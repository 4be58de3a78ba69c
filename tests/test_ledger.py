import json
import uuid
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.errors import ArtifactError, ConfigError
from sanitize.ledger import (
    ClaimEntry,
    CleanShard,
    CommitEntry,
    Decision,
    DecisionEntry,
    DuplicatesEntry,
    Entry,
    Ledger,
    Offered,
    ReferenceEntry,
    Refused,
    RefusedEntry,
    RetryEntry,
    State,
)
from sanitize.storage import create_new, read_bytes
from tests.side_by_side import side_by_side


def offered(content: str, url: str | None = None) -> Offered:
    return Offered(url=url or f"/in/{content}.tar", size=1, modified="0", sha256=content * 64)


def reference(*contents: str) -> ReferenceEntry:
    clean = CleanShard(shard="run/clean/a.tar", sha256="0" * 64, size=1, samples=1, batch="")
    return ReferenceEntry(version=1, digests={}, shards=tuple(map(offered, contents)), clean=(clean,))


def claim(state: State, contents: str) -> ClaimEntry | None:
    shards = state.new(map(offered, contents))
    return ClaimEntry(batch=state.name_of(shards), reference=1, shards=tuple(shards)) if shards else None


def commit(entry: ClaimEntry, status: str) -> CommitEntry:
    clean = CleanShard(shard=f"batches/{entry.batch}/a.tar", sha256="1" * 64, size=1, samples=1, batch=entry.batch)
    return CommitEntry(batch=entry.batch, status=status, clean=(clean,) if status != "failed" else ())


def decided(entry: ClaimEntry, decision: Decision) -> DecisionEntry:
    return DecisionEntry(batch=entry.batch, decision=decision, by="Ada", at="2026-11-22T00:00:00Z")


def after(*entries: Entry) -> State:
    return State(entries)


# --- one order for all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_name_is_written_once_and_then_stays(where: str, tmp_path: Path) -> None:
    url = str(tmp_path / "a.json") if where == "disk" else f"memory://{uuid.uuid4().hex}/a.json"
    assert create_new(url, b"first")
    assert not create_new(url, b"second")
    assert read_bytes(url) == b"first"
    assert where == "memory" or [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_of_writers_that_race_each_claims_other_shards(tmp_path: Path) -> None:
    won = []
    Ledger(str(tmp_path)).append(lambda _state: reference())

    def claim_two(state: State) -> ClaimEntry | None:
        shards = state.new(map(offered, "0123456789abcdef"))[:2]
        return ClaimEntry(batch=state.name_of(shards), reference=1, shards=tuple(shards)) if shards else None

    def work(_i: int) -> None:
        ledger = Ledger(str(tmp_path))
        while (entry := ledger.append(claim_two)[0]) is not None:
            won.append(entry)

    side_by_side(8, work)
    claimed = [shard.sha256[0] for entry in won for shard in entry.shards]
    assert sorted(claimed) == list("0123456789abcdef")
    state = Ledger(str(tmp_path)).read()
    assert state.n_entries == 1 + len(won) == 9
    assert [batch.claim.batch for batch in state.unfinished] == list(state.batches)


def test_a_log_with_a_hole_or_a_damaged_entry_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.append(lambda _state: reference())
    ledger.append(lambda state: claim(state, "a"))
    (tmp_path / "ledger" / ".tmp-0123-00000002.json").write_bytes(b"")  # somebody is just writing it
    assert ledger.read().n_entries == 2
    first = tmp_path / "ledger" / "00000000.json"
    content = first.read_bytes()
    first.write_bytes(content[:-20])
    assert ledger.read().n_entries == 2  # what was read is not read again
    with pytest.raises(ArtifactError, match="is damaged"):
        Ledger(str(tmp_path)).read()
    first.unlink()
    with pytest.raises(ArtifactError, match="is incomplete"):
        ledger.read()


@given(st.lists(st.sampled_from("abcdef"), max_size=8), st.lists(st.sampled_from("abcdef"), max_size=8))
def test_what_is_read_back_is_what_was_written(first: list[str], second: list[str]) -> None:
    store = f"memory://{uuid.uuid4().hex}"
    ledger = Ledger(store)
    entries = [ledger.append(partial(claim, contents="".join(contents)))[0] for contents in (first, second)]
    state = Ledger(store).read()
    assert list(state.batches.values()) == list(State([e for e in entries if e is not None]).batches.values())
    assert state.taken == {content * 64 for content in first + second}
    in_batches = [shard.sha256 for batch in state.batches.values() for shard in batch.claim.shards]
    assert len(in_batches) == len(set(in_batches))


# --- what is new ------------------------------------------------------------------------------------------------


def test_a_shard_is_what_its_bytes_are() -> None:
    copies = [offered("a", "/in/z.tar"), offered("a", "/in/b.tar"), offered("b", "/in/c.tar")]
    assert [shard.url for shard in after(reference()).new(copies)] == ["/in/b.tar", "/in/c.tar"]
    assert after(reference("a", "b")).new(copies) == []
    known = after(reference("a"), DuplicatesEntry(shards=(copies[0],)))
    assert known.seen[copies[0].fingerprint] == "a" * 64
    assert [shard.sha256[0] for shard in known.new(copies)] == ["b"]


def test_names_of_shards_tell_contents_apart_and_do_not_depend_on_the_batch() -> None:
    shards = [offered("a", "/one/train.tar"), offered("b", "/two/train.tar"), offered("c", "s3://b/x.tar.gz")]
    names = [shard.name for shard in shards]
    assert names == [f"train-{'a' * 16}.tar", f"train-{'b' * 16}.tar", f"x-{'c' * 16}.tar.gz"]


def test_the_name_of_a_batch_is_its_content_and_changes_when_it_is_tried_again() -> None:
    state = after(reference())
    shards = list(map(offered, "ab"))
    assert state.name_of(shards) == state.name_of(shards[::-1])
    assert state.name_of(shards) != state.name_of(shards[:1])
    first = claim(state, "ab")
    assert first is not None
    state = after(reference(), first, commit(first, "failed"), decided(first, "retried"))
    again = claim(state, "ab")
    assert again is not None
    assert again.shards == first.shards
    assert again.batch != first.batch


# --- what trainers see ------------------------------------------------------------------------------------------

FEEDS = [("accepted", [], True), ("held", [], False), ("failed", [], False), ("held", ["approved"], True)]
FEEDS += [("held", ["rejected"], False), ("held", ["rejected", "approved"], True), ("accepted", ["rejected"], False)]


@pytest.mark.parametrize(("status", "decisions", "is_seen"), FEEDS)
def test_only_what_was_accepted_or_approved_is_in_the_feed(
    status: str, decisions: list[Decision], is_seen: bool
) -> None:
    entry = claim(after(reference()), "ab")
    assert entry is not None
    state = after(reference(), entry, commit(entry, status), *(decided(entry, d) for d in decisions))
    assert state.batches[entry.batch].is_released == is_seen
    assert [line.batch for line in state.feed()] == ([entry.batch] if is_seen else []) + [""]


def test_a_claimed_batch_is_in_no_feed_and_a_batch_is_found_by_how_it_begins() -> None:
    entry = claim(after(reference()), "ab")
    assert entry is not None
    state = after(reference(), entry)
    assert [line.batch for line in state.feed()] == [""]
    assert state.find(entry.batch[:5]).status == "claimed"
    for wrong in ("", "zz"):
        with pytest.raises(ConfigError, match="batches"):
            state.find(wrong)
    with pytest.raises(ConfigError, match="no reference yet"):
        after().reference  # noqa: B018


def test_an_entry_is_json_that_people_can_read(tmp_path: Path) -> None:
    Ledger(str(tmp_path)).append(lambda _state: reference("a"))
    entry = json.loads((tmp_path / "ledger/00000000.json").read_text())
    assert entry["kind"] == "reference"
    assert entry["shards"][0]["url"] == "/in/a.tar"


# --- refused shards ---------------------------------------------------------------------------------------------


def refused(content: str, url: str | None = None) -> Refused:
    return Refused(**offered(content, url).model_dump(), reason="bad labels")


def split(entry: ClaimEntry, *shards: Refused) -> CommitEntry:
    return CommitEntry(batch=entry.batch, status="split", refused=shards)


def test_a_split_batch_refuses_bad_bytes_and_makes_the_others_new_under_another_name() -> None:
    first = claim(after(reference()), "abc")
    assert first is not None
    state = after(reference(), first, split(first, refused("b")))
    assert [shard.sha256[0] for shard in state.new(map(offered, "abc"))] == ["a", "c"]
    assert state.new([offered("b", "/in/the-same-bytes.tar")]) == []
    assert state.unfinished == []
    again = claim(state, "abc")
    assert again is not None
    assert again.batch not in state.batches
    state.add(RetryEntry(shards=("b" * 64,), by="Ada", at="2026-11-22T00:00:00Z"))
    assert state.refused == {}
    assert [shard.sha256[0] for shard in state.new(map(offered, "abc"))] == ["a", "b", "c"]


def test_bytes_that_are_not_the_reason_are_read_and_offered_again() -> None:
    first = claim(after(reference()), "ab")
    assert first is not None
    gone = Refused(url="/in/a.tar", size=1, modified="0", reason="it has changed since it was claimed")
    state = after(reference(), first, split(first, gone))
    assert offered("a").fingerprint not in state.seen
    assert offered("b").fingerprint in state.seen
    assert [shard.sha256[0] for shard in state.new(map(offered, "ab"))] == ["a", "b"]
    again = claim(state, "ab")
    assert again is not None
    state.add(again)
    assert state.refused == {}  # it is in a batch now


def test_refused_shards_are_found_by_url_file_name_and_digest() -> None:
    state = after(reference(), RefusedEntry(shards=(refused("a", "/in/x.tar"), refused("b", "/other/x.tar"))))
    assert len(state.find_refused("x.tar")) == 2
    assert [shard.sha256[0] for shard in state.find_refused("/other/x.tar")] == ["b"]
    assert [shard.url for shard in state.find_refused("aaaa")] == ["/in/x.tar"]
    assert state.find_refused("") == state.find_refused("y.tar") == []


def test_the_name_of_a_shard_in_its_batch_is_short_enough_for_files_named_after_it() -> None:
    name = offered("a", "/in/" + "\u00e9" * 120 + ".TAR.GZ").name
    assert len(name.encode()) <= 160
    assert name.endswith(f"-{'a' * 16}.tar.gz")


# --- an untrusted ledger ----------------------------------------------------------------------------------------

COMMIT = {"kind": "commit", "batch": "0" * 16, "status": "accepted"}
CLEAN = {"shard": f"batches/{'0' * 16}/50-shards/clean/a.tar", "sha256": "1" * 64, "size": 1, "samples": 1}
CLAIM = {"kind": "claim", "batch": "0" * 16, "reference": 1, "shards": [offered("a").model_dump()]}
DECISION = {"kind": "decision", "batch": "0" * 16, "decision": "approved", "by": "Eve", "at": "now"}
HOSTILE: dict[str, list[object]] = {
    "batch that climbs": [CLAIM | {"batch": "../../../../tmp/x"}],
    "size of 10^400": [CLAIM | {"shards": [offered("a").model_dump() | {"size": 10**400}]}],
    "negative size": [CLAIM | {"shards": [offered("a").model_dump() | {"size": -1}]}],
    "version of 10^9": [{"kind": "reference", "version": 10**9, "digests": {}}],
    "digest that is a path": [CLAIM | {"shards": [offered("a").model_dump() | {"sha256": "../" * 21 + "x"}]}],
    "clean shard out of the store": [CLAIM, COMMIT | {"clean": [CLEAN | {"batch": "0" * 16, "shard": "/etc/passwd"}]}],
    "clean shard that climbs": [
        CLAIM,
        COMMIT | {"clean": [CLEAN | {"batch": "0" * 16, "shard": f"batches/{'0' * 16}/../../../x"}]},
    ],
    "clean shard of no batch": [CLAIM, COMMIT | {"clean": [CLEAN | {"batch": ""}]}],
    "commit of what was not claimed": [COMMIT],
    "two commits": [CLAIM, COMMIT, COMMIT],
    "decision on what was not claimed": [DECISION],
    "decision before the commit": [CLAIM, DECISION],
    "claimed twice": [CLAIM, CLAIM | {"batch": "1" * 16}],
    "one batch twice": [CLAIM, CLAIM | {"shards": [offered("b").model_dump()]}],
    "retry of what was not refused": [{"kind": "retry", "shards": ["a" * 64], "by": "Eve", "at": "now"}],
    "split that refuses nothing": [CLAIM, COMMIT | {"status": "split"}],
    "versions out of order": [{"kind": "reference", "version": 2, "digests": {}}],
    "unknown kind": [{"kind": "shell", "run": "rm"}],
    "unknown field": [CLAIM | {"run": "rm"}],
    "no object": [[1, 2, 3]],
}


@pytest.mark.parametrize("entries", HOSTILE.values(), ids=HOSTILE.keys())
def test_an_entry_that_cannot_be_is_an_error_that_names_its_file(entries: list[object], tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    for number, entry in enumerate(entries):
        (tmp_path / f"ledger/{number:08d}.json").write_text(json.dumps(entry))
    last = f"{len(entries) - 1:08d}.json"
    ledger = Ledger(str(tmp_path))
    with pytest.raises(ArtifactError, match=f"{last} (is damaged|does not follow)"):
        ledger.read()
    assert ledger.so_far.n_entries == len(entries) - 1


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"\xff\xfe", b""])
def test_an_entry_that_no_parser_likes_is_damaged(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger/00000000.json").write_bytes(data)
    with pytest.raises(ArtifactError, match="is damaged"):
        Ledger(str(tmp_path)).read()


def test_an_entry_that_does_not_follow_is_not_written(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    with pytest.raises(ArtifactError, match="never claimed"):
        ledger.append(lambda _state: CommitEntry(batch="0" * 16, status="failed"))
    assert list(tmp_path.iterdir()) == []
