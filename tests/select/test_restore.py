from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from sanitize.artifacts import Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Scores, Selection, write_rows
from sanitize.errors import DataError
from sanitize.select import (
    ContaminationRule,
    RestoreConfig,
    SelectConfig,
    WriteConfig,
    restore_samples,
    select_samples,
    write_selected,
)


@pytest.fixture
def chosen(tmp_path: Path, dataset: Dataset, scores: Scores, compute: Compute) -> Selection:
    config = SelectConfig(rule=ContaminationRule(rate=0.02))
    return select_samples(config, dataset, [scores], str(tmp_path / "selection"), compute)


def rows_by_status(selection: Selection, status: str) -> list[tuple[str, dict]]:
    return [(s, r) for s in selection.shards for r in selection.rows(s).to_pylist() if r["status"] == status]


def test_the_named_samples_come_back_and_nothing_else_changes(
    tmp_path: Path, dataset: Dataset, chosen: Selection, read_tar: Callable[..., list], compute: Compute
) -> None:
    removed = rows_by_status(chosen, "quarantined")
    (shard_a, a), (shard_b, b) = removed[0], removed[-1]
    config = RestoreConfig(keys=(a["key"], f"{shard_b}:{b['key']}"), note="looked at by hand")
    restored = restore_samples(config, chosen, str(tmp_path / "restored"), compute)
    for shard in chosen.shards:
        for before, after in zip(chosen.rows(shard).to_pylist(), restored.rows(shard).to_pylist(), strict=True):
            if (shard, before["key"]) in {(shard_a, a["key"]), (shard_b, b["key"])}:
                assert (after["status"], after["keep"]) == ("kept", True)
                assert after["reasons"][:-1] == before["reasons"]
                assert after["reasons"][-1]["stage"] == "restore"
                assert after["reasons"][-1]["reason"] == "looked at by hand"
            else:
                assert after == before
    counts, was = restored.manifest().counts, chosen.manifest().counts
    assert counts["restored"] == 2
    assert counts["kept"] == was["kept"] + 2
    assert counts["quarantined"] == was["quarantined"] - 2
    assert counts["samples"] == was["samples"]
    shards = write_selected(WriteConfig(), dataset, restored, str(tmp_path / "written"), compute)
    assert f"{a['key']}.png" in dict(read_tar(shards.file(f"clean/{shard_a}")))
    assert shards.manifest().counts["kept"] == counts["kept"]


def test_putting_back_everything_gives_the_shards_back(
    tmp_path: Path, dataset: Dataset, digits: Digits, chosen: Selection, read_tar: Callable[..., list], compute: Compute
) -> None:
    keys = tuple(row["key"] for _, row in rows_by_status(chosen, "quarantined"))
    restored = restore_samples(RestoreConfig(keys=keys), chosen, str(tmp_path / "restored"), compute)
    shards = write_selected(WriteConfig(), dataset, restored, str(tmp_path / "written"), compute)
    for before, after in zip(digits.shards()[:4], shards.clean(), strict=True):
        assert read_tar(before) == read_tar(after)
    assert not [name for name in shards.manifest().files if name.startswith("quarantine/")]


def test_the_order_of_keys_does_not_matter(tmp_path: Path, chosen: Selection, compute: Compute) -> None:
    keys = [row["key"] for _, row in rows_by_status(chosen, "quarantined")[:3]]
    first = restore_samples(RestoreConfig(keys=tuple(keys)), chosen, str(tmp_path / "a"), compute)
    second = restore_samples(RestoreConfig(keys=tuple(keys[::-1])), chosen, str(tmp_path / "b"), compute)
    assert first.digest == second.digest


@pytest.mark.parametrize("which", ["unknown", "kept", "wrong shard", "half a key"])
def test_what_is_not_in_quarantine_cannot_be_put_back(
    tmp_path: Path, chosen: Selection, compute: Compute, which: str
) -> None:
    shard, row = rows_by_status(chosen, "quarantined")[0]
    key = {
        "unknown": "no-such-key",
        "kept": rows_by_status(chosen, "kept")[0][1]["key"],
        "wrong shard": f"{next(s for s in chosen.shards if s != shard)}:{row['key']}",
        "half a key": row["key"][:-1],
    }[which]
    with pytest.raises(DataError, match="not in quarantine"):
        restore_samples(RestoreConfig(keys=(row["key"], key)), chosen, str(tmp_path / "out"), compute)
    assert not (tmp_path / "out").exists()


def test_a_key_in_several_shards_must_say_which(
    tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], compute: Compute
) -> None:
    for name in ("a", "b"):
        make_tar(tmp_path / f"in/{name}.tar", [*good(5), ("bad.png", b"no image"), ("bad.cls", b"0")])
    dataset = index_shards(IndexConfig(max_bad_fraction=0.5), str(tmp_path / "in"), str(tmp_path / "index"), compute)
    selection = select_samples(
        SelectConfig(rule=ContaminationRule(rate=0.5, factor=2), max_removed_fraction=1),
        dataset,
        [make_scores(tmp_path / "scores", dataset)],
        str(tmp_path / "selection"),
        compute,
    )
    assert selection.manifest().counts["quarantined"] == 10
    with pytest.raises(DataError, match=r"2 times; write [\w-]+\.tar:good0001 or [\w-]+\.tar:good0001"):
        restore_samples(RestoreConfig(keys=("good0001",)), selection, str(tmp_path / "out"), compute)
    with pytest.raises(DataError, match="not in quarantine"):  # unreadable: there is nothing to train on
        restore_samples(RestoreConfig(keys=("a.tar:bad",)), selection, str(tmp_path / "out"), compute)
    restored = restore_samples(RestoreConfig(keys=("b.tar:good0001",)), selection, str(tmp_path / "out"), compute)
    assert [(s, row["key"]) for s, row in rows_by_status(restored, "kept")] == [("b.tar", "good0001")]


def make_scores(out: Path, dataset: Dataset) -> Scores:
    def write(part: Part) -> None:
        for shard in dataset.shards:
            rows = [row for row in dataset.rows(shard).to_pylist() if row["status"] == "ok"]
            columns = {name: [row[name] for row in rows] for name in ("position", "key", "label")}
            scores = pa.array([float(row["position"]) for row in rows], pa.float32())
            write_rows(part, shard, pa.table(columns | {"score": scores}))
        part.write_json("scorer.json", {"config": {"kind": "made-up"}, "classes": {}})

    return make(Scores, out, Recipe(stage="made-up"), write)
