"""Statistics merge: those of all shards are the merged statistics of some."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sanitize.artifacts import Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Embeddings, Selection, write_rows
from sanitize.drift import (
    DriftConfig,
    Projection,
    Statistics,
    StatisticsConfig,
    check_drift,
    fit_projection,
    merge_statistics,
    summarise_shards,
)
from sanitize.drift.statistics import CALIBRATE, FIT, bottom_k
from sanitize.embed import EmbedConfig, embed_shards
from sanitize.errors import ArtifactError, ConfigError
from sanitize.models.checkpoint import Checkpoint

ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=40)
CONFIG = StatisticsConfig(per_class=20)


def table(rows: list[tuple[int, int]]) -> pa.Table:
    labels, hashes = ([row[i] for row in rows] for i in (0, 1))
    return pa.table({"label": pa.array(labels, pa.int64()), "hash": pa.array(hashes, pa.uint64())})


@given(ROWS, ROWS, st.integers(1, 6))
def test_the_sample_of_a_union_is_the_sample_of_the_samples(
    first: list[tuple[int, int]], second: list[tuple[int, int]], k: int
) -> None:
    whole = bottom_k(table(first + second), k)
    parts = [bottom_k(table(rows), k) for rows in (second, first)]
    assert bottom_k(pa.concat_tables(parts), k).equals(whole)
    assert bottom_k(whole, k).equals(whole)
    wanted = [(y, h) for y in range(4) for h in sorted({h for label, h in first + second if label == y})[:k]]
    assert list(zip(*whole.to_pydict().values(), strict=True)) == wanted


class Made:
    """Shards as `summarise_shards` gets them; every seventh sample was removed."""

    def __init__(self, folder: Path, shards: list[str], checkpoint: Checkpoint, compute: Compute) -> None:
        self.dataset = index_shards(IndexConfig(n_classes=10), shards, str(folder / "index"), compute)
        embed = EmbedConfig(batch_size=64)
        self.embeddings = embed_shards(embed, self.dataset, checkpoint, str(folder / "embeddings"), compute)
        self.selection = selected(self.dataset, folder)
        self.folder, self.compute = folder, compute

    def summary(self, projection: Projection, config: StatisticsConfig = CONFIG) -> Statistics:
        inputs = config, self.dataset, self.embeddings, self.selection, projection
        return summarise_shards(*inputs, str(self.folder / f"statistics-{config.per_class}"), self.compute)


def selected(dataset: Dataset, folder: Path) -> Selection:
    def write(part) -> None:
        for shard in dataset.shards:
            rows = dataset.rows(shard, ["position", "label"])
            keep = [position % 7 != 3 for position in rows["position"].to_pylist()]
            status = pa.array(["kept" if k else "quarantined" for k in keep])
            write_rows(part, shard, rows.append_column("keep", pa.array(keep)).append_column("status", status))
            part.counts["samples"] += len(keep)

    return make(Selection, folder / "selection", Recipe(stage="test", inputs={"dataset": dataset.digest}), write)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: Digits, checkpoint: Checkpoint, compute: Compute) -> Made:
    return Made(tmp_path_factory.mktemp("whole"), digits.shards()[:6], checkpoint, compute)


@pytest.fixture(scope="module")
def parts(
    tmp_path_factory: pytest.TempPathFactory, digits: Digits, checkpoint: Checkpoint, compute: Compute
) -> list[Made]:
    shards = digits.shards()[:6]
    groups = (shards[:1], shards[3:], shards[1:3])
    return [Made(tmp_path_factory.mktemp(f"part{i}"), group, checkpoint, compute) for i, group in enumerate(groups)]


@pytest.fixture(scope="module")
def projection(whole: Made, compute: Compute) -> Projection:
    inputs = CONFIG, whole.embeddings, whole.selection
    return fit_projection(*inputs, str(whole.folder / "projection"), compute)


def test_a_reference_merged_from_batches_is_that_of_a_single_pass(
    whole: Made, parts: list[Made], projection: Projection, tmp_path: Path, compute: Compute
) -> None:
    once = whole.summary(projection)
    merged = merge_statistics(CONFIG, [part.summary(projection) for part in parts], str(tmp_path / "merged"), compute)
    for half in (FIT, CALIBRATE):
        assert merged.rows(half).equals(once.rows(half))  # every bit of every embedding
    assert merged.info == once.info
    assert merged.manifest().counts == once.manifest().counts
    for label, moments in once.moments.by_class.items():
        assert merged.moments.by_class[label].count == moments.count
        torch.testing.assert_close(merged.moments.by_class[label].mean_D, moments.mean_D, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            merged.moments.by_class[label].scatter_DD, moments.scatter_DD, rtol=1e-10, atol=1e-10
        )


def test_it_is_an_embeddings_artifact_of_rows_that_can_be_traced(whole: Made, projection: Projection) -> None:
    statistics = whole.summary(projection)
    assert isinstance(statistics, Embeddings)
    assert statistics.shards == [CALIBRATE, FIT]
    assert set(statistics.columns) == set(whole.embeddings.columns) >= {"logits", "pooled", "gradients"}
    names = {shard["sha256"]: name for name, shard in whole.dataset.info["shards"].items()}
    for half in statistics.shards:
        rows = statistics.rows(half)
        assert rows["position"].to_pylist() == list(range(len(rows)))
        counts = np.bincount(rows["label"].to_numpy())
        assert (counts == CONFIG.per_class // 2).all()
        for row in rows.slice(0, 20).to_pylist():
            source = whole.embeddings.rows(names[row["shard"]], ["position", "key", "label", "gradients"])
            there = source.filter(pa.array(source["position"].to_numpy() == row["source_position"])).to_pylist()[0]
            assert (there["key"], there["label"], there["gradients"]) == (row["key"], row["label"], row["gradients"])
            assert row["kept"] == (row["source_position"] % 7 != 3)
    assert all(statistics.rows(CALIBRATE)["kept"].to_pylist())
    assert not all(statistics.rows(FIT)["kept"].to_pylist())


def test_counts_and_moments_are_those_of_the_samples(whole: Made, projection: Projection) -> None:
    statistics = whole.summary(projection)
    n, removed = np.zeros(10, int), np.zeros(10, int)
    kept_z = []
    for shard in whole.dataset.shards:
        verdicts = whole.selection.rows(shard)
        n += np.bincount(verdicts["label"].to_numpy(), minlength=10)
        removed += np.bincount(verdicts["label"].to_numpy()[~verdicts["keep"].to_numpy()], minlength=10)
        batches = list(whole.embeddings.batches("gradients", shards=[shard]))
        z_ND = projection(torch.cat([batch.z_BD for batch in batches]))
        kept_z.append(z_ND[torch.from_numpy(verdicts["keep"].to_numpy() & (verdicts["label"].to_numpy() == 3))])
    assert statistics.counts == {y: {"n": n[y], "removed": removed[y]} for y in range(10)}
    torch.testing.assert_close(statistics.moments.by_class[3].covariance(), torch.cov(torch.cat(kept_z).T))


def test_the_coordinates_have_unit_variance(whole: Made, projection: Projection) -> None:
    z_Nr = [
        projection(batch.z_BD[torch.from_numpy(whole.selection.rows(shard)["keep"].to_numpy().copy())])
        for shard in whole.dataset.shards
        for batch in whole.embeddings.batches("gradients", shards=[shard])
    ]
    covariance = torch.cov(torch.cat(z_Nr).T)
    torch.testing.assert_close(covariance, torch.eye(projection.n_components, dtype=torch.float64), atol=1e-6, rtol=0)


def test_what_does_not_go_together_is_refused(
    whole: Made, parts: list[Made], projection: Projection, tmp_path: Path, compute: Compute, digits: Digits
) -> None:
    other = parts[0].summary(projection, StatisticsConfig(per_class=10))
    with pytest.raises(ArtifactError, match="different rows_of_class"):
        merge_statistics(CONFIG, [whole.summary(projection), other], str(tmp_path / "merged"), compute)
    config = IndexConfig(n_classes=10, check="headers", image={"size": (8, 8)})
    unread = index_shards(config, digits.shards()[:1], str(tmp_path / "index"), compute)
    with pytest.raises(ConfigError, match=r"set index\.check"):
        summarise_shards(
            CONFIG, unread, parts[0].embeddings, parts[0].selection, projection, str(tmp_path / "x"), compute
        )


def test_many_classes_share_the_rows() -> None:
    assert StatisticsConfig().rows_of_class(10) == 1_000
    assert StatisticsConfig().rows_of_class(10_000) == 5
    assert StatisticsConfig(max_rows=10).rows_of_class(10_000) == 1


# --- the verdict ------------------------------------------------------------------------------------------------


def test_a_batch_of_the_same_kind_is_accepted_and_lists_its_tests(
    whole: Made, parts: list[Made], projection: Projection, tmp_path: Path, compute: Compute
) -> None:
    statistics = whole.summary(projection), parts[1].summary(projection)
    drift = check_drift(DriftConfig(), *statistics, projection, str(tmp_path / "drift"), compute)
    assert drift.info["verdict"] == "accept"
    assert drift.info["reasons"] == []
    tests = [(test["test"], test["label"]) for test in drift.info["tests"]]
    assert {("shift", None), ("removed", None), ("unreadable", None), ("priors", None)} <= set(tests)
    assert len(tests) == len(set(tests))
    assert drift.info["level"] == pytest.approx(0.001 / len(tests))


def test_what_is_removed_by_design_is_no_reason_to_hold(
    whole: Made, parts: list[Made], projection: Projection, tmp_path: Path, compute: Compute
) -> None:
    statistics = whole.summary(projection), parts[1].summary(projection)
    effects = []
    for share in (0.0, 0.1):
        drift = check_drift(
            DriftConfig(), *statistics, projection, str(tmp_path / f"{share}"), compute, by_design=share
        )
        removed = [a for a in drift.info["tests"] if a["test"] == "removed" and a["label"] is None]
        effects.append(removed[0]["result"]["effect"])
    n, n_removed = (sum(c[name] for c in statistics[0].counts.values()) for name in ("n", "removed"))
    assert effects[0] - effects[1] == pytest.approx(0.1 * (1 - n_removed / n))


def test_limits_decide_what_is_an_alarm_and_broad_ones_ask_for_a_refit(
    whole: Made, parts: list[Made], projection: Projection, tmp_path: Path, compute: Compute
) -> None:
    strict = DriftConfig(level=0.999, shift=0, overall_shift=0, removed=0, broad=0.1, min_samples=4)
    statistics = whole.summary(projection), parts[0].summary(projection)
    drift = check_drift(strict, *statistics, projection, str(tmp_path / "drift"), compute)
    alarms = [test for test in drift.info["tests"] if test["alarm"]]
    assert all(a["result"]["p_value"] <= drift.info["level"] for a in alarms)
    assert len(drift.info["reasons"]) == len(alarms)
    assert (drift.info["verdict"] == "accept") == (not alarms)
