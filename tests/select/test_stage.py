import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sanitize.artifacts import Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Scores, Selection, write_rows
from sanitize.errors import ConfigError
from sanitize.select import ContaminationRule, FDRRule, SelectConfig, SeparationRule, select_samples


@pytest.fixture
def mixed(tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], compute: Compute) -> Dataset:
    """Two shards of 40 samples in two classes, one shard with nothing usable, six unreadable samples in all."""
    make_tar(tmp_path / "in/a.tar", [*good(20, "a"), ("x.cls", b"0"), ("y.cls", b"9"), *good(20, "b")])
    make_tar(tmp_path / "in/b.tar", [("z.cls", b"0"), *good(40, "c")])
    make_tar(tmp_path / "in/empty.tar", [(f"e{i}.cls", b"0") for i in range(3)])
    return index_shards(IndexConfig(max_bad_fraction=0.5), str(tmp_path / "in"), str(tmp_path / "index"), compute)


def make_scores(
    out: Path, dataset: Dataset, score: Callable[[str, dict], float], classes: dict | None = None, kind: str = "made-up"
) -> Scores:
    """Scores of the usable samples by a function of shard and row."""

    def write(part: Part) -> None:
        for shard in dataset.shards:
            rows = [row for row in dataset.rows(shard).to_pylist() if row["status"] == "ok"]
            if rows:
                columns = {name: [row[name] for row in rows] for name in ("position", "key", "label")}
                columns["score"] = pa.array([score(shard, row) for row in rows], pa.float32())
                write_rows(part, shard, pa.table(columns))
        statistics = classes or {"0": {"top_variance": 1.0}, "1": {"top_variance": 1.0}}
        part.write_json("scorer.json", {"config": {"kind": kind}, "classes": statistics})

    return make(Scores, out, Recipe(stage="made-up", config={"out": out.name}), write)


def verdicts(selection: Selection) -> list[dict]:
    return [row | {"shard": shard} for shard in selection.shards for row in selection.rows(shard).to_pylist()]


def by_position(shard: str, row: dict) -> float:
    return row["position"] + (0.5 if shard == "b.tar" else 0)


def test_every_sample_gets_one_verdict_in_the_order_of_the_index(
    tmp_path: Path, mixed: Dataset, compute: Compute
) -> None:
    scores = make_scores(tmp_path / "scores", mixed, by_position)
    config = SelectConfig(rule=ContaminationRule(rate=0.1, factor=1))
    selection = select_samples(config, mixed, scores, str(tmp_path / "out"), compute)
    rows = verdicts(selection)
    index = [row for shard in mixed.shards for row in mixed.rows(shard).to_pylist()]
    assert [(row["position"], row["key"], row["label"]) for row in rows] == [
        (row["position"], row["key"], row["label"]) for row in index
    ]
    counts = selection.manifest().counts
    assert counts == {"samples": 86, "kept": 72, "quarantined": 8, "unreadable": 6}
    for row, of_index in zip(rows, index, strict=True):
        assert row["keep"] == (row["status"] == "kept")
        assert bool(row["reasons"]) != row["keep"]
        if of_index["status"] != "ok":
            assert row["status"] == "unreadable"
            assert row["reasons"][0]["stage"] == "index"
            assert row["reasons"][0]["reason"] == of_index["reason"]


