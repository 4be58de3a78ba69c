"""RCA and RobustRealNVP among the scorers: the same scores however the rows come, before and after saving."""

from collections.abc import Callable, Iterable

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.measure import auroc
from sanitize.score import (
    RCA,
    AnomalyScorer,
    RCAConfig,
    RCAScorerConfig,
    RobustRealNVP,
    RobustRealNVPConfig,
    RobustRealNVPScorerConfig,
)
from sanitize.score.scorer import row_hashes

CPU = Compute(device="cpu")
RCA_SCORER = RCAScorerConfig(model=RCAConfig(epochs=5, widths=(16,), n_codes=3, n_passes=4))
NVP_SCORER = RobustRealNVPScorerConfig(model=RobustRealNVPConfig(epochs=5, widths=(16,)))
both = pytest.mark.parametrize("config", [RCA_SCORER, NVP_SCORER], ids=lambda config: config.kind)
InBatches = Callable[..., list[EmbeddingBatch]]


def rows(n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two classes in a plane of six dimensions; every tenth row lies off it."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(n) % 2
    z_ND = torch.randn(n, 2, generator=generator) @ torch.randn(2, 6, generator=generator) + 3 * labels_N[:, None]
    z_ND[::10] += 3 * torch.randn(len(z_ND[::10]), 6, generator=generator)
    return z_ND, labels_N


def fitted(config: RCAScorerConfig | RobustRealNVPScorerConfig, batches: list[EmbeddingBatch]) -> AnomalyScorer:
    scorer = config.build()
    scorer.fit(lambda _name: iter(batches), CPU)
    return scorer


def scores(scorer: AnomalyScorer, batches: Iterable[EmbeddingBatch]) -> Tensor:
    return torch.cat([scorer.score(batch) for batch in batches])


@both
def test_rows_off_the_plane_score_high(config, in_batches: InBatches) -> None:  # type: ignore[no-untyped-def]
    batches = in_batches(*rows(1000))
    longer = config.model_copy(update={"model": config.model.model_copy(update={"epochs": 60})})
    odd_N = torch.arange(1000) % 10 == 0
    assert auroc(scores(fitted(longer, batches), batches).numpy(), odd_N.numpy()) > 0.9


@both
def test_order_shards_and_batches_change_no_bit(config, in_batches: InBatches) -> None:  # type: ignore[no-untyped-def]
    config = config.model_copy(update={"max_fit": 150})
    first, second = in_batches(*rows(seed=0), shard="a.tar"), in_batches(*rows(seed=1), shard="b.tar")
    scorer = fitted(config, first + second)
    other = fitted(config, in_batches(*rows(seed=1), shard="b.tar", size=7) + first[::-1])
    assert all(
        torch.equal(a, b) for a, b in zip(scorer.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert scorer.statistics == other.statistics
    assert torch.equal(scores(scorer, first), scores(other, in_batches(*rows(seed=0), shard="a.tar", size=13)))


@both
def test_it_is_the_estimator_on_the_rows_of_smallest_hash(config, in_batches: InBatches) -> None:  # type: ignore[no-untyped-def]
    config = config.model_copy(update={"max_fit": 100})
    (batch,) = in_batches(*rows(), size=400)
    hashes = row_hashes(batch, CPU.seed_for("score", config.kind, "sample"))
    chosen = sorted(range(400), key=lambda i: hashes[i])[:100]
    model = RCA(config.model) if config.kind == "rca" else RobustRealNVP(config.model)
    model.fit(batch.z_BD[chosen], CPU.seed_for("score", config.kind, "fit"))
    scorer = fitted(config, [batch])
    assert torch.equal(scorer.score(batch), model.score(batch.z_BD))
    assert {y: s["n_fitted"] for y, s in scorer.statistics.items()} == {
        y: int((batch.labels_B[chosen] == y).sum()) for y in (0, 1)
    }


@both
def test_saved_and_loaded_it_scores_bitwise_the_same(config, in_batches: InBatches) -> None:  # type: ignore[no-untyped-def]
    batches = in_batches(*rows())
    scorer, loaded = fitted(config, batches), config.build()
    loaded.load_state(safetensors.torch.load(safetensors.torch.save(scorer.state_dict())), scorer.statistics)
    assert torch.equal(scores(scorer, batches), scores(loaded, batches))
    assert loaded.statistics == scorer.statistics


@both
def test_labels_are_not_seen(config, in_batches: InBatches) -> None:  # type: ignore[no-untyped-def]
    z_ND, labels_N = rows()
    of_labels, without = in_batches(z_ND, labels_N), in_batches(z_ND, torch.zeros_like(labels_N))
    assert torch.equal(scores(fitted(config, of_labels), of_labels), scores(fitted(config, without), without))


@both
def test_without_rows_nothing_is_suspicious(config, in_batches: InBatches) -> None:  # type: ignore[no-untyped-def]
    scorer, loaded = fitted(config, []), config.build()
    loaded.load_state(safetensors.torch.load(safetensors.torch.save(scorer.state_dict())), {})
    assert scores(loaded, in_batches(*rows())).tolist() == [0.0] * 400
