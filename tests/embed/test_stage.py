from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sanitize.artifacts import verify
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Embeddings
from sanitize.embed import EmbedConfig, EmbedderConfig, embed_shards, train_embedder
from sanitize.errors import ArtifactError, ConfigError, NumericsError
from sanitize.models.checkpoint import Checkpoint


def test_embeddings_are_what_the_model_sees_computed_by_hand(
    dataset: Dataset, checkpoint: Checkpoint, embeddings: Embeddings
) -> None:
    assert embeddings.names == ["penultimate", "pooled", "pixels", "gradients"]
    model = checkpoint.model()
    for shard in dataset.shards:
        (batch,) = dataset.batches(10_000, [shard])
        with torch.inference_mode():
            maps = model.features[:-1](checkpoint.config.normalise(batch.images_BCHW))  # type: ignore[index, operator]
            penultimate = maps.relu().mean((2, 3))
            wanted = {"penultimate": penultimate, "logits": model.head(penultimate)}  # type: ignore[operator]
            wanted["pooled"] = torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)
        rows = embeddings.rows(shard)
        for name, x_BD in wanted.items():
            torch.testing.assert_close(torch.tensor(rows[name].to_pylist()), x_BD, rtol=1e-4, atol=1e-5)
        assert rows["key"].to_pylist() == batch.keys
        assert rows["label"].to_pylist() == batch.labels_B.tolist()
        assert rows["position"].to_pylist() == batch.positions_B.tolist()
        assert set(rows["shard"].to_pylist()) == {shard}
    assert embeddings.manifest().counts == {"samples": dataset.n_samples}
    assert verify(Path(embeddings.path)) == []


def test_the_digest_does_not_depend_on_when_and_in_which_groups(
    tmp_path: Path, dataset: Dataset, checkpoint: Checkpoint, embeddings: Embeddings, compute: Compute
) -> None:
    config = EmbedConfig(batch_size=64)
    again = embed_shards(config, dataset, checkpoint, str(tmp_path / "again"), compute)
    for group in (dataset.shards[3:], dataset.shards[:1], dataset.shards[1:3]):
        embed_shards(config, dataset, checkpoint, str(tmp_path / "grouped"), compute, shards=group)
    grouped = embed_shards(config, dataset, checkpoint, str(tmp_path / "grouped"), compute)
    assert {again.digest, grouped.digest} == {embeddings.digest}


def test_bfloat16_is_another_recipe_and_nearly_the_same_numbers(
    tmp_path: Path, dataset: Dataset, checkpoint: Checkpoint, embeddings: Embeddings
) -> None:
    low = Compute(device="cpu", precision="bfloat16")
    other = embed_shards(EmbedConfig(batch_size=64), dataset, checkpoint, str(tmp_path / "a"), low)
    assert other.digest != embeddings.digest
    shard = dataset.shards[0]
    a, b = (torch.tensor(e.rows(shard)["pooled"].to_pylist()) for e in (embeddings, other))
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_a_shard_without_a_usable_sample_has_no_rows(
    tmp_path: Path,
    make_tar: Callable[..., str],
    good: Callable[..., list],
    embedder_config: EmbedderConfig,
    compute: Compute,
) -> None:
    make_tar(tmp_path / "in/a.tar", good(20))
    make_tar(tmp_path / "in/b.tar", [("x.cls", b"0")])
    dataset = index_shards(IndexConfig(), str(tmp_path / "in"), str(tmp_path / "index"), compute)
    checkpoint = train_embedder(embedder_config, dataset, str(tmp_path / "model"), compute)
    embeddings = embed_shards(EmbedConfig(), dataset, checkpoint, str(tmp_path / "out"), compute)
    assert embeddings.shards == ["a.tar"]
    assert sum(len(batch.keys) for batch in embeddings.batches("pooled")) == 20


@pytest.mark.parametrize("how", ["not a number", "too large"])
def test_weights_that_give_no_finite_embedding_are_refused(
    how: str,
    tmp_path: Path,
    dataset: Dataset,
    checkpoint: Checkpoint,
    embedder_config: EmbedderConfig,
    compute: Compute,
) -> None:
    state = checkpoint.model().state_dict()
    if how == "not a number":
        state["head.bias"][3] = float("nan")
    else:
        state["head.weight"].fill_(3e38)  # finite, but the logits are not
    safetensors.torch.save_file(state, tmp_path / "broken.safetensors")
    config = embedder_config.model_copy(update={"weights": str(tmp_path / "broken.safetensors")})
    broken = train_embedder(config, dataset, str(tmp_path / "model"), compute)
    shard, key = dataset.shards[0], next(dataset.batches(1)).keys[0]
    error, message = NumericsError, f"logits of {shard}, key {key}"
    if how == "not a number":
        error, message = ArtifactError, "the weights 'head.bias' are not finite"
    with pytest.raises(error, match=message):
        embed_shards(EmbedConfig(), dataset, broken, str(tmp_path / "out"), compute)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_not_there_is_a_config_error(
    tmp_path: Path, dataset: Dataset, checkpoint: Checkpoint, compute: Compute
) -> None:
    with pytest.raises(ConfigError, match="it has head"):
        embed_shards(EmbedConfig(penultimate="fc"), dataset, checkpoint, str(tmp_path / "out"), compute)
