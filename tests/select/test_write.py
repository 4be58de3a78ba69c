import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sanitize.artifacts import verify
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Selection, write_rows
from sanitize.errors import DataError
from sanitize.select import Shards, WriteConfig, write_selected
from sanitize.select.stage import SCHEMA
from sanitize.tar.read import unsafe_name

Read = Callable[[str | Path], list[tuple[str, bytes]]]
ANYTHING = IndexConfig(max_bad_fraction=1)


def make_selection(out: Path, dataset: Dataset, remove: Callable[[str, dict], bool]) -> Selection:
    """Verdicts by a function of shard and index row, as `select_samples` writes them."""
    import pyarrow as pa

    from sanitize.artifacts import Part, Recipe, make

    def write(part: Part) -> None:
        for shard in dataset.shards:
            rows = []
            for row in dataset.rows(shard).to_pylist():
                verdict = {name: row[name] for name in ("position", "key", "label")}
                status, reasons = "kept", []
                if row["status"] != "ok":
                    status, reasons = "unreadable", [{"stage": "index", "reason": row["reason"]}]
                elif remove(shard, row):
                    reason = {"stage": "spectral", "reason": "far out", "score": 2.0, "threshold": 1.0, "p_value": 0.5}
                    status, reasons = "quarantined", [reason]
                rows.append(verdict | {"status": status, "keep": status == "kept", "reasons": reasons})
                part.counts[status] += 1
                part.counts["samples"] += 1
            write_rows(part, shard, pa.Table.from_pylist(rows, SCHEMA))

    return make(Selection, out, Recipe(stage="made-up", inputs={"dataset": dataset.digest}), write)


def every_third(_shard: str, row: dict) -> bool:
    return row["position"] % 3 == 1


@pytest.fixture
def carried(tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes]) -> Path:
    """A plain shard and a compressed one in a folder, with members of all kinds, some samples unreadable."""
    for name, mode, prefix in (("a.tar", "w", "a"), ("deep/b.tar.gz", "w:gz", "b")):
        members = []
        for i in range(12):
            key = f"{'long/' * 30 if i == 4 else ''}{prefix}{i}"
            members += [(f"{key}.json", b'{"i": %d}' % i), (f"{key}.png", make_png(i)), (f"{key}.cls", b"%d" % (i % 3))]
            members += [(f"{key}.pickle", b"\x80cos\nsystem"), (f"{key}.seg.npy", bytes(range(256)) * i)]
            if i in (5, 6):
                members = [m for m in members if m[0] != f"{key}.cls"]
        make_tar(tmp_path / "in" / name, members, mode, tarfile.PAX_FORMAT)
    return tmp_path / "in"


@pytest.fixture
def written(tmp_path: Path, carried: Path, compute: Compute) -> tuple[Dataset, Selection, Shards]:
    dataset = index_shards(ANYTHING, str(carried), str(tmp_path / "index"), compute)
    selection = make_selection(tmp_path / "selection", dataset, every_third)
    return dataset, selection, write_selected(WriteConfig(), dataset, selection, str(tmp_path / "out"), compute)


def sha256s(members: list[tuple[str, bytes]]) -> list[tuple[str, str]]:
    return [(name, hashlib.sha256(data).hexdigest()) for name, data in members]


def by_sample(members: list[tuple[str, bytes]]) -> dict[str, list[tuple[str, bytes]]]:
    samples: dict[str, list[tuple[str, bytes]]] = {}
    for name, data in members:
        folder, _, base = name.rpartition("/")
        samples.setdefault(f"{folder}/{base.partition('.')[0]}".lstrip("/"), []).append((name, data))
    return samples


def test_kept_members_are_the_same_bytes_with_the_same_names_in_the_same_order(
    carried: Path, written: tuple[Dataset, Selection, Shards], read_tar: Read
) -> None:
    _, selection, shards = written
    for shard in ("a.tar", "deep/b.tar.gz"):
        kept = {row["key"] for row in selection.rows(shard).to_pylist() if row["keep"]}
        assert len(kept) == 6
        before = by_sample(read_tar(carried / shard))
        wanted = [member for key, members in before.items() if key in kept for member in members]
        assert sha256s(read_tar(shards.file(f"clean/{shard}"))) == sha256s(wanted)


def test_counts_add_up(written: tuple[Dataset, Selection, Shards], read_tar: Read) -> None:
    dataset, _, shards = written
    counts = shards.manifest().counts
    assert counts == {"kept": 12, "quarantined": 8, "unreadable": 4}
    assert sum(counts.values()) == dataset.manifest().counts["samples"]
    clean = sum(len(by_sample(read_tar(path))) for path in shards.clean())
    quarantine = [name for name in shards.manifest().files if name.startswith("quarantine/")]
    assert clean == counts["kept"]
    assert sum(len(by_sample(read_tar(shards.file(name)))) for name in quarantine) == 12
    assert verify(Path(shards.path)) == []