def test_the_highest_of_each_class_go_wherever_they_are(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    scores = make_scores(tmp_path / "scores", mixed, by_position)
    config = SelectConfig(rule=ContaminationRule(rate=0.1, factor=1))
    selection = select_samples(config, mixed, scores, str(tmp_path / "out"), compute)
    rows = [row for row in verdicts(selection) if row["status"] != "unreadable"]
    for label in (0, 1):
        of_class = sorted((by_position(row["shard"], row), row["status"]) for row in rows if row["label"] == label)
        assert [status for _, status in of_class] == ["kept"] * 36 + ["quarantined"] * 4
        info = selection.read_json("selection.json")["classes"][str(label)]
        assert (info["n"], info["removed"], info["capped"]) == (40, 4, False)
        assert info["threshold"] == of_class[35][0]
    reason = next(row for row in rows if not row["keep"])["reasons"]
    assert len(reason) == 1
    assert reason[0]["score"] > reason[0]["threshold"]
    assert reason[0]["stage"] == "made-up"
    assert f"{reason[0]['score']:.4g}" in reason[0]["reason"]


@pytest.mark.parametrize(("cap", "removed"), [(0.1, 4), (0.0, 0), (1.0, 40)])
def test_no_class_loses_more_than_the_cap(
    tmp_path: Path, mixed: Dataset, compute: Compute, cap: float, removed: int
) -> None:
    classes = {"0": {"separation": 99.0, "n": 40}, "1": {"separation": 0.0, "n": 40}}
    scores = make_scores(tmp_path / "scores", mixed, lambda s, r: 1 + by_position(s, r), classes)
    config = SelectConfig(rule=SeparationRule(), max_removed_fraction=cap)
    selection = select_samples(config, mixed, scores, str(tmp_path / "out"), compute)
    rows = verdicts(selection)
    assert sum(row["status"] == "quarantined" and row["label"] == 0 for row in rows) == removed
    assert not any(row["status"] == "quarantined" and row["label"] == 1 for row in rows)
    info = selection.read_json("selection.json")["classes"]
    assert info["0"]["removed"] == removed
    assert info["0"]["capped"] == (cap < 1)
    assert (info["1"]["removed"], info["1"]["capped"], info["1"]["threshold"]) == (0, False, None)
    if removed:
        reason = next(row for row in rows if row["status"] == "quarantined")["reasons"][0]["reason"]
        assert "99.0 standard deviations" in reason


def test_a_rule_that_takes_a_whole_class_counts_what_it_takes(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    scores = make_scores(tmp_path / "scores", mixed, by_position)
    config = SelectConfig(rule=ContaminationRule(rate=0.5, factor=3), max_removed_fraction=1)
    selection = select_samples(config, mixed, scores, str(tmp_path / "out"), compute)
    counts = selection.manifest().counts
    removed = sum(info["removed"] for info in selection.read_json("selection.json")["classes"].values())
    assert removed == counts["quarantined"] == 80


def test_p_values_are_those_of_the_rule(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    rng = np.random.default_rng(0)

    def score(shard: str, row: dict) -> float:
        planted = shard == "b.tar" and row["label"] == 1 and row["position"] <= 20  # ten of the 40 in class 1
        return float(rng.normal()) + (50.0 + row["position"]) * planted

    scores = make_scores(tmp_path / "scores", mixed, score)
    rule = FDRRule(q=0.2)
    selection = select_samples(SelectConfig(rule=rule), mixed, scores, str(tmp_path / "out"), compute)
    rows = [row for row in verdicts(selection) if row["status"] == "quarantined"]
    assert len(rows) == 10
    of_class: dict[int, list] = {0: [], 1: []}
    for shard in scores.shards:
        for row in scores.rows(shard).to_pylist():
            of_class[row["label"]].append((row["score"], shard, row["position"]))
    arrays = {y: np.array([s for s, *_ in values], np.float32) for y, values in of_class.items()}
    for row in rows:
        at = [(shard, p) for _, shard, p in of_class[row["label"]]].index((row["shard"], row["position"]))
        assert row["reasons"][0]["p_value"] == rule.p_values(arrays, row["label"])[at]


def test_the_verdicts_do_not_depend_on_how_the_work_was_interrupted(
    tmp_path: Path, mixed: Dataset, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sanitize.select.stage as stage

    scores = make_scores(tmp_path / "scores", mixed, by_position)
    config = SelectConfig(rule=ContaminationRule(rate=0.1))
    whole = select_samples(config, mixed, scores, str(tmp_path / "whole"), compute)
    real = stage._verdicts

    def interrupted(dataset: Dataset, of: Scores, shard: str, *more: dict) -> list[dict]:
        if shard == "b.tar":
            raise KeyboardInterrupt
        return real(dataset, of, shard, *more)

    monkeypatch.setattr(stage, "_verdicts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        select_samples(config, mixed, scores, str(tmp_path / "again"), compute)
    monkeypatch.setattr(stage, "_verdicts", real)
    assert select_samples(config, mixed, scores, str(tmp_path / "again"), compute).digest == whole.digest


def test_the_default_rule_refuses_scores_without_a_separation(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    scores = make_scores(tmp_path / "scores", mixed, by_position)
    with pytest.raises(ConfigError, match="toxic_direction"):
        select_samples(SelectConfig(), mixed, scores, str(tmp_path / "out"), compute)
    assert not (tmp_path / "out").exists()


def test_selection_json_is_plain_json(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    scores = make_scores(tmp_path / "scores", mixed, by_position)
    config = SelectConfig(rule=ContaminationRule(rate=0.5, factor=9), max_removed_fraction=1)
    selection = select_samples(config, mixed, scores, str(tmp_path / "out"), compute)

    text = selection.file("selection.json").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    thresholds = [of_class["threshold"] for of_class in json.loads(text)["classes"].values()]
    assert thresholds == [float(np.finfo(np.float32).min)] * 2
