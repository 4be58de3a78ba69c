from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch

from sanitize.artifacts import Part, Recipe, make, verify
from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch, Embeddings, Scores, fixed_size_list, write_rows
from sanitize.embed import EMBEDDINGS
from sanitize.errors import ArtifactError, ConfigError, NumericsError
from sanitize.jobs.clean import CleanConfig
from sanitize.score import (
    LabelMarginConfig,
    NeighboursConfig,
    RCAConfig,
    RCAScorerConfig,
    RobustRealNVPConfig,
    RobustRealNVPScorerConfig,
    ScorerConfig,
    Spectral,
    SpectralConfig,
    ToxicDirectionConfig,
    fit_scorer,
    score_shards,
)
from sanitize.score.scorer import position_hashes
from sanitize.score.stage import EXAMPLES, examples_of
from sanitize.select import ContaminationRule, Rule

ALL_SCORERS: list[ScorerConfig] = [
    LabelMarginConfig(embedding="penultimate"),
    NeighboursConfig(embedding="penultimate", windows=1, k=5),
    RCAScorerConfig(embedding="penultimate", model=RCAConfig(epochs=2)),
    RobustRealNVPScorerConfig(embedding="penultimate", model=RobustRealNVPConfig(epochs=2)),
    SpectralConfig(),
    SpectralConfig(whiten="robust"),
    ToxicDirectionConfig(embedding="penultimate", label_check=None, evidence=None),
]


@pytest.fixture
def made_up(tmp_path: Path) -> Embeddings:
    """Three shards of 50 rows in two classes, with one embedding named `penultimate`."""

    def write_part(shard: str, part: Part) -> None:
        z_ND = torch.randn(50, 6, generator=torch.Generator().manual_seed(int(shard[0])))
        columns = {"position": pa.array(range(50), pa.int64()), "key": [f"{shard}-{i}" for i in range(50)]}
        columns |= {"label": pa.array([i % 2 for i in range(50)], pa.int64()), "penultimate": fixed_size_list(z_ND)}
        write_rows(part, shard, pa.table(columns))

    shards = [f"{i}.tar" for i in range(3)]
    return make(Embeddings, tmp_path / "embeddings", Recipe(stage="made-up"), parts=shards, write_part=write_part)


RULES, SCORERS = get_args(get_args(Rule)[0]), get_args(get_args(ScorerConfig)[0])


def is_accepted(call: Callable[[], Any]) -> bool:
    try:
        call()
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("config", ALL_SCORERS, ids=lambda config: config.kind)
def test_a_rule_is_refused_with_the_settings_exactly_where_it_cannot_judge_the_scores(
    tmp_path: Path, made_up: Embeddings, compute: Compute, config: ScorerConfig
) -> None:
    classes = fit_scorer(config, made_up, str(tmp_path / "fitted"), compute).info["classes"]
    statistics = {int(label): of_class for label, of_class in classes.items()}
    scores = {label: np.linspace(0, 1, 50, dtype=np.float32) for label in statistics}
    for kind in RULES:
        rule = kind(rate=0.1) if kind is ContaminationRule else kind()
        settings = {"shards": ["data"], "trusted": ["t"], "scorers": [{"kind": config.kind}], "select": {"rule": rule}}
        judges = is_accepted(partial(rule.build(), scores, statistics, np.zeros(100, np.float32)))
        assert is_accepted(partial(CleanConfig.model_validate, settings)) == judges, rule.kind


def test_every_scorer_is_among_those_that_are_tested() -> None:
    assert {type(config) for config in ALL_SCORERS} == set(SCORERS)


def test_an_embedding_that_does_not_exist_is_refused_with_the_settings(embeddings: Embeddings) -> None:
    assert set(embeddings.names) == set(EMBEDDINGS)
    for kind in SCORERS:
        name = kind.model_fields["kind"].default
        settings = {"shards": ["data"], "scorers": [{"kind": name, "embedding": "penultimat"}]}
        with pytest.raises(ConfigError, match=f"scorers: {name} reads embedding 'penultimat'; there are penultimate, "):
            CleanConfig.model_validate(settings)


@pytest.mark.parametrize("config", ALL_SCORERS, ids=lambda config: config.kind)
def test_scores_are_those_of_the_scorer_row_by_row(
    tmp_path: Path, made_up: Embeddings, compute: Compute, config: ScorerConfig
) -> None:
    fitted = fit_scorer(config, made_up, str(tmp_path / "fitted"), compute)
    scores = score_shards(config, fitted, made_up, str(tmp_path / "scores"), compute)
    assert scores.shards == made_up.shards
    scorer = config.build()
    scorer.fit(made_up.batches, compute)
    for shard in scores.shards:
        table = scores.rows(shard)
        (batch,) = made_up.batches(config.embedding, shards=[shard])
        assert table["score"].to_pylist() == scorer.score(batch).tolist()
        assert table["key"].to_pylist() == batch.keys
        assert table["label"].to_pylist() == batch.labels_B.tolist()
        assert table["position"].to_pylist() == batch.positions_B.tolist()
    info = scores.read_json("scorer.json")
    assert info["config"] == config.model_dump(mode="json")
    assert {int(label): values for label, values in info["classes"].items()} == scorer.statistics
    assert scores.manifest().counts == {"samples": 150}
    assert verify(Path(scores.path)) == verify(Path(fitted.path)) == []


