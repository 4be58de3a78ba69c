"""Judging by a reference: sample by sample, whatever else is in the batch."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.sources import fingerprint_shards
from sanitize.data.tables import Scores
from sanitize.embed import EmbedConfig, embed_shards
from sanitize.errors import ArtifactError, ConfigError
from sanitize.models.checkpoint import Checkpoint
from sanitize.score import FittedScorer, NeighboursConfig, SpectralConfig, fit_scorer, score_shards
from sanitize.select import ContaminationRule, JudgeConfig, SelectConfig, judge_shards
from sanitize.select.judge import conformal_threshold
from sanitize.select.rules import n_at_least

FLOATS = st.lists(st.integers(-5, 5), min_size=1, max_size=60).map(lambda values: np.array(values, np.float32))
SCORERS = (SpectralConfig(), NeighboursConfig(k=5))
RULE = SelectConfig(rule=ContaminationRule(rate=0.02))


@given(FLOATS, FLOATS, st.floats(0.01, 0.4))
def test_above_the_threshold_a_conformal_p_value_is_at_most_the_level(
    known: np.ndarray, new: np.ndarray, level: float
) -> None:
    p = (1 + n_at_least(np.sort(known), new)) / (1 + len(known))
    threshold = conformal_threshold(known, known, level)
    assert np.array_equal(new > threshold, p <= level * (1 + 1e-12))


def test_a_class_with_too_few_rows_is_compared_with_all() -> None:
    few, all_N = np.arange(5, dtype=np.float32), np.arange(1_000, dtype=np.float32)
    assert conformal_threshold(few, all_N, 0.01) == 990
    assert conformal_threshold(few, all_N, 0.2) == 4
    assert conformal_threshold(few, few, 0.01) == np.inf
    assert conformal_threshold(few, all_N, None) == np.inf


def test_clean_samples_are_flagged_at_the_rate_of_the_level() -> None:
    rng = np.random.default_rng(0)
    flagged = []
    for _ in range(300):
        threshold = conformal_threshold(rng.standard_normal(100), rng.standard_normal(100), 0.05)
        flagged.append(np.mean(rng.standard_normal(100) > threshold))
    assert np.mean(flagged) == pytest.approx(5 / 101, abs=0.006)


@pytest.fixture(scope="module")
def fitted(
    tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, embeddings, compute: Compute
) -> tuple[Path, list[FittedScorer], list[Scores], str]:
    """Scorers fitted on three shards, and what they say of all four; the last is held out."""
    folder, trusted = tmp_path_factory.mktemp("judge"), dataset.shards[-1]
    fitted, scores = [], []
    for config in SCORERS:
        out = str(folder / config.kind)
        fitted.append(fit_scorer(config, embeddings, out, compute, exclude=[trusted]))
        scores.append(score_shards(config, fitted[-1], embeddings, f"{out}-scores", compute))
    return folder, fitted, scores, trusted


def judged(
    fitted, checkpoint: Checkpoint, shards: list[str], folder: Path, compute: Compute, config: JudgeConfig
) -> dict[tuple[str, int], tuple[str, tuple[str, ...]]]:
    _, scorers, reference, trusted = fitted
    places = {f"{Path(shard).stem}-0123.tar": shard for shard in shards}
    dataset = index_shards(IndexConfig(n_classes=10), fingerprint_shards(places), str(folder / "index"), compute)
    embeddings = embed_shards(EmbedConfig(batch_size=64), dataset, checkpoint, str(folder / "embeddings"), compute)
    scores = [
        score_shards(settings, scorer, embeddings, str(folder / settings.kind), compute)
        for settings, scorer in zip(SCORERS, scorers, strict=True)
    ]
    inputs = config, dataset, scores, reference
    selection = judge_shards(*inputs, str(folder / "selection"), compute, trusted=[trusted])
    info = selection.read_json("selection.json")
    assert sum(c["removed"] for c in info["classes"].values()) == selection.manifest().counts["quarantined"]
    return {
        (shard, row["position"]): (row["status"], tuple(reason["reason"] for reason in row["reasons"]))
        for shard in selection.shards
        for row in selection.rows(shard).to_pylist()
    }


def test_verdicts_do_not_depend_on_what_else_is_in_the_batch(
    fitted, checkpoint: Checkpoint, digits: Digits, tmp_path: Path, compute: Compute
) -> None:
    shards, config = digits.shards()[6:10], JudgeConfig(select=RULE, level=0.01)
    together = judged(fitted, checkpoint, shards, tmp_path / "all", compute, config)
    apart = {}
    for i in (0, 2):
        apart |= judged(fitted, checkpoint, shards[i : i + 2], tmp_path / str(i), compute, config)
    assert apart == together
    statuses = [status for status, _ in together.values()]
    assert 0 < statuses.count("quarantined") < 0.2 * len(statuses)


def test_without_rule_and_level_nothing_is_removed(
    fitted, checkpoint: Checkpoint, digits: Digits, tmp_path: Path, compute: Compute
) -> None:
    found = judged(fitted, checkpoint, digits.shards()[6:7], tmp_path, compute, JudgeConfig(level=None))
    assert {status for status, _ in found.values()} == {"kept"}


def test_what_rests_on_the_whole_batch_or_on_other_scorers_is_refused(
    fitted, dataset: Dataset, scores: Scores, tmp_path: Path, compute: Compute
) -> None:
    _, _, reference, trusted = fitted
    combined = JudgeConfig(select=SelectConfig(verdict="combined"))
    with pytest.raises(ConfigError, match="what becomes of a sample depends on its batch"):
        judge_shards(combined, dataset, reference, reference, str(tmp_path / "a"), compute)
    with pytest.raises(ArtifactError, match="by the scorers of the reference"):
        judge_shards(JudgeConfig(), dataset, [scores], reference[:1], str(tmp_path / "b"), compute, [trusted])
