from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sanitize import exact
from sanitize.artifacts import verify
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Embeddings
from sanitize.embed import EmbedConfig, EmbedderConfig, embed_shards, train_embedder
from sanitize.errors import ArtifactError, ConfigError, NumericsError
from sanitize.models.architectures import Architecture
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.cnn9 import CNN9Config
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.instance_convnet import InstanceConvNetConfig
from sanitize.models.mlp import MLPConfig
from sanitize.models.resnet import ResNetConfig
from sanitize.models.taps import Tapped, find_taps
from sanitize.models.torchvision import TorchvisionConfig
from sanitize.models.vgg import VGGConfig


def test_embeddings_are_what_the_model_sees_computed_by_hand(
    dataset: Dataset, checkpoint: Checkpoint, embeddings: Embeddings
) -> None:
    assert embeddings.names == ["penultimate", "pooled", "early", "pixels", "gradients"]
    model = checkpoint.model()
    for shard in dataset.shards:
        (batch,) = dataset.batches(10_000, [shard])
        with torch.inference_mode():
            maps = model.features[:-1](checkpoint.config.normalise(batch.images_BCHW))  # type: ignore[index, operator]
            penultimate = maps.relu().mean((2, 3))
            wanted = {"penultimate": penultimate, "logits": model.head(penultimate)}  # type: ignore[operator]
            wanted["pooled"] = torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)
            first = model.features[:3](checkpoint.config.normalise(batch.images_BCHW))  # type: ignore[index, operator]
            wanted["early"] = torch.cat([first.amax((2, 3)), first.mean((2, 3))], 1)
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


def test_small_shards_share_blocks_and_keep_their_embeddings(
    tmp_path: Path,
    make_tar: Callable[..., str],
    good: Callable[..., list],
    checkpoint: Checkpoint,
    compute: Compute,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = good(70)
    parts, start = [3, 1, 0, 5, 20, 30, 11], 0  # samples of each shard; 29 fit into the first block
    for i, n in enumerate(parts):
        own = members[2 * start : 2 * (start + n)] or [("x.cls", b"0")]
        make_tar(tmp_path / f"in/{i}.tar", own)
        start += n
    index = IndexConfig(max_bad_fraction=0.1)
    dataset = index_shards(index, str(tmp_path / "in"), str(tmp_path / "index"), compute)
    n_blocks = 0
    call = Tapped.__call__

    def counted(self: Tapped, images: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal n_blocks
        n_blocks += 1
        return call(self, images)

    monkeypatch.setattr(Tapped, "__call__", counted)
    whole = embed_shards(EmbedConfig(), dataset, checkpoint, str(tmp_path / "whole"), compute)
    assert n_blocks == 3
    for shard in reversed(dataset.shards):  # one by one: no two share a block
        embed_shards(EmbedConfig(), dataset, checkpoint, str(tmp_path / "single"), compute, shards=[shard])
    assert n_blocks == 3 + 6
    assert embed_shards(EmbedConfig(), dataset, checkpoint, str(tmp_path / "single"), compute).digest == whole.digest


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


ARCHITECTURES: dict[str, tuple[Architecture, tuple[int, int, int]]] = {
    "convnet": (ConvNetConfig(), (1, 28, 28)),
    "convnet of odd widths": (ConvNetConfig(widths=(5, 7, 9)), (3, 31, 29)),
    "resnet": (ResNetConfig(), (3, 32, 32)),
    "vgg": (VGGConfig(widths=(8, 8, 12)), (1, 28, 28)),
    "cnn9": (CNN9Config(width=8), (3, 32, 32)),
    "mlp": (MLPConfig(widths=(37,)), (1, 7, 9)),
    "instance_convnet": (InstanceConvNetConfig(widths=(12, 12)), (3, 16, 16)),
    "torchvision": (TorchvisionConfig(name="resnet18"), (3, 32, 32)),
}


@pytest.mark.parametrize("n_classes", [2, 10, 43])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_image_is_embedded_the_same_in_every_place_and_company(name: str, n_classes: int, compute: Compute) -> None:
    """Every bit, on the CPU of this machine: MKL and oneDNN choose their kernels by it."""
    architecture, shape = ARCHITECTURES[name]
    config = ModelConfig(architecture=architecture, n_classes=n_classes, image_shape=shape)
    torch.manual_seed(0)
    model = config.build().eval()
    exact.make_narrow_linears_exact(model)
    tapped = Tapped(model.to(memory_format=torch.channels_last), find_taps(model, config.example()))  # type: ignore[call-overload]
    images_NCHW = torch.randint(0, 256, (50, *shape), dtype=torch.uint8)

    def embedded(rows: list[int]) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            blocks = [
                (tapped(config.normalise(x).contiguous(memory_format=torch.channels_last)), n)
                for x, n in compute.full_blocks(images_NCHW[rows], 64)
            ]
        return {key: torch.cat([seen[key][:n] for seen, n in blocks]) for key in blocks[0][0]}

    whole = embedded(list(range(50)))
    for rows in ([17], list(range(50))[::-1], [*range(3, 50), 0, 1, 2], list(range(40, 47))):
        for key, x_ND in embedded(rows).items():
            assert torch.equal(x_ND, whole[key][rows]), key
