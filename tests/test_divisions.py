"""The same samples in other shards: every stage works, and what it says of a sample has the same bits."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import encode_png
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Embeddings, Selection, ShardTables
from sanitize.drift import Projection, StatisticsConfig, fit_projection, summarise_shards
from sanitize.embed import EmbedConfig, embed_shards
from sanitize.models.checkpoint import Checkpoint
from sanitize.score import (
    FittedScorer,
    RCAConfig,
    RCAScorerConfig,
    RobustRealNVPConfig,
    RobustRealNVPScorerConfig,
    ScorerConfig,
    SpectralConfig,
    ToxicDirectionConfig,
    fit_scorer,
    score_shards,
)
from sanitize.select import (
    ContaminationRule,
    JudgeConfig,
    SelectConfig,
    WriteConfig,
    judge_shards,
    select_samples,
    write_selected,
)

N = 90
EMBED, STATISTICS = EmbedConfig(batch_size=64), StatisticsConfig(per_class=20)
RULE = SelectConfig(rule=ContaminationRule(rate=0.05), rules={"toxic_direction": ContaminationRule(rate=0.05)})
# `neighbours` and `label_margin` tell a sample from the others by its shard and place, so they are not among them.
SCORERS: list[ScorerConfig] = [
    SpectralConfig(embedding="pooled"),
    RCAScorerConfig(model=RCAConfig(epochs=1)),
    RobustRealNVPScorerConfig(model=RobustRealNVPConfig(epochs=1)),
    ToxicDirectionConfig(n_starts=16, min_class=8, min_component=3),
]
# Where the samples are cut, in a shuffled order or class by class; neighbouring cuts make shards of one sample.
CUTS = st.lists(st.integers(1, N - 1), max_size=6, unique=True)


class Run:
    """The first stages of a run, on samples of the session's data set that lie in shards of their own."""

    def __init__(
        self,
        folder: Path,
        parts: list[list[int]],
        make_tar: Callable[..., str],
        source: tuple[Dataset, Checkpoint],
        fitted: dict[str, FittedScorer],
        compute: Compute,
    ) -> None:
        dataset, checkpoint = source
        images_NCHW, labels_N = dataset.images()
        for i, rows in enumerate(parts):
            members = [
                member
                for row in rows
                for member in (
                    (f"{row:04d}.png", encode_png(images_NCHW[row])),
                    (f"{row:04d}.cls", str(int(labels_N[row])).encode()),
                )
            ]
            broken = [("broken.png", b"no image"), ("broken.cls", b"0")] if i == 0 else []
            make_tar(folder / f"in/{i:04d}.tar", members + broken)
        index = IndexConfig(n_classes=10, max_bad_fraction=1.0)
        self.dataset = index_shards(index, str(folder / "in"), str(folder / "index"), compute)
        self.embeddings = embed_shards(EMBED, self.dataset, checkpoint, str(folder / "embeddings"), compute)
        self.scores = [
            score_shards(config, fitted[config.kind], self.embeddings, str(folder / config.kind), compute)
            for config in SCORERS
        ]


def by_key(tables: ShardTables, columns: list[str]) -> pa.Table:
    """What an artifact says of each sample, wherever the sample lies."""
    return pa.concat_tables([tables.rows(shard, ["key", *columns]) for shard in tables.shards]).sort_by("key")


@pytest.fixture(scope="module")
def fitted(
    tmp_path_factory: pytest.TempPathFactory, embeddings: Embeddings, compute: Compute
) -> dict[str, FittedScorer]:
    folder = tmp_path_factory.mktemp("fitted")
    return {c.kind: fit_scorer(c, embeddings, str(folder / c.kind), compute) for c in SCORERS}


