import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest

from sanitize.artifacts import Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Scores, Selection, write_rows
from sanitize.errors import ArtifactError, ConfigError
from sanitize.score import RCAScorerConfig, ScorerConfig, SpectralConfig, ToxicDirectionConfig
from sanitize.score.scorer import BaseScorerConfig
from sanitize.select import (
    ConformalRule,
    ContaminationRule,
    FDRRule,
    SelectConfig,
    SeparationRule,
    select_samples,
    trusted_shards,
)
from sanitize.select.rules import benjamini_hochberg, cauchy_combination


@pytest.fixture
def mixed(tmp_path: Path, make_tar: Callable[..., str], good: Callable[..., list], compute: Compute) -> Dataset:
    """Two shards of 40 samples in two classes, one shard with nothing usable, six unreadable samples in all."""
    make_tar(tmp_path / "in/a.tar", [*good(20, "a"), ("x.cls", b"0"), ("y.cls", b"9"), *good(20, "b")])
    make_tar(tmp_path / "in/b.tar", [("z.cls", b"0"), *good(40, "c")])
    make_tar(tmp_path / "in/empty.tar", [(f"e{i}.cls", b"0") for i in range(3)])
    return index_shards(IndexConfig(max_bad_fraction=0.5), str(tmp_path / "in"), str(tmp_path / "index"), compute)


