"""Data in which the default rule once missed poison: what is not found must be inconclusive, no all-clear."""

from pathlib import Path

import pytest

from sanitize import (
    Compute,
    embed_shards,
    fit_scorer,
    index_shards,
    poison_shards,
    score_shards,
    select_samples,
    train_embedder,
)
from sanitize.attack import BadNetsConfig
from sanitize.data.digits import write_digits
from sanitize.data.index import IndexConfig
from sanitize.embed import EmbedConfig, EmbedderConfig
from sanitize.loop import OptimConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.score import ToxicDirectionConfig
from sanitize.select import SelectConfig


@pytest.mark.slow
def test_3_percent_badnets_in_digits_with_model_seed_3(tmp_path: Path) -> None:
    compute = Compute(device="cpu", seed=0)
    digits = write_digits(str(tmp_path / "digits"), compute, n_shards=5)
    honest = index_shards(IndexConfig(n_classes=10), digits.shards(), str(tmp_path / "honest"), compute)
    poisoned = poison_shards(BadNetsConfig(rate=0.03, size=3), honest, str(tmp_path / "poisoned"), compute)
    compute = Compute(device="cpu", seed=3)
    dataset = index_shards(IndexConfig(), poisoned.shard_paths(), str(tmp_path / "index"), compute)
    architecture = ConvNetConfig(widths=(16, 32, 64))
    config = EmbedderConfig(architecture=architecture, optim=OptimConfig(epochs=30, batch_size=64))
    embedder = train_embedder(config, dataset, str(tmp_path / "embedder"), compute)
    embeddings = embed_shards(EmbedConfig(), dataset, embedder, str(tmp_path / "embeddings"), compute)
    scorer = ToxicDirectionConfig()
    fitted = fit_scorer(scorer, embeddings, str(tmp_path / "scorer"), compute)
    scores = score_shards(scorer, fitted, embeddings, str(tmp_path / "scores"), compute)
    selection = select_samples(SelectConfig(), dataset, [scores], str(tmp_path / "selection"), compute)
    verdict = fitted.info["finding"]["verdict"]
    assert verdict in ("found", "inconclusive"), fitted.info["classes"]["0"]
    assert (selection.manifest().counts["quarantined"] > 0) == (verdict == "found")