@pytest.fixture(scope="module")
def known(
    tmp_path_factory: pytest.TempPathFactory,
    make_tar: Callable[..., str],
    dataset: Dataset,
    checkpoint: Checkpoint,
    fitted: dict[str, FittedScorer],
    compute: Compute,
) -> tuple[Run, Projection]:
    """All samples in one shard, and coordinates for the statistics."""
    folder = tmp_path_factory.mktemp("known")
    run = Run(folder, [list(range(N))], make_tar, (dataset, checkpoint), fitted, compute)
    selection = select_samples(RULE, run.dataset, run.scores, str(folder / "selection"), compute)
    return run, fit_projection(STATISTICS, run.embeddings, selection, str(folder / "projection"), compute)


@settings(max_examples=2)
@example(seed=0, cuts=list(range(1, 40)), by_class=False)  # shards of one sample
@example(seed=0, cuts=[30, 60], by_class=True)
@given(seed=st.integers(0, 999), cuts=CUTS, by_class=st.booleans())
def test_what_is_said_of_a_sample_does_not_depend_on_its_shard(
    seed: int,
    cuts: list[int],
    by_class: bool,
    tmp_path_factory: pytest.TempPathFactory,
    make_tar: Callable[..., str],
    read_tar: Callable[..., list[tuple[str, bytes]]],
    dataset: Dataset,
    checkpoint: Checkpoint,
    fitted: dict[str, FittedScorer],
    known: tuple[Run, Projection],
    compute: Compute,
) -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    if by_class:
        order = order[dataset.images()[1][order].argsort(stable=True)]
    # The first shard holds nothing but a sample that cannot be read.
    parts = [[], *(order[a:b].tolist() for a, b in pairwise(sorted([0, N, *cuts])))]
    folder, (whole, projection) = tmp_path_factory.mktemp("divided"), known
    run = Run(folder, parts, make_tar, (dataset, checkpoint), fitted, compute)

    for name in ["logits", *run.embeddings.names]:
        assert by_key(run.embeddings, ["label", name]).equals(by_key(whole.embeddings, ["label", name]))
    for ours, theirs in zip(run.scores, whole.scores, strict=True):
        assert by_key(ours, ["label", "score"]).equals(by_key(theirs, ["label", "score"]))

    verdicts: dict[str, dict[str, Selection]] = {}
    for at, of_run in ((folder / "divided", run), (folder / "whole", whole)):
        selection = select_samples(RULE, of_run.dataset, of_run.scores, str(at / "selection"), compute)
        judge = JudgeConfig(select=RULE, level=0.02)
        judged = judge_shards(judge, of_run.dataset, of_run.scores, whole.scores, str(at / "judged"), compute)
        verdicts[at.name] = {"selected": selection, "judged": judged}
    for stage, ours in verdicts["divided"].items():
        columns = ["label", "status", "keep", "reasons"]
        assert by_key(ours, columns).equals(by_key(verdicts["whole"][stage], columns))

    selection = verdicts["divided"]["selected"]
    shards = write_selected(WriteConfig(), run.dataset, selection, str(folder / "shards"), compute)
    kept = [name for path in shards.clean() for name, _ in read_tar(path) if name.endswith(".png")]
    wanted = by_key(selection, ["keep"])
    assert sorted(kept) == [f"{key}.png" for key in wanted.filter(wanted["keep"])["key"].to_pylist()]
    # Statistics of a class: counts exactly, moments to rounding.
    ours, theirs = (
        summarise_shards(
            STATISTICS,
            of_run.dataset,
            of_run.embeddings,
            verdicts[name]["selected"],
            projection,
            str(folder / name / "statistics"),
            compute,
        )
        for name, of_run in (("divided", run), ("whole", whole))
    )
    assert ours.counts == theirs.counts
    assert ours.info["unreadable"] == theirs.info["unreadable"] == 1
    for label, moments in theirs.moments.by_class.items():
        assert ours.moments.by_class[label].count == moments.count
        torch.testing.assert_close(ours.moments.by_class[label].mean_D, moments.mean_D)
        torch.testing.assert_close(ours.moments.by_class[label].scatter_DD, moments.scatter_DD)