def make_scores(
    out: Path,
    dataset: Dataset,
    score: Callable[[str, dict], float],
    classes: dict | None = None,
    kind: str = "made-up",
    exclude: tuple[str, ...] = (),
    rule: Any = "fdr",
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
        info = {"config": {"kind": kind}, "rule": rule, "classes": statistics, "exclude": exclude}
        part.write_json("scorer.json", info)

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
    selection = select_samples(config, mixed, [scores], str(tmp_path / "out"), compute)
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
    selection = select_samples(config, mixed, [scores], str(tmp_path / "out"), compute)
    rows = [row for row in verdicts(selection) if row["status"] != "unreadable"]
    for label in (0, 1):
        of_class = sorted((by_position(row["shard"], row), row["status"]) for row in rows if row["label"] == label)
        assert [status for _, status in of_class] == ["kept"] * 36 + ["quarantined"] * 4
        info = selection.read_json("selection.json")["classes"][str(label)]
        assert (info["n"], info["removed"], info["capped"]) == (40, 4, False)
        assert info["scorers"]["made-up"]["threshold"] == of_class[35][0]
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
    selection = select_samples(config, mixed, [scores], str(tmp_path / "out"), compute)
    rows = verdicts(selection)
    assert sum(row["status"] == "quarantined" and row["label"] == 0 for row in rows) == removed
    assert not any(row["status"] == "quarantined" and row["label"] == 1 for row in rows)
    info = selection.read_json("selection.json")["classes"]
    assert info["0"]["removed"] == removed
    assert info["0"]["capped"] == (cap < 1)
    assert (info["1"]["removed"], info["1"]["capped"]) == (0, False)
    assert info["1"]["scorers"]["made-up"]["threshold"] is None
    if removed:
        reason = next(row for row in rows if row["status"] == "quarantined")["reasons"][0]["reason"]
        assert "99.0 standard deviations" in reason


def test_a_rule_that_takes_a_whole_class_counts_what_it_takes(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    scores = make_scores(tmp_path / "scores", mixed, by_position)
    config = SelectConfig(rule=ContaminationRule(rate=0.5, factor=3), max_removed_fraction=1)
    selection = select_samples(config, mixed, [scores], str(tmp_path / "out"), compute)
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
    selection = select_samples(SelectConfig(rule=rule), mixed, [scores], str(tmp_path / "out"), compute)
    rows = [row for row in verdicts(selection) if row["status"] == "quarantined"]
    assert len(rows) == 10
    of_class: dict[int, list] = {0: [], 1: []}
    for shard in scores.shards:
        for row in scores.rows(shard).to_pylist():
            of_class[row["label"]].append((row["score"], shard, row["position"]))
    arrays = {y: np.array([s for s, *_ in values], np.float32) for y, values in of_class.items()}
    for row in rows:
        at = [(shard, p) for _, shard, p in of_class[row["label"]]].index((row["shard"], row["position"]))
        assert row["reasons"][0]["p_value"] == rule.build()(arrays, {}).p_values[row["label"]][at]


def test_the_verdicts_do_not_depend_on_how_the_work_was_interrupted(
    tmp_path: Path, mixed: Dataset, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sanitize.select.stage as stage

    scores = make_scores(tmp_path / "scores", mixed, by_position)
    config = SelectConfig(rule=ContaminationRule(rate=0.1))
    whole = select_samples(config, mixed, [scores], str(tmp_path / "whole"), compute)
    real = stage.verdicts_of_shard

    def interrupted(dataset: Dataset, of: Scores, shard: str, *more: dict) -> list[dict]:
        if shard == "b.tar":
            raise KeyboardInterrupt
        return real(dataset, of, shard, *more)

    monkeypatch.setattr(stage, "verdicts_of_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        select_samples(config, mixed, [scores], str(tmp_path / "again"), compute)
    monkeypatch.setattr(stage, "verdicts_of_shard", real)
    assert select_samples(config, mixed, [scores], str(tmp_path / "again"), compute).digest == whole.digest


def test_rule_separation_refuses_scores_without_a_separation(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    scores = make_scores(tmp_path / "scores", mixed, by_position)
    with pytest.raises(ConfigError, match="toxic_direction"):
        select_samples(SelectConfig(rule=SeparationRule()), mixed, [scores], str(tmp_path / "out"), compute)
    assert not (tmp_path / "out").exists()


def test_selection_json_is_plain_json(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    scores = make_scores(tmp_path / "scores", mixed, by_position)
    config = SelectConfig(rule=ContaminationRule(rate=0.5, factor=9), max_removed_fraction=1)
    selection = select_samples(config, mixed, [scores], str(tmp_path / "out"), compute)

    text = selection.file("selection.json").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    thresholds = [of_class["scorers"]["made-up"]["threshold"] for of_class in json.loads(text)["classes"].values()]
    assert thresholds == [float(np.finfo(np.float32).min)] * 2


# --- several scorers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "n_flags"), [("any", 1), ("majority", 2), ("all", 3)])
def test_so_many_flags_make_a_verdict_and_all_reasons_are_kept(
    tmp_path: Path, mixed: Dataset, compute: Compute, verdict: str, n_flags: int
) -> None:
    """Against the verdicts of each scorer alone."""
    rates = {"a": 0.3, "b": 0.2, "c": 0.1}
    scores = [
        make_scores(
            tmp_path / kind,
            mixed,
            lambda s, r, k=i: (r["position"] * (7 + 4 * k)) % 41 + by_position(s, r) / 100,
            kind=kind,
        )
        for i, kind in enumerate(rates)
    ]
    rules = {kind: ContaminationRule(rate=rate, factor=1) for kind, rate in rates.items()}
    alone = [
        verdicts(select_samples(SelectConfig(rule=rules[kind]), mixed, [one], str(tmp_path / f"{kind}-alone"), compute))
        for kind, one in zip(rules, scores, strict=True)
    ]
    config = SelectConfig(rules=rules, verdict=verdict)
    together = select_samples(config, mixed, scores, str(tmp_path / "out"), compute)
    seen = set()
    for row, *by_scorer in zip(verdicts(together), *alone, strict=True):
        if row["status"] == "unreadable":
            continue
        reasons = [reason for verdict in by_scorer for reason in verdict["reasons"]]
        assert row["reasons"] == reasons
        assert row["keep"] == (len(reasons) < n_flags)
        seen.add(len(reasons))
    assert seen >= {0, 1, 2}
    info = together.read_json("selection.json")
    assert info["verdict"] == verdict
    assert info["rules"] == {kind: rule.model_dump(mode="json") for kind, rule in rules.items()}
    for label, of_class in info["classes"].items():
        flagged = {kind: by["flagged"] for kind, by in of_class["scorers"].items()}
        assert flagged == {"a": 12, "b": 8, "c": 4}
        assert of_class["removed"] == sum(
            r["status"] == "quarantined" for r in verdicts(together) if r["label"] == int(label)
        )


def test_each_scorer_has_a_rule(compute: Compute) -> None:
    fdr = FDRRule(q=0.01)
    config = SelectConfig(rules={"rca": fdr})
    own = {scorer.kind: scorer.rule for scorer in (ToxicDirectionConfig(), RCAScorerConfig(), SpectralConfig())}
    assert config.rules_of(own) == {
        "toxic_direction": SeparationRule(),
        "rca": fdr,
        "spectral": FDRRule(),
    }
    for_all = SelectConfig(rules={"rca": fdr}, rule=ContaminationRule(rate=0.1))
    assert for_all.rules_of({"spectral": "fdr", "rca": None}) == {"spectral": ContaminationRule(rate=0.1), "rca": fdr}
    with pytest.raises(ConfigError, match=r"names rca, but the scorers are spectral"):
        config.rules_of({"spectral": "fdr"})
    with pytest.raises(ConfigError, match=r"'separation' of toxic_direction gives none"):
        SelectConfig(verdict="combined").rules_of(own)


@pytest.mark.parametrize("config", get_args(get_args(ScorerConfig)[0]), ids=lambda config: config.__name__)
def test_the_rule_of_every_scorer_has_defaults(config: type[BaseScorerConfig]) -> None:
    (rule,) = SelectConfig().rules_of({"scorer": config.rule}).values()
    assert rule.kind == config.rule
    assert not rule.needs_trusted  # a run without settings has no trusted shards


@pytest.mark.parametrize("own", [None, "unknown", ["fdr"], "contamination"])
def test_scores_that_name_no_rule_need_one_in_the_settings(
    tmp_path: Path, mixed: Dataset, compute: Compute, own: Any
) -> None:
    scores = make_scores(tmp_path / "scores", mixed, by_position, rule=own)
    with pytest.raises(ConfigError, match=r"made-up name no default rule.* select\.rules: \{made-up: \{kind: fdr\}\}"):
        select_samples(SelectConfig(), mixed, [scores], str(tmp_path / "out"), compute)
    given = SelectConfig(rules={"made-up": FDRRule()})
    assert select_samples(given, mixed, [scores], str(tmp_path / "out"), compute).manifest().counts["samples"]


def noise_and(planted: Callable[[str, dict], float], seed: int) -> Callable[[str, dict], float]:
    rng = np.random.default_rng(seed)
    return lambda shard, row: float(rng.normal()) + planted(shard, row)


def planted(shard: str, row: dict) -> float:
    return 8 * (shard == "b.tar" and row["label"] == 1 and row["position"] <= 20)  # ten of the 40 in class 1


def test_combined_p_values_decide_over_all_samples_at_once(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    scores = [make_scores(tmp_path / k, mixed, noise_and(planted, s), kind=k) for s, k in enumerate(("one", "two"))]
    config = SelectConfig(rule=FDRRule(), q=0.3, verdict="combined")
    together = select_samples(config, mixed, scores, str(tmp_path / "out"), compute)
    removed = [row for row in verdicts(together) if row["status"] == "quarantined"]
    assert sum(planted(row["shard"], row) > 0 for row in removed) == 10
    arrays: list[dict[int, np.ndarray]] = []
    for one in scores:
        table = pa.concat_tables([one.rows(shard) for shard in one.shards])
        labels_N, scores_N = table["label"].to_numpy(), table["score"].to_numpy()
        arrays.append({y: scores_N[labels_N == y] for y in (0, 1)})
    p = [FDRRule().build()(by_class, {}).p_values for by_class in arrays]
    combined_N = np.concatenate([cauchy_combination(np.stack([p[0][y], p[1][y]])) for y in (0, 1)])
    n_rejected = benjamini_hochberg(combined_N, 0.3)
    p_values = sorted(row["reasons"][0]["p_value"] for row in removed)
    np.testing.assert_allclose(p_values, np.sort(combined_N)[:n_rejected])
    for row in removed:
        assert row["reasons"][0]["stage"] == "combined"
        assert "one " in row["reasons"][0]["reason"]
        assert "two " in row["reasons"][0]["reason"]


def test_the_cap_holds_for_combined_verdicts_too(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    scores = [make_scores(tmp_path / k, mixed, noise_and(planted, i), kind=k) for i, k in enumerate("ab")]
    config = SelectConfig(rule=FDRRule(), q=0.3, verdict="combined", max_removed_fraction=0.1)
    info = select_samples(config, mixed, scores, str(tmp_path / "out"), compute).read_json("selection.json")["classes"]
    # All ten have the smallest p-value there is, and ties are kept together.
    assert (info["1"]["removed"], info["1"]["capped"]) == (0, True)
    assert not info["0"]["capped"]


def test_scores_that_do_not_belong_together_are_refused(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    one, same = (make_scores(tmp_path / name, mixed, by_position, kind="one") for name in "ab")
    with pytest.raises(ConfigError, match="one kind"):
        select_samples(SelectConfig(), mixed, [one, same], str(tmp_path / "out"), compute)

    def write(part: Part) -> None:
        for shard in one.shards:
            write_rows(part, shard, one.rows(shard).slice(1))
        part.write_json("scorer.json", {"config": {"kind": "two"}, "rule": "fdr", "classes": {}})

    fewer = make(Scores, tmp_path / "c", Recipe(stage="made-up"), write)
    with pytest.raises(ArtifactError, match=r"same samples of shard a\.tar"):
        select_samples(SelectConfig(), mixed, [one, fewer], str(tmp_path / "out"), compute)
    with pytest.raises(ArtifactError, match=r"shard a\.tar do not belong"):
        select_samples(SelectConfig(), mixed, [fewer], str(tmp_path / "out"), compute)


# --- trusted shards ---------------------------------------------------------------------------------------------


def test_trusted_samples_are_compared_with_and_never_removed(tmp_path: Path, mixed: Dataset, compute: Compute) -> None:
    trusted = ("a.tar",)

    def score(shard: str, row: dict) -> float:
        return row["position"] if shard == "a.tar" else 1000 - row["position"]

    scores = make_scores(tmp_path / "scores", mixed, score, exclude=trusted)
    config = SelectConfig(rule=ConformalRule(q=0.2), max_removed_fraction=1)
    selection = select_samples(config, mixed, [scores], str(tmp_path / "out"), compute, trusted=trusted)
    for row in verdicts(selection):
        if row["status"] != "unreadable":
            assert row["keep"] == (row["shard"] == "a.tar")
    reason = next(row for row in verdicts(selection) if row["status"] == "quarantined")["reasons"][0]
    assert reason["p_value"] == pytest.approx(1 / 41)
    info = selection.read_json("selection.json")
    assert info["trusted"] == ["a.tar"]
    assert [(c["n"], c["removed"]) for c in info["classes"].values()] == [(20, 20), (20, 20)]
    config = SelectConfig(rule=ContaminationRule(rate=0.5, factor=2), max_removed_fraction=1)  # other rules as well
    other = select_samples(config, mixed, [scores], str(tmp_path / "other"), compute, trusted=trusted)
    assert [row["status"] for row in verdicts(other)] == [row["status"] for row in verdicts(selection)]


def test_a_scorer_that_was_fitted_on_trusted_shards_is_refused(
    tmp_path: Path, mixed: Dataset, compute: Compute
) -> None:
    scores = make_scores(tmp_path / "scores", mixed, by_position)
    with pytest.raises(ConfigError, match="fitted on trusted shards"):
        select_samples(SelectConfig(), mixed, [scores], str(tmp_path / "out"), compute, trusted=["a.tar"])


def test_trusted_shards_are_named_by_name_place_or_glob() -> None:
    shards = {"a.tar": "/data/a.tar", "b.tar": "/data/b.tar", "c/d.tar": "/data/c/d.tar"}
    assert trusted_shards([], shards) == ()
    assert trusted_shards(["b.tar"], shards) == ("b.tar",)
    assert trusted_shards(["/data/c/*", "a.*"], shards) == ("a.tar", "c/d.tar")
    with pytest.raises(ConfigError, match=r"'x\*' names none of 3 shards \(such as 'a.tar'\)"):
        trusted_shards(["a.tar", "x*"], shards)
    with pytest.raises(ConfigError, match="nothing left to judge"):
        trusted_shards(["*"], shards)
