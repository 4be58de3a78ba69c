"""Several pictures a sample: rules judge pictures, samples are removed, written, counted and put back whole."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Hygiene, Selection
from sanitize.errors import DataError
from sanitize.hygiene import HygieneConfig, check_hygiene
from sanitize.select import (
    ContaminationRule,
    FDRRule,
    RestoreConfig,
    SelectConfig,
    WriteConfig,
    restore_samples,
    select_samples,
    write_selected,
)
from sanitize.select.stage import SIBLING
from sanitize.select.write import Shards
from tests.select.test_stage import make_scores, verdicts

Make = Callable[..., Any]
COMPUTE = Compute(device="cpu")
N = 60  # samples of a shard; sample i has 1 + i % 3 pictures
MARKED = {"0001", "0004", "0013", "1014"}
SUFFIXES = ("left.png", "right.png", "top.png")
ALL = IndexConfig.model_validate({"image": {"member": "all"}, "max_bad_fraction": 0.2, "image_facts": True})


def pictures(make_png: Make, shard: int) -> list[list[tuple[str, bytes]]]:
    """Pictures of each sample, with their suffixes; all are different."""
    start = 3 * N * shard
    return [[(SUFFIXES[k], make_png(start + 3 * i + k)) for k in range(1 + i % 3)] for i in range(N)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, make_tar: Make, make_png: Make) -> Path:
    """`in`: two shards of samples in two classes, two of them unreadable; `flat`: their pictures as one sample each."""
    home = tmp_path_factory.mktemp("several")
    for s, name in enumerate(("a.tar", "b.tar")):
        whole, flat = [("bad.left.png", make_png(1)), ("bad.right.png", b"no"), ("bad.cls", b"0")], []
        for i, own in enumerate(pictures(make_png, s)):
            label = b"%d" % (i // 10 % 2)
            whole += [(f"{s}{i:03}.{suffix}", data) for suffix, data in own]
            whole += [(f"{s}{i:03}.cls", label), (f"{s}{i:03}.txt", b"beside")]
            for suffix, data in own:
                key = f"{s}{i:03}-{suffix.partition('.')[0]}"
                flat += [(f"{key}.png", data), (f"{key}.cls", label)]
        make_tar(home / "in" / name, whole)
        make_tar(home / "flat" / name, flat)
    return home


@pytest.fixture(scope="module")
def dataset(home: Path) -> Dataset:
    return index_shards(ALL, str(home / "in"), str(home / "index"), COMPUTE)


@pytest.fixture(scope="module")
def flat(home: Path) -> Dataset:
    return index_shards(IndexConfig(), str(home / "flat"), str(home / "flat-index"), COMPUTE)


def of_picture(seed: int) -> Callable[[str, dict], float]:
    """A score that depends on the picture alone; one picture of ten in class 1 has a high one, whatever the seed."""

    def score(_shard: str, row: dict) -> float:
        number = int(row["sha256"][:8], 16)
        is_high = row["label"] == 1 and number % 10 == 0
        return float(np.random.default_rng([seed, number]).normal() + 20 * is_high)

    return score


CONFIGS = [
    SelectConfig(rule=ContaminationRule(rate=0.05), max_removed_fraction=1),
    SelectConfig(rule=FDRRule(q=0.2), max_removed_fraction=1),
    SelectConfig(rule=FDRRule(q=0.2), verdict="all", max_removed_fraction=1),
    SelectConfig(rule=FDRRule(q=0.2), verdict="combined", q=0.2, max_removed_fraction=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["contamination", "any", "all", "combined"])
def test_a_sample_is_removed_if_and_only_if_one_of_its_pictures_is(
    config: SelectConfig, dataset: Dataset, flat: Dataset, tmp_path: Path
) -> None:
    """The slow way: select among the pictures, each a sample of its own, then gather them."""

    def select(data: Dataset, name: str) -> Selection:
        scores = [make_scores(tmp_path / f"{name}-{s}", data, of_picture(s), kind=f"made-up-{s}") for s in range(2)]
        return select_samples(config, data, scores, str(tmp_path / name), COMPUTE)

    whole, alone = select(dataset, "whole"), select(flat, "alone")
    gone = {row["key"].partition("-")[0] for row in verdicts(alone) if not row["keep"]}
    rows = [row for row in verdicts(whole) if row["status"] != "unreadable"]
    assert 0 < len(gone) < 2 * N
    assert {row["key"] for row in rows if not row["keep"]} == gone
    by_picture = {
        (row["key"].partition("-")[0], f"{row['key'].partition('-')[2]}.png"): row["reasons"] for row in verdicts(alone)
    }
    for row in rows:
        own = [reason["stage"] for reason in by_picture[row["key"], row["member"].partition(".")[2]]]
        stages = [reason["stage"] for reason in row["reasons"]]
        assert stages == (own or [SIBLING] * (row["key"] in gone))
    assert whole.manifest().counts == {
        "samples": 2 * N + 2,
        "kept": 2 * N - len(gone),
        "quarantined": len(gone),
        "unreadable": 2,
    }
    classes = whole.read_json("selection.json")["classes"]
    assert sum(entry["n"] for entry in classes.values()) == 2 * N
    assert sum(entry["pictures"] for entry in classes.values()) == 4 * N
    assert sum(entry["removed"] for entry in classes.values()) == len(gone)


def test_the_cap_is_a_share_of_the_samples(dataset: Dataset, tmp_path: Path) -> None:
    """Half of all pictures are flagged; of each class a fifth of the samples goes, those with the highest scores."""
    scores = make_scores(tmp_path / "scores", dataset, of_picture(0))
    config = SelectConfig(rule=ContaminationRule(rate=0.5, factor=1), max_removed_fraction=0.2)
    selection = select_samples(config, dataset, [scores], str(tmp_path / "out"), COMPUTE)
    for entry in selection.read_json("selection.json")["classes"].values():
        assert (entry["n"], entry["removed"], entry["capped"]) == (N, N // 5, True)
        assert entry["scorers"]["made-up"]["flagged"] == N // 5


@pytest.fixture(scope="module")
def selection(home: Path, dataset: Dataset) -> Selection:
    """The picture `right.png` of two samples of each class has a high score."""

    def score(_shard: str, row: dict) -> float:
        return float(row["key"] in MARKED and "right" in row["image"]) * 50 + row["position"] / 1000

    scores = make_scores(home / "scores", dataset, score)
    config = SelectConfig(rule=ContaminationRule(rate=0.017, factor=1))
    return select_samples(config, dataset, [scores], str(home / "selection"), COMPUTE)


@pytest.fixture(scope="module")
def shards(home: Path, dataset: Dataset, selection: Selection) -> Shards:
    return write_selected(WriteConfig(), dataset, selection, str(home / "out"), COMPUTE)


def test_samples_are_written_whole_and_the_evidence_names_the_picture(
    home: Path, shards: Shards, read_tar: Make
) -> None:
    removed: set[str] = set()
    for name in ("a.tar", "b.tar"):
        before = read_tar(home / "in" / name)
        clean = read_tar(shards.file(f"clean/{name}"))
        quarantined = read_tar(shards.file(f"quarantine/{name}"))
        evidence = [json.loads(data) for member, data in quarantined if member.endswith(".sanitize.json")]
        carried = [(member, data) for member, data in quarantined if not member.endswith(".sanitize.json")]
        gone = {one["key"] for one in evidence}
        assert clean == [one for one in before if one[0].partition(".")[0] not in gone]
        assert carried == [one for one in before if one[0].partition(".")[0] in gone]
        payloads = dict(before)
        for one in evidence:
            key = one["key"]
            if one["status"] == "unreadable":
                assert one["reasons"][0]["member"] == "bad.right.png"
                continue
            removed.add(key)
            assert [reason["member"] for reason in one["reasons"]] == [f"{key}.right.png"]
            assert [picture["member"] for picture in one["pictures"]] == [
                member for member, _ in carried if member.startswith(key) and member.endswith(".png")
            ]
            for picture in one["pictures"]:
                assert picture["sha256"] == hashlib.sha256(payloads[picture["member"]]).hexdigest()
    assert removed == MARKED
    assert shards.manifest().counts == {"kept": 116, "quarantined": 4, "unreadable": 2}
    described = shards.read_json("dataset.json")
    assert sum(described["labels"].values()) == sum(one["samples"] for one in described["shards"].values()) == 116


def test_a_sample_is_put_back_whole_and_counts_once(
    home: Path, dataset: Dataset, selection: Selection, tmp_path: Path, read_tar: Make
) -> None:
    again = restore_samples(RestoreConfig(keys=("0004",), note="Ada"), selection, str(tmp_path / "again"), COMPUTE)
    counts = again.manifest().counts
    assert counts == {"samples": 122, "kept": 117, "quarantined": 3, "unreadable": 2, "restored": 1}
    assert sum(entry["removed"] for entry in again.read_json("selection.json")["classes"].values()) == 3
    out = write_selected(WriteConfig(), dataset, again, str(tmp_path / "out"), COMPUTE)
    clean = dict(read_tar(out.file("clean/a.tar")))
    assert {"0004.left.png", "0004.right.png", "0004.cls", "0004.txt"} <= clean.keys()
    assert not [name for name in clean if name.startswith("0001")]
    with pytest.raises(DataError, match="key 'bad' is not in quarantine"):
        restore_samples(RestoreConfig(keys=("bad",)), selection, str(tmp_path / "bad"), COMPUTE)


def test_hygiene_looks_at_every_picture_and_counts_samples(
    tmp_path: Path, make_tar: Make, make_png: Make, dataset: Dataset
) -> None:
    """Equal pictures within a sample are no finding; the sample goes whose second picture is in an earlier one."""
    picture = {i: make_png(i, size=(48, 64)) for i in range(40)}
    members = [(f"p{i:02}.{side}.png", picture[2 * i + k]) for i in range(20) for k, side in enumerate("lr")]
    members += [(f"q.{side}.png", make_png(99, size=(48, 64))) for side in "lmr"]
    members += [("r.l.png", make_png(98, size=(48, 64))), ("r.r.png", picture[7])]
    members += [("s.l.png", picture[8]), ("s.r.png", picture[9])]
    keys = dict.fromkeys(name.partition(".")[0] for name, _ in members)
    shard = make_tar(
        tmp_path / "x.tar",
        [one for key in keys for one in [*(m for m in members if m[0].startswith(f"{key}.")), (f"{key}.cls", b"0")]],
    )
    data = index_shards(ALL, shard, str(tmp_path / "index"), COMPUTE)
    hygiene = check_hygiene(HygieneConfig(), data, str(tmp_path / "hygiene"), COMPUTE)
    rows = hygiene.rows("x.tar").to_pylist()
    assert [(row["key"], row["kind"], row["other_position"]) for row in rows] == [
        ("r", "exact_duplicate", 7),
        ("s", "exact_duplicate", 8),
        ("s", "exact_duplicate", 9),
    ]
    found = hygiene.read_json("hygiene.json")
    assert (found["samples"], found["counts"]["exact_duplicate"]) == (23, 2)
    assert [(group["n"], len(group["members"])) for group in found["groups"]] == [(2, 2)] * 3
    assert removed_by(hygiene, data, tmp_path) == {"r", "s"}


def removed_by(hygiene: Hygiene, data: Dataset, out: Path) -> set[str]:
    """Keys of the samples that go for their findings alone."""
    scores = make_scores(out / "scores", data, lambda _shard, _row: 0.0)
    selection = select_samples(
        SelectConfig(), data, [scores], str(out / "selection"), COMPUTE, (), hygiene, ("exact_duplicate",)
    )
    entry = selection.read_json("selection.json")["classes"]["0"]
    assert entry["removed"] == entry["by_hygiene"] == 2
    return {row["key"] for row in verdicts(selection) if not row["keep"]}
