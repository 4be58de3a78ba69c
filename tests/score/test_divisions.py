"""However the samples come, in batches of one row, with a class missing, or all of one class: every scorer can be
fitted, and a score depends on the fitted state and the row alone, to the bit."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.embed.label_free import oriented_gradients, reduced_pixels
from sanitize.score import (
    LabelMarginConfig,
    NeighboursConfig,
    RCAConfig,
    RCAScorerConfig,
    RobustRealNVPConfig,
    RobustRealNVPScorerConfig,
    ScorerConfig,
    SpectralConfig,
    ToxicDirectionConfig,
)
from sanitize.score.scorer import Scorer

CPU = Compute(device="cpu")
N = 300
SCORERS: dict[str, ScorerConfig] = {
    "label_margin": LabelMarginConfig(),
    "neighbours": NeighboursConfig(k=10),
    "rca": RCAScorerConfig(embedding="pixels", model=RCAConfig(epochs=2, n_passes=7, widths=(13,), n_codes=5)),
    "rca variational": RCAScorerConfig(embedding="pixels", model=RCAConfig(epochs=1, variational=True, n_passes=3)),
    "robust_realnvp": RobustRealNVPScorerConfig(embedding="pixels", model=RobustRealNVPConfig(epochs=2, widths=(9, 7))),
    "spectral": SpectralConfig(embedding="pixels", n_directions=5),
    "spectral robust": SpectralConfig(embedding="pixels", whiten="robust"),
    "toxic_direction": ToxicDirectionConfig(embedding="pixels", n_starts=16, min_class=20, min_component=3),
    "toxic_direction single split": ToxicDirectionConfig(embedding="pixels", n_starts=16, evidence=None),
}
SLOW = ("toxic_direction",)
every_scorer = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SCORERS]
)
# How rows are divided: each shard is cut into batches, in an order of its own.
SEEDS, CUTS = st.integers(0, 999), st.lists(st.integers(0, N), max_size=6)


@cache
def real() -> tuple[dict[str, Tensor], Tensor]:
    """Embeddings of 300 handwritten digits, and their labels: ten classes, one of them with a single sample."""
    digits = sklearn.datasets.load_digits()
    images_N1HW = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)[:, None]
    labels_N = torch.from_numpy(digits.target).long()
    rows = torch.cat([(labels_N != 7).nonzero()[: N - 1, 0], (labels_N == 7).nonzero()[:1, 0]])
    images_N1HW = images_N1HW[rows]
    embeddings = {"pixels": reduced_pixels(images_N1HW, 8), "gradients": oriented_gradients(images_N1HW, 7)}
    embeddings["early"] = reduced_pixels(images_N1HW, 4)
    noise_NK = torch.randn(N, 10, generator=torch.Generator().manual_seed(0))
    return embeddings | {"logits": 5 * torch.eye(10)[labels_N[rows]] + noise_NK}, labels_N[rows]


def batches(
    name: str | Sequence[str], parts: Sequence[Tensor], shards: Sequence[Tensor] | None = None
) -> list[EmbeddingBatch]:
    """Parts of the rows as batches. A row is named by its shard and its place in it: by default, all are in one."""
    embeddings, labels_N = real()
    chosen = [embeddings[one] for one in ([name] if isinstance(name, str) else name)]
    widths = tuple(z_ND.shape[1] for z_ND in chosen)
    shards = [torch.arange(N)] if shards is None else shards
    found = []
    for part in parts:
        (shard,) = [i for i, rows in enumerate(shards) if set(part.tolist()) <= set(rows.tolist())][:1] or [0]
        at_B = torch.tensor([shards[shard].tolist().index(row) for row in part.tolist()], dtype=torch.int64)
        keys = [str(row) for row in part.tolist()]
        z_BD = torch.cat([z_ND[part] for z_ND in chosen], 1)
        found.append(EmbeddingBatch(f"{shard:04d}.tar", at_B, keys, labels_N[part], z_BD, widths))
    return found


def fitted(config: ScorerConfig, parts: Sequence[Tensor], shards: Sequence[Tensor] | None = None) -> Scorer:
    scorer = config.build()

    def one_pass(name: str | Sequence[str]) -> Iterator[EmbeddingBatch]:
        return iter(batches(name, parts, shards))

    scorer.fit(one_pass, CPU)
    return scorer


@cache
def whole(name: str) -> tuple[Scorer, Tensor]:
    scorer = fitted(SCORERS[name], [torch.arange(N)])
    (batch,) = batches(SCORERS[name].scored, [torch.arange(N)])
    return scorer, scorer.score(batch)


def divided(seed: int, cuts: Sequence[int], by_class: bool = False) -> list[Tensor]:
    """All rows in parts, shuffled or class by class; some parts are empty, some have one row."""
    order_N = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    if by_class:
        order_N = order_N[real()[1][order_N].argsort(stable=True)]
    return [order_N[a:b] for a, b in pairwise(sorted([0, N, *cuts]))]


@every_scorer
@settings(max_examples=12)
@given(SEEDS, CUTS, st.booleans())
def test_a_score_has_the_same_bits_in_any_batch(name: str, seed: int, cuts: list[int], by_class: bool) -> None:
    scorer, wanted_N = whole(name)
    for part in divided(seed, cuts, by_class):
        (batch,) = batches(SCORERS[name].scored, [part])
        assert torch.equal(scorer.score(batch), wanted_N[part])


@every_scorer
def test_a_row_alone_has_the_score_it_has_among_others(name: str) -> None:
    scorer, wanted_N = whole(name)
    parts = [torch.tensor([row]) for row in range(0, N, 7)]
    scores_n = torch.cat([scorer.score(batch) for batch in batches(SCORERS[name].scored, parts)])
    assert torch.equal(scores_n, wanted_N[::7])


@every_scorer
@settings(max_examples=6)
@given(SEEDS, CUTS, st.booleans())
def test_it_is_fitted_the_same_in_any_batches(name: str, seed: int, cuts: list[int], by_class: bool) -> None:
    """Samples to the bit; moments, and what rests on them, to rounding (`sanitize.streaming`)."""
    config = SCORERS[name]
    parts = [part for part in divided(seed, cuts, by_class) if len(part)]
    if isinstance(config, ToxicDirectionConfig) and config.evidence is None:
        config = config.model_copy(update={"label_check": None})
        name = "toxic_direction without label_check"
        SCORERS.setdefault(name, config)
    scorer, (other, wanted_N) = fitted(config, parts), whole(name)
    (batch,) = batches(config.scored, [torch.arange(N)])
    if config.kind in ("rca", "robust_realnvp", "toxic_direction"):
        assert torch.equal(scorer.score(batch), wanted_N)
        assert scorer.statistics == other.statistics
    else:
        assert scorer.statistics.keys() == other.statistics.keys()
        # A neighbour at nearly the same distance as the next may be another one.
        close_N = (scorer.score(batch) - wanted_N).abs() <= 1e-3 * (1 + wanted_N.abs())
        assert close_N.double().mean() >= 0.97


@every_scorer
@settings(max_examples=6)
@given(SEEDS, CUTS, st.booleans(), st.integers(0, 20))
def test_any_division_into_shards_can_be_fitted_and_scored(
    name: str, seed: int, cuts: list[int], by_class: bool, n_single: int
) -> None:
    """Also shards of one row. A division gives rows other names, so that other samples are drawn: scores are finite."""
    pieces = [part for part in divided(seed, cuts, by_class) if len(part)]
    shards = list(pieces[0].split(1)[:n_single]) + [part for part in (pieces[0][n_single:], *pieces[1:]) if len(part)]
    scorer = fitted(SCORERS[name], shards, shards)
    scores_N = torch.cat([scorer.score(batch) for batch in batches(SCORERS[name].scored, shards, shards)])
    assert scores_N.shape == (N,)
    assert scores_N.dtype == torch.float32
    assert scores_N.isfinite().all()


@every_scorer
@pytest.mark.parametrize("n", [1, 2, 3, 9])
@pytest.mark.parametrize("one_class", [True, False])
def test_a_handful_of_rows_can_be_fitted_and_scored(name: str, n: int, one_class: bool) -> None:
    labels_N = real()[1]
    rows = (labels_N == 3).nonzero()[:n, 0] if one_class else torch.arange(n)
    scorer = fitted(SCORERS[name], rows.split(1))
    scores_n = torch.cat([scorer.score(batch) for batch in batches(SCORERS[name].scored, rows.split(1))])
    assert scores_n.isfinite().all()
    # A class that was not fitted, and a batch without rows.
    others = (labels_N == 8).nonzero()[:5, 0]
    assert all(len(scorer.score(b)) == len(b.keys) for b in batches(SCORERS[name].scored, [others, others[:0]]))


@pytest.mark.parametrize("size", [1, 50])
def test_the_label_check_skips_batches_without_a_sampled_row(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most `CHECKED` rows of each class are checked; here few, so that most batches hold none of them."""
    monkeypatch.setattr("sanitize.score.toxic_direction.single_split.CHECKED", 2)
    scorer = fitted(SCORERS["toxic_direction single split"], torch.arange(N).split(size))
    assert len(scorer.statistics) == 10