def test_quarantine_holds_the_sample_as_it_was_and_the_evidence(
    carried: Path, written: tuple[Dataset, Selection, Shards], read_tar: Read
) -> None:
    dataset, _, shards = written
    for shard in ("a.tar", "deep/b.tar.gz"):
        before, after = by_sample(read_tar(carried / shard)), by_sample(read_tar(shards.file(f"quarantine/{shard}")))
        index = {row["key"]: row for row in dataset.rows(shard).to_pylist()}
        assert len(after) == 6
        for key, members in after.items():
            assert members[:-1] == before[key]
            assert members[-1][0] == f"{key}.sanitize.json"
            evidence, row = json.loads(members[-1][1]), index[key]
            assert (evidence["shard"], evidence["position"], evidence["key"]) == (shard, row["position"], key)
            if row["status"] == "ok":
                assert evidence["status"] == "quarantined"
                assert evidence["label"] == row["label"]
                assert evidence["sha256"] == hashlib.sha256(dict(members)[f"{key}.png"]).hexdigest()
                reason = {"stage": "spectral", "reason": "far out", "score": 2.0, "threshold": 1.0, "p_value": 0.5}
                assert evidence["reasons"] == [reason]
            else:
                assert evidence["status"] == "unreadable"
                (reason,) = evidence["reasons"]
                assert reason["stage"] == "index"
                assert reason["reason"].startswith("no .cls member")


def test_what_came_compressed_is_compressed_again_and_reproducibly(
    tmp_path: Path, written: tuple[Dataset, Selection, Shards], compute: Compute
) -> None:
    dataset, selection, shards = written
    assert shards.file("clean/deep/b.tar.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert shards.file("quarantine/deep/b.tar.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert shards.file("clean/a.tar").stat().st_size % 512 == 0
    for shard in dataset.shards[::-1]:
        write_selected(WriteConfig(), dataset, selection, str(tmp_path / "again"), compute, shards=[shard])
    again = write_selected(WriteConfig(), dataset, selection, str(tmp_path / "again"), compute)
    assert again.digest == shards.digest
    small = write_selected(WriteConfig(gzip_level=9), dataset, selection, str(tmp_path / "small"), compute)
    assert small.file("clean/a.tar").read_bytes() == shards.file("clean/a.tar").read_bytes()


def test_nothing_removed_writes_no_quarantine_and_everything_removed_an_empty_shard(
    tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], read_tar: Read, compute: Compute
) -> None:
    members = {name: good(4, name) for name in ("a", "b")}
    for name in members:
        make_tar(tmp_path / f"in/{name}.tar", members[name])
    dataset = index_shards(IndexConfig(), str(tmp_path / "in"), str(tmp_path / "index"), compute)
    selection = make_selection(tmp_path / "selection", dataset, lambda shard, _row: shard == "b.tar")
    shards = write_selected(WriteConfig(), dataset, selection, str(tmp_path / "out"), compute)
    assert set(shards.manifest().files) == {
        *("clean/a.tar", "clean/b.tar", "quarantine/b.tar"),
        *("dataset.json", "croissant.json"),
    }
    assert read_tar(shards.file("clean/a.tar")) == members["a"]
    assert read_tar(shards.file("clean/b.tar")) == []
    assert len(read_tar(shards.file("quarantine/b.tar"))) == 12