def test_scoring_in_groups_gives_the_same_digest(tmp_path: Path, made_up: Embeddings, compute: Compute) -> None:
    config = SpectralConfig()
    fitted = fit_scorer(config, made_up, str(tmp_path / "fitted"), compute)
    whole = score_shards(config, fitted, made_up, str(tmp_path / "whole"), compute)
    for shards in (["2.tar", "0.tar"], ["1.tar"]):
        score_shards(config, fitted, made_up, str(tmp_path / "grouped"), compute, shards=shards)
    assert score_shards(config, fitted, made_up, str(tmp_path / "grouped"), compute).digest == whole.digest
    assert fit_scorer(config, made_up, str(tmp_path / "again"), compute).digest == fitted.digest


def test_another_seed_is_another_scorer_and_the_folder_says_so(
    tmp_path: Path, made_up: Embeddings, compute: Compute
) -> None:
    fit_scorer(SpectralConfig(), made_up, str(tmp_path / "fitted"), compute)
    with pytest.raises(ArtifactError, match=r"numerics\.seed was 0 and is now 1"):
        fit_scorer(SpectralConfig(), made_up, str(tmp_path / "fitted"), Compute(device="cpu", seed=1))
    with pytest.raises(ArtifactError, match=r"config\.n_directions was 1 and is now 2"):
        fit_scorer(SpectralConfig(n_directions=2), made_up, str(tmp_path / "fitted"), compute)


def test_a_score_that_is_not_finite_names_shard_and_key(
    tmp_path: Path, made_up: Embeddings, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SpectralConfig()
    fitted = fit_scorer(config, made_up, str(tmp_path / "fitted"), compute)
    real: Callable[[Spectral, EmbeddingBatch], torch.Tensor] = Spectral.score

    def broken(self: Spectral, batch: EmbeddingBatch) -> torch.Tensor:
        scores_B = real(self, batch)
        if batch.shard == "1.tar":
            scores_B[7] = float("nan")
        return scores_B

    monkeypatch.setattr(Spectral, "score", broken)
    with pytest.raises(NumericsError, match=r"1\.tar, key 1\.tar-7"):
        score_shards(config, fitted, made_up, str(tmp_path / "scores"), compute)
    assert not (tmp_path / "scores").exists()


def test_an_embedding_that_is_not_there_is_a_config_error(
    tmp_path: Path, made_up: Embeddings, compute: Compute
) -> None:
    with pytest.raises(ConfigError, match="no embedding 'pooled'"):
        fit_scorer(SpectralConfig(embedding="pooled"), made_up, str(tmp_path / "fitted"), compute)


@pytest.mark.parametrize(
    "other",
    [SpectralConfig(n_directions=2), ToxicDirectionConfig(embedding="penultimate", label_check=None, evidence=None)],
)
def test_scoring_with_another_config_than_the_one_fitted_is_a_config_error(
    tmp_path: Path, made_up: Embeddings, compute: Compute, other
) -> None:  # type: ignore[no-untyped-def]
    fitted = fit_scorer(SpectralConfig(), made_up, str(tmp_path / "fitted"), compute)
    with pytest.raises(ConfigError, match="fitted with"):
        score_shards(other, fitted, made_up, str(tmp_path / "scores"), compute)


def test_the_digits_are_scored_whole(scores: Scores, embeddings: Embeddings) -> None:
    def keys(rows: Iterator[pa.Table]) -> list[str]:
        return [key for table in rows for key in table["key"].to_pylist()]

    assert keys(scores.rows(s) for s in scores.shards) == keys(embeddings.rows(s) for s in embeddings.shards)


def test_several_embeddings_come_side_by_side(embeddings: Embeddings) -> None:
    names = ("pooled", "gradients", "logits")
    shard = embeddings.shards[0]
    (batch,) = embeddings.batches(names, shards=[shard])
    table = embeddings.rows(shard, names)
    columns = [torch.tensor(table[name].to_pylist()) for name in names]
    assert batch.widths == tuple(x_BD.shape[1] for x_BD in columns)
    assert torch.equal(batch.z_BD, torch.cat(columns, 1))
    (one,) = embeddings.batches("pooled", shards=[shard])
    assert one.widths == ()
    assert torch.equal(one.z_BD, columns[0])
    assert "logits" not in embeddings.names
    with pytest.raises(ConfigError, match="no embedding 'logits'"):
        list(embeddings.batches("logits"))
    with pytest.raises(ConfigError, match="no embedding 'block0'"):
        list(embeddings.batches(("pooled", "block0")))


def test_examples_of_groups_are_their_members_in_few_shards(made_up: Embeddings) -> None:
    """Whatever the order of members and shards; a small group is there in full."""
    places = {
        value: (shard, position)
        for shard in made_up.shards
        for position, value in enumerate(position_hashes(shard, range(50), 3))
    }
    large, small, spread = list(places)[::2], list(places)[-3:], list(places)[10::25]
    groups = [large, small, [], spread, large[5:]]
    found = examples_of(groups, made_up, made_up.shards, 3)
    assert [len(some) for some in found] == [EXAMPLES, 3, 0, 6, EXAMPLES]
    for group, some in zip(groups, found, strict=True):
        named = [(one["shard"], one["position"]) for one in some]
        assert set(named) <= {places[value] for value in group}
        assert len(set(named)) == len(named)
    assert {one["shard"] for one in found[0]} == {one["shard"] for one in found[4]}
    assert len({one["shard"] for one in found[0]}) == 1
    assert examples_of([group[::-1] for group in groups], made_up, made_up.shards[::-1], 3) == found
    assert examples_of(groups, made_up, made_up.shards, 4) == [[]] * 5  # of another seed