@pytest.mark.hostile
def test_quarantine_can_be_extracted_whatever_the_names_were(
    tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes], read_tar: Read, compute: Compute
) -> None:
    """Names that no extractor should follow, or that meet each other or the evidence in one folder, are replaced."""
    png = make_png()
    raw = b"caf\xe9".decode("utf-8", "surrogateescape")
    odd = {
        0: [("../up.png", png), ("../up.cls", b"1")],
        1: [("/etc/cron.d/x.png", png)],
        2: [("ok.png", b"bad"), ("ok.cls", b"1"), ("ok.sanitize.json", b'{"status": "kept"}')],
        3: [("ok2.png", b"bad"), ("ok2.cls", b"1"), ("ok2.Sanitize.JSON", b"{}")],
        4: [("twice.png", png), ("twice.png", b"other"), ("twice.cls", b"1")],
        5: [("dup.png", b"bad"), ("dup.cls", b"1")],
        6: [("a\x1b[2J.png", png)],
        7: [("dup.png", b"bad"), ("dup.cls", b"1")],
        8: [("sample-00000000.png", b"bad"), ("sample-00000000.cls", b"1")],
        9: [(f"{raw}.png", b"bad"), (f"{raw}.cls", b"1")],
        10: [("n" * 4090 + ".png", b"bad")],
        11: [(".png", b"bad"), (".cls", b"1")],
        12: [("folder.d/x.png/", b"bad")],
        13: [("C:\\x.png", png)],
    }
    members = [member for one in odd.values() for member in one]
    path = make_tar(tmp_path / "x.tar", members, "w", tarfile.PAX_FORMAT)
    # One good sample, or indexing would stop.
    make_tar(tmp_path / "y.tar", [("good.png", png), ("good.cls", b"1")])
    dataset = index_shards(ANYTHING, [path, str(tmp_path / "y.tar")], str(tmp_path / "index"), compute)
    selection = make_selection(tmp_path / "selection", dataset, lambda *_: False)
    shards = write_selected(WriteConfig(), dataset, selection, str(tmp_path / "out"), compute)
    written = read_tar(shards.file("quarantine/x.tar"))
    names = [name for name, _ in written]
    folded = [name.lower() for name in names]
    assert len(set(folded)) == len(names), "two members would overwrite each other"
    assert all(unsafe_name(name) is None for name in names)
    evidence = [json.loads(data) for name, data in written if name.endswith(".sanitize.json")]
    assert [e["position"] for e in evidence] == list(range(dataset.manifest().counts["unreadable"]))
    carried = [data for name, data in written if not name.endswith(".sanitize.json")]
    index = dataset.rows("x.tar").to_pylist()
    assert [len(data) for data in carried] == [member["size"] for row in index for member in row["members"]]
    (renamed,) = (e["renamed"] for e in evidence if e.get("key") == "../up")
    assert renamed == {"sample-00000000.member0": "../up.png", "sample-00000000.member1": "../up.cls"}


@pytest.mark.hostile
def test_a_shard_that_changed_after_indexing_is_not_copied(
    tmp_path: Path,
    carried: Path,
    written: tuple[Dataset, Selection, Shards],
    make_png: Callable[..., bytes],
    compute: Compute,
) -> None:
    dataset, selection, _ = written
    path = carried / "a.tar"
    data = bytearray(path.read_bytes())
    at = data.index(make_png(0)) + 40
    data[at] ^= 1  # one bit of one picture, same size
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar has changed since it was indexed"):
        write_selected(WriteConfig(), dataset, selection, str(tmp_path / "again"), compute)
    assert not (tmp_path / "again").exists()
    path.unlink()
    with pytest.raises(DataError, match=r"a\.tar"):
        write_selected(WriteConfig(), dataset, selection, str(tmp_path / "again"), compute)


def test_verdicts_that_do_not_belong_to_the_data_are_refused(
    tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], compute: Compute
) -> None:
    first = index_shards(IndexConfig(), make_tar(tmp_path / "1/x.tar", good(4)), str(tmp_path / "i1"), compute)
    other = index_shards(IndexConfig(), make_tar(tmp_path / "2/x.tar", good(5)), str(tmp_path / "i2"), compute)
    selection = make_selection(tmp_path / "selection", first, every_third)
    with pytest.raises((DataError, ValueError)):
        write_selected(WriteConfig(), other, selection, str(tmp_path / "out"), compute)
    assert not (tmp_path / "out").exists()


def test_verdicts_that_do_not_belong_to_the_data_are_refused_even_where_nothing_goes(
    tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], compute: Compute
) -> None:
    first = index_shards(IndexConfig(), make_tar(tmp_path / "1/x.tar", good(4)), str(tmp_path / "i1"), compute)
    other = index_shards(IndexConfig(), make_tar(tmp_path / "2/x.tar", good(5)), str(tmp_path / "i2"), compute)
    selection = make_selection(tmp_path / "selection", first, lambda *_: False)
    with pytest.raises(DataError):
        write_selected(WriteConfig(), other, selection, str(tmp_path / "out"), compute)
    assert not (tmp_path / "out").exists()


def test_webdataset_reads_the_clean_shards(
    carried: Path, written: tuple[Dataset, Selection, Shards], read_tar: Read
) -> None:
    import webdataset as wds

    _, selection, shards = written
    samples = list(wds.WebDataset(shards.clean(), shardshuffle=False))
    kept = [row["key"] for shard in selection.shards for row in selection.rows(shard).to_pylist() if row["keep"]]
    assert [sample["__key__"] for sample in samples] == kept
    before = {}
    for shard in ("a.tar", "deep/b.tar.gz"):
        before |= dict(read_tar(carried / shard))
    for sample in samples:
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        assert set(members) == {"json", "png", "cls", "pickle", "seg.npy"}
        assert all(before[f"{sample['__key__']}.{suffix}"] == data for suffix, data in members.items())
